"""A model on a set of problems, K samples each: what ``drpo eval`` does, from the first sample to the JSON."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drpo.data.files import read_problems
from drpo.data.problems import BUILTIN_MODELS, BUILTIN_TASKS, Problem, as_prompt, builtin_problems
from drpo.errors import UserError
from drpo.evaluation.engines import ENGINES, Completion, Engine
from drpo.evaluation.folder import EvaluationFolder
from drpo.evaluation.settings import Settings
from drpo.evaluation.summary import summarise
from drpo.files import append_jsonl, versions, write_json
from drpo.rewards import MathGrader, Reward, load_reward, scores_of
from drpo.rewards.answers import canonical
from drpo.rewards.exact import gsm8k_answer, last_item
from drpo.run.folder import RunFolder
from drpo.run.progress import counting

STATED: dict[str, Callable[[str], str | None]] = {"exact_answer": last_item, "gsm8k": gsm8k_answer}
"""How the votes of majority@k are read, by reward; by what is boxed or follows ``Answer:`` for all others."""


def load(settings: Settings) -> list[tuple[str, Problem]]:
    """The problems and where each is from: a file's stem, or its whole name where two have the same.

    Raises:
        UserError: a file that cannot be read, or that says something else than problems.
    """
    loaded: list[tuple[str, Problem]] = []
    stems = Counter(Path(source).stem for source in settings.data)
    for source in settings.data:
        if source in BUILTIN_TASKS:
            problems = builtin_problems("heldout", settings.problems or 250, seed=0)
        else:
            problems = read_problems(Path(source), template=settings.template)
        name = Path(source).stem if stems[Path(source).stem] == 1 else source
        loaded += [(name, problem) for problem in problems[: settings.problems]]
    return loaded


def sample_and_score(
    settings: Settings, folder: EvaluationFolder, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Sample, grade and summarise; write the folder and return the content of its ``evaluation.json``.

    A completion depends on the seed, its problem and its number alone, and a batch is written when it is
    graded, so that an evaluation that was interrupted and resumed ends as if it had not been.

    Raises:
        UserError: settings that cannot be run.
    """
    reward = load_reward(settings.reward)
    problems = load(settings)
    digest = hashlib.sha256(json.dumps([asdict(problem) for _, problem in problems]).encode()).hexdigest()
    fixed = json.loads(json.dumps({**asdict(settings), "data_sha256": digest, "versions": versions()}))
    asked = [(index, sample) for index in range(len(problems)) for sample in range(settings.samples)]
    batches = [asked[start : start + settings.batch_size] for start in range(0, len(asked), settings.batch_size)]
    # The engine is loaded first: a model that cannot be leaves no folder behind.
    engine = ENGINES[settings.engine](
        _model_path(settings.model), settings.max_tokens, settings.temperature, settings.precision
    )
    fixed["engine_description"] = engine.description
    with folder.locked():
        rows = folder.open(fixed, asked, resume=resume, overwrite=overwrite)
        return _sample(settings, folder, engine, reward, problems, batches, rows, fixed)


def _sample(
    settings: Settings,
    folder: EvaluationFolder,
    engine: Engine,
    reward: Reward,
    problems: Sequence[tuple[str, Problem]],
    batches: Sequence[Sequence[tuple[int, int]]],
    rows: list[dict[str, Any]],
    fixed: dict[str, Any],
) -> dict[str, Any]:
    """What is missing of the samples, and the result of all."""
    # A batch cut short by an interruption is drawn again as a whole: its shape is part of its arithmetic.
    done = 0
    while done < len(batches) and len(rows) >= sum(map(len, batches[: done + 1])):
        done += 1
    rows = rows[: sum(map(len, batches[:done]))]
    folder.rewrite(rows)
    with counting("evaluating", "completions", total=sum(map(len, batches)), done=len(rows)) as advance:
        for batch in batches[done:]:
            made = _batch(settings, engine, reward, problems, batch)
            append_jsonl(folder.samples, *made)
            rows += made
            advance(len(made))
    result = {**fixed, **summarise(settings.samples, problems, rows)}
    partial = folder.result.with_name(folder.result.name + ".partial")
    write_json(partial, result)
    os.replace(partial, folder.result)
    return result


def _model_path(model: str) -> str:
    run = RunFolder(Path(model))
    return str(BUILTIN_MODELS.get(model, run.model if run.is_run else model))


def _seed(settings: Settings, prompt: str, sample: int) -> int:
    digest = hashlib.sha256(f"{settings.seed}\n{sample}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _scores(
    name: str, reward: Reward, prompts: list[Any], drawn: Sequence[Completion], answers: list[str]
) -> Sequence[float | None]:
    """What a reward function gives, which may be the user's.

    Raises:
        UserError: it fails, or gives something else than a number or None for each completion.
    """
    texts = [completion.text for completion in drawn]
    try:
        scores = scores_of(reward, prompts, texts, [completion.ids for completion in drawn], answers)
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {name}: raised {type(error).__name__}: {error}") from error
    if not isinstance(scores, list) or len(scores) != len(texts):
        given = f"{len(scores)} scores" if isinstance(scores, list) else f"a {type(scores).__name__}"
        raise UserError(f"--reward {name}: returned {given} for {len(texts)} completions; expected a list of as many")
    for text, score in zip(texts, scores, strict=True):
        is_number = isinstance(score, (int, float)) and math.isfinite(score)
        if score is not None and not is_number:
            raise UserError(
                f"--reward {name}: returned {score!r} for {reprlib.repr(text)}; expected a finite number or None"
            )
    return scores


def _batch(
    settings: Settings,
    engine: Engine,
    reward: Reward,
    problems: Sequence[tuple[str, Problem]],
    batch: Sequence[tuple[int, int]],
) -> list[dict[str, Any]]:
    asked = [problems[index][1] for index, _ in batch]
    seeds = [_seed(settings, problems[index][1].prompt, sample) for index, sample in batch]
    prompts = [as_prompt(problem, engine.tokenizer) for problem in asked]
    drawn = engine.sample(prompts, seeds)
    texts, answers = [completion.text for completion in drawn], [problem.answer for problem in asked]
    stated = [STATED.get(settings.reward, canonical)(text) for text in texts]
    if isinstance(reward, MathGrader):
        statuses = [grade.status for grade in reward.grade(texts, answers)]
    else:
        scores = _scores(settings.reward, reward, prompts, drawn, answers)
        statuses = [
            "correct" if (score or 0) >= 1 else "no_answer" if score is None or vote is None else "wrong"
            for score, vote in zip(scores, stated, strict=True)
        ]
    return [
        {
            "problem": index,
            "sample": sample,
            "status": status,
            "stated": vote,
            "tokens": len(completion.ids),
            "truncated": completion.truncated,
            "completion": completion.text,
        }
        for (index, sample), completion, status, vote in zip(batch, drawn, statuses, stated, strict=True)
    ]
