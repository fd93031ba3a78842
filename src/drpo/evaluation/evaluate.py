"""A model on a set of problems, K samples each: what ``drpo eval`` does, from the first sample to the JSON."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from drpo.data.files import read_problems
from drpo.data.problems import BUILTIN_MODELS, BUILTIN_TASKS, Problem, as_prompt, builtin_problems, tokenize_prompt
from drpo.evaluation.engines import ENGINES, Engine
from drpo.evaluation.folder import EvaluationFolder
from drpo.evaluation.settings import Settings
from drpo.evaluation.summary import summarise
from drpo.files import append_jsonl, versions, write_json
from drpo.rewards import MathGrader, Reward, checked_scores, load_reward, scores_of
from drpo.rewards.answers import canonical
from drpo.rewards.exact import gsm8k_answer, last_item
from drpo.run.folder import RunFolder
from drpo.run.progress import counting
from drpo.run.recipe import Recipe, load_recipe

STATED: dict[str, Callable[[str], str | None]] = {"exact_answer": last_item, "gsm8k": gsm8k_answer}
"""How the votes of majority@k are read, by reward; by what is boxed or follows ``Answer:`` for all others."""


def load(settings: Settings) -> list[Problem]:
    """Load the problems; the source of each is its file's stem, or the file's whole name where two have the same stem.

    Raises:
        UserError: a file that cannot be read, or that holds something else than problems.
    """
    problems: list[Problem] = []
    stems = Counter(Path(source).stem for source in settings.data)
    for source in settings.data:
        if source in BUILTIN_TASKS:
            loaded = builtin_problems("heldout", settings.problems or 250, 0, source)
        else:
            loaded = read_problems(Path(source), template=settings.template or "{prompt}")
        name = Path(source).stem if stems[Path(source).stem] == 1 else source
        problems += [replace(problem, source=name) for problem in loaded[: settings.problems]]
    return problems


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
    run = RunFolder(Path(settings.model))
    is_run = settings.model not in BUILTIN_MODELS and run.is_run
    recipe = _recipe_of(settings.asked_as or (settings.model if is_run else None))
    settings = _as_trained(settings, recipe)
    problems = load(settings)
    digest = hashlib.sha256(json.dumps([problem.as_row() for problem in problems]).encode()).hexdigest()
    fixed = json.loads(json.dumps({**asdict(settings), "data_sha256": digest, "versions": versions()}))
    order = [(index, sample) for index in range(len(problems)) for sample in range(settings.samples)]
    # The engine is loaded first: a model that cannot be leaves no folder behind.
    model = str(BUILTIN_MODELS.get(settings.model, run.model if is_run else settings.model))
    engine = ENGINES[settings.engine](model, settings.max_tokens, settings.temperature, settings.precision)
    if recipe is not None:
        engine.ask_as(recipe.task)
    fixed["engine_description"] = engine.description
    with folder.locked():
        rows = folder.open(fixed, order, resume=resume, overwrite=overwrite)
        # A batch cut short by an interruption is drawn again as a whole: its shape is part of its arithmetic.
        whole = len(rows) // settings.batch_size * settings.batch_size
        rows = rows[: whole if len(rows) < len(order) else len(order)]
        folder.rewrite(rows)
        with counting("evaluating", "completions", total=len(order), done=len(rows)) as advance:
            for start in range(len(rows), len(order), settings.batch_size):
                batch = order[start : start + settings.batch_size]
                scored = _sample_batch(settings, engine, reward, problems, batch)
                append_jsonl(folder.samples, *scored)
                rows += scored
                advance(len(scored))
        result = {**fixed, **summarise(settings.samples, problems, rows)}
        write_json(folder.result, result)
    return result


def _recipe_of(source: str | None) -> Recipe | None:
    """The recipe of a run folder, in a file or of a name; that of nothing is None."""
    if source is None:
        return None
    run = RunFolder(Path(source))
    return load_recipe(run.recipe if run.is_run else Path(source))


def _as_trained(settings: Settings, recipe: Recipe | None) -> Settings:
    """The settings, in which what is left open is as it was when the model was trained."""
    template, template_kwargs = settings.template, settings.chat_template_kwargs
    if template is None:
        template = recipe.task.template if recipe else "{prompt}"
    if template_kwargs is None:
        template_kwargs = recipe.trainer.get("chat_template_kwargs") if recipe else None
        # TRL takes a mapping, or JSON.
        template_kwargs = json.loads(template_kwargs) if isinstance(template_kwargs, str) else template_kwargs or {}
    of_recipe = {"chat_template": recipe.task.chat_template, "stop": recipe.task.stop} if recipe else {}
    return replace(settings, template=template, chat_template_kwargs=template_kwargs, **of_recipe)


def _seed(settings: Settings, prompt: str, sample: int) -> int:
    digest = hashlib.sha256(f"{settings.seed}\n{sample}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _sample_batch(
    settings: Settings,
    engine: Engine,
    reward: Reward,
    problems: Sequence[Problem],
    order: Sequence[tuple[int, int]],
) -> list[dict[str, Any]]:
    """A row for each index of a problem and number of a sample in ``order``."""
    batch = [problems[index] for index, _ in order]
    options = settings.chat_template_kwargs or {}
    completions = engine.sample(
        [tokenize_prompt(problem, engine.tokenizer, **options) for problem in batch],
        [_seed(settings, problem.prompt, sample) for problem, (_, sample) in zip(batch, order, strict=True)],
    )
    texts, answers = [completion.text for completion in completions], [problem.answer for problem in batch]
    stated = [STATED.get(settings.reward, canonical)(text) for text in texts]
    if isinstance(reward, MathGrader):
        statuses = [grade.status for grade in reward.grade(texts, answers)]
    else:
        prompts = [as_prompt(problem, engine.tokenizer) for problem in batch]
        ids = [completion.ids for completion in completions]
        scores = scores_of(checked_scores(reward), prompts, texts, ids, answers)
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
        for (index, sample), completion, status, vote in zip(order, completions, statuses, stated, strict=True)
    ]
