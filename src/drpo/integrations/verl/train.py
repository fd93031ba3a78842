"""``drpo train --engine verl``: verl's own trainer on a recipe, with the run folder that ``drpo report`` reads."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from transformers import AutoTokenizer

from drpo.data.problems import BUILTIN_MODELS, Problem, tokenize_prompt
from drpo.errors import UserError
from drpo.files import append_jsonl, read_jsonl, write_json
from drpo.integrations.verl.hydra import of_main_ppo
from drpo.integrations.verl.metrics import HISTOGRAMS
from drpo.integrations.verl.overrides import as_arguments, overrides
from drpo.integrations.verl.problems import write_rows
from drpo.run.build import load_problems
from drpo.run.folder import RunFolder
from drpo.run.recipe import Recipe

_NAMES = {
    "critic/score/mean": "reward",
    "actor/loss": "loss",
    "actor/grad_norm": "grad_norm",
    "actor/lr": "learning_rate",
}
"""Of DRPOTrainer's, for what verl calls otherwise."""


class VerlError(Exception):
    """verl's trainer has failed; the message says where its own words are."""


@dataclass(frozen=True)
class Plan:
    """A recipe as a run of verl's trainer, of which nothing has been written.

    Args:
        arguments: of ``main_ppo``.
        config: what verl composes of them.
    """

    recipe: Recipe
    folder: RunFolder
    problems: Sequence[Problem]
    heldout: Sequence[Problem]
    arguments: Sequence[str]
    config: Any


def plan(recipe: Recipe, folder: RunFolder, more: Sequence[str] = ()) -> Plan:
    """What verl would be started with.

    Args:
        recipe: the run.
        folder: where everything will go; verl's own output to ``verl/`` in it.
        more: overrides for verl, which win over what follows from the recipe.

    Raises:
        UserError: something that verl would not do as the recipe says.
    """
    # verl's workers load it again, long after the folder is there.
    recipe.make_reward()
    problems = load_problems(recipe, "train", recipe.rollouts * recipe.prompts_per_rollout)
    heldout = load_problems(recipe, "heldout", recipe.heldout_problems)
    if not heldout:
        raise UserError("task.heldout: is missing; verl's trainer needs held-out problems")
    source = str(BUILTIN_MODELS.get(recipe.model, recipe.model))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a damaged folder fails in as many ways as there are files in it
        raise UserError(f"model: {recipe.model} has no tokenizer that can be loaded ({error})") from error
    # verl cuts what is longer, held-out prompts too.
    longest = max(len(tokenize_prompt(problem, tokenizer)) for problem in (*problems, *heldout))
    settings = overrides(recipe, folder.path.absolute(), len(problems), longest, plain=not tokenizer.chat_template)
    arguments = as_arguments(settings, more)
    return Plan(recipe, folder, problems, heldout, arguments, of_main_ppo(arguments, more))


def train(planned: Plan, *, overwrite: bool = False) -> dict[str, Any]:
    """Start ``python -m verl.trainer.main_ppo`` and return the run's summary.

    Raises:
        VerlError: verl stopped before the end.
    """
    recipe, folder = planned.recipe, planned.folder
    with folder.locked():
        folder.create(recipe, overwrite)
        own = folder.path.absolute() / "verl"
        if own.exists():
            shutil.rmtree(own)
        write_rows(planned.problems, own / "train.jsonl", "train")
        write_rows(planned.heldout, own / "heldout.jsonl", "heldout")
        (own / "overrides.txt").write_text("\n".join(planned.arguments) + "\n", encoding="utf-8")
        with (own / "output.log").open("wb") as output:
            code = run_to_its_end(
                [sys.executable, "-m", "verl.trainer.main_ppo", *planned.arguments],
                os.environ | {"VERL_FILE_LOGGER_PATH": str(own / "log.jsonl")},
                output,
            )
        summary = _collect(recipe, folder)
        if code:
            raise VerlError(f"verl stopped with exit code {code}; see {own / 'output.log'}")
        if model := _last_model(folder):
            shutil.copytree(model, folder.model, dirs_exist_ok=True)
        write_json(folder.summary, summary)
    return summary


def run_to_its_end(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> int:
    """The exit code of a program that does not outlive this one: who asks this one to stop (SIGTERM) asks that one."""
    with subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            process.terminate()


def _collect(recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    """Write what verl has logged as rows of the run folder; returns the summary."""
    logged = read_jsonl(folder.path / "verl" / "log.jsonl")
    steps = [(row["step"], row["data"]) for row in logged]
    trained = [(step, data) for step, data in steps if "actor/grad_norm" in data]
    updates = recipe.updates_per_rollout
    for (step, data), seconds in zip(trained, accumulate(d["timing_s/step"] for _, d in trained), strict=True):
        append_jsonl(
            folder.metrics, {"update": step * updates, "rollout": step, "seconds": seconds, **_row(data, updates)}
        )
    accuracies = []
    for step, samples in _validated(folder):
        rows = [
            {
                "update": step * updates,
                "rollout": step,
                "prompt": sample["input"],
                "answer": sample["gts"],
                "completion": sample["output"],
                "reward": sample["score"],
            }
            for sample in samples
        ]
        accuracies.append(sum(row["reward"] >= 1 for row in rows) / len(rows))
        append_jsonl(
            folder.evaluations,
            {"update": step * updates, "rollout": step, "accuracy": accuracies[-1], "completions": len(rows)},
        )
        append_jsonl(folder.samples, *rows[:50])
    return {
        "engine": "verl",
        "objective": recipe.objective.name,
        "objective_kwargs": dataclasses.asdict(recipe.objective.make()),
        "accuracy_before": accuracies[0] if accuracies else None,
        "accuracy_after": accuracies[-1] if accuracies else None,
        "rollouts": len(trained),
        "updates": len(trained) * updates,
        "train_seconds": round(sum(data["timing_s/step"] for _, data in trained), 1),
        "seed": recipe.seed,
    }


def _row(data: dict[str, Any], updates: int) -> dict[str, Any]:
    """verl's metrics of a rollout under the names that DRPOTrainer's have; histograms count the tokens of all its updates."""
    row: dict[str, Any] = {}
    for name, value in data.items():
        inner = name.removeprefix("actor/")
        if name in _NAMES:
            row[_NAMES[name]] = value
        elif inner.split("/")[0] in HISTOGRAMS:
            histogram = inner.split("/")[0]
            row.setdefault(histogram, [0] * HISTOGRAMS[histogram])[int(inner.split("/")[1])] = round(value * updates)
        elif name.startswith("actor/"):
            row[inner] = value
        else:
            row[f"verl/{name}"] = value
    return row


def _validated(folder: RunFolder) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The held-out completions that verl has written, by rollout."""
    files = (folder.path / "verl" / "validation").glob("*.jsonl")
    for path in sorted(files, key=lambda path: int(path.stem)):
        yield int(path.stem), [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _last_model(folder: RunFolder) -> Path | None:
    found = folder.checkpoints.glob("global_step_*/actor/huggingface")
    return max(found, key=lambda path: int(path.parts[-3].removeprefix("global_step_")), default=None)
