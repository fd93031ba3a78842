"""``drpo train --engine verl``: verl's own trainer on a recipe, with the run folder that ``drpo report`` reads."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from transformers import AutoTokenizer

from drpo.data.problems import BUILTIN_MODELS, Problem, tokenize_prompt
from drpo.errors import UserError
from drpo.files import append_jsonl, read_jsonl
from drpo.integrations.verl.hydra import compose_main_ppo
from drpo.integrations.verl.metrics import HISTOGRAMS
from drpo.integrations.verl.overrides import as_arguments, overrides
from drpo.integrations.verl.problems import write_rows
from drpo.redact import find_secret
from drpo.run.build import load_problems
from drpo.run.folder import SAMPLES_KEPT, RunFolder
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
    for setting in more:
        if find_secret([setting]):
            raise UserError(
                f"--verl {setting}: holds a secret, which would be written to the run folder; expected it in the environment"
            )
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
    return Plan(recipe, folder, problems, heldout, arguments, compose_main_ppo(arguments, more))


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
        _collect(recipe, folder)
        if code or not folder.metrics.is_file():
            raise VerlError(f"verl stopped with exit code {code}; see {own / 'output.log'}")
        if model := _last_model(folder):
            shutil.copytree(model, folder.model, dirs_exist_ok=True)
        return folder.write_summary(recipe, engine="verl")


def run_to_its_end(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> int:
    """The exit code of a program that does not outlive this one: who asks this one to stop (SIGTERM) asks that one."""
    with subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            process.terminate()


def _collect(recipe: Recipe, folder: RunFolder) -> None:
    """Write what verl has logged as rows of the run folder."""
    own, updates = folder.path / "verl", recipe.updates_per_rollout
    seconds = 0.0
    for logged in read_jsonl(own / "log.jsonl"):
        rollout, data = logged["step"], logged["data"]
        # The evaluation before the first rollout has a row of its own.
        if "actor/grad_norm" not in data:
            continue
        seconds += data["timing_s/step"]
        where = {"update": rollout * updates, "rollout": rollout, "seconds": seconds}
        append_jsonl(folder.metrics, {**where, **_row(data, updates)})
    for path in sorted((own / "validation").glob("*.jsonl"), key=lambda path: int(path.stem)):
        rollout = int(path.stem)
        where = {"update": rollout * updates, "rollout": rollout}
        rows = [
            {
                **where,
                "prompt": sample["input"],
                "answer": sample["gts"],
                "completion": sample["output"],
                "reward": sample["score"],
            }
            for sample in read_jsonl(path)
        ]
        accuracy = sum(row["reward"] >= 1 for row in rows) / len(rows)
        append_jsonl(folder.evaluations, {**where, "accuracy": accuracy, "completions": len(rows)})
        append_jsonl(folder.samples, *rows[:SAMPLES_KEPT])


def _row(data: dict[str, Any], updates: int) -> dict[str, Any]:
    """verl's metrics of a rollout under the names that DRPOTrainer's have; histograms count the tokens of all its updates."""
    row: dict[str, Any] = {}
    for name, value in data.items():
        inner = name.removeprefix("actor/")
        histogram, _, index = inner.partition("/")
        if name in _NAMES:
            row[_NAMES[name]] = value
        elif histogram in HISTOGRAMS:
            row.setdefault(histogram, [0] * HISTOGRAMS[histogram])[int(index)] = round(value * updates)
        elif name.startswith("actor/"):
            row[inner] = value
        else:
            row[f"verl/{name}"] = value
    return row


def _last_model(folder: RunFolder) -> Path | None:
    models = folder.checkpoints.glob("global_step_*/actor/huggingface")
    return max(models, key=lambda path: int(path.parts[-3].removeprefix("global_step_")), default=None)
