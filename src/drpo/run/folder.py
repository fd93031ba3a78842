"""The run folder: where a run's files are, how they are written and read."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drpo.errors import UserError
from drpo.files import (
    append_jsonl,
    iterate_jsonl,
    locked,
    read_jsonl,
    replace_jsonl,
    replace_text,
    versions,
    write_json,
)
from drpo.metrics.untrained import describe_untrained
from drpo.run.recipe import Recipe, dump_recipe, load_recipe

logger = logging.getLogger(__name__)

SAMPLES_KEPT = 50
"""Completions written to the run folder at each evaluation."""

_FIRST_FILES = {"run.lock", "run.partial.json", "run.json", "recipe.partial.yaml"}
"""Of a folder that is being made; a kill leaves some of them."""


def decisive_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that a run is resumed with as it began, in JSON: all but those that change no update."""
    from drpo.trainer.fingerprint import FREE_OPTIONS

    free = (*FREE_OPTIONS, "stop_on_collapse")
    fields = {name: value for name, value in recipe.model_dump(mode="json").items() if not name.startswith(free)}
    return fields | {"trainer": {name: value for name, value in recipe.trainer.items() if not name.startswith(free)}}


class RunFolder:
    """A folder that holds one run.

    ``recipe.yaml`` the resolved recipe · ``run.json`` versions and seed · ``metrics.jsonl`` a row
    an update · ``rollouts.jsonl`` a row a trained sequence, if recorded · ``evaluations.jsonl`` and ``samples.jsonl`` held-out accuracy and completions ·
    ``checkpoints/`` · ``model/`` the trained model · ``summary.json`` · ``report.html`` ·
    ``evaluations/`` what ``drpo eval`` measured afterwards.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.info = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.samples = path / "samples.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.evaluated = path / "evaluations"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_run(self) -> bool:
        try:
            return self.info.is_file() and self.recipe.is_file()
        except (OSError, ValueError):  # a name the system does not take
            return False

    def append_evaluation(
        self, where: Mapping[str, int], samples: Sequence[Mapping[str, Any]], samples_per_problem: int
    ) -> float:
        """Write an evaluation and the first of its samples.

        Args:
            where: the update and the rollout after which it was made.
            samples: with their rewards, those of a problem together.
            samples_per_problem: how many of each.

        Returns:
            The share of samples that are right.
        """
        is_right = [sample["reward"] >= 1 for sample in samples]
        accuracy = sum(is_right) / len(is_right)
        firsts = range(0, len(is_right), samples_per_problem)
        correct = [sum(is_right[first : first + samples_per_problem]) for first in firsts]
        row = {**where, "accuracy": accuracy, "completions": len(samples), "correct": correct}
        append_jsonl(self.evaluations, row)
        append_jsonl(self.samples, *({**where, **sample} for sample in samples[:SAMPLES_KEPT]))
        return accuracy

    @property
    def verl_settings(self) -> list[str] | None:
        """What verl's trainer was given beside the recipe; None of a run by TRL."""
        return json.loads(self.info.read_text(encoding="utf-8")).get("verl_settings") if self.is_run else None

    def check_free(self, overwrite: bool) -> None:
        """Refuse a path that a new run may not be written to."""
        try:
            self.path.lstat()
        except FileNotFoundError:
            ancestor = next(parent for parent in self.path.absolute().parents if parent.exists())
            if not (ancestor.is_dir() and os.access(ancestor, os.W_OK)):
                raise UserError(f"--output {self}: {ancestor} cannot be written to") from None
            return
        except (OSError, ValueError) as error:
            raise UserError(
                f"--output {self}: cannot be created ({getattr(error, 'strerror', None) or error})"
            ) from error
        if self.path.is_symlink():
            raise UserError(f"--output {self}: is a link; give the folder it points to")
        if not self.path.is_dir():
            raise UserError(f"--output {self}: is a file; expected a folder to create")
        if not any(child.name != "run.lock" for child in self.path.iterdir()):
            return
        if not overwrite:
            raise UserError(f"--output {self}: already exists; choose another, or give --resume or --overwrite")
        if not self.is_run and not {child.name for child in self.path.iterdir()} <= _FIRST_FILES:
            raise UserError(
                f"--output {self}: is not a run folder (it has no run.json); --overwrite replaces only runs"
            )

    def check_resumable(self) -> Recipe:
        """The recipe of a run that can be resumed."""
        # A report of a run needs no TRL.
        from drpo.trainer.checkpoint import checkpoints_in

        if not self.is_run:
            raise UserError(f"--output {self}: holds no run to resume")
        if self.summary.is_file():
            raise UserError(f"--output {self}: this run is complete; there is nothing to resume")
        # Where verl's are its own settings say.
        if self.verl_settings is None and not checkpoints_in(self.checkpoints):
            if others := sorted(self.checkpoints.glob("*")):
                raise UserError(f"--output {self}: holds no checkpoint of DRPOTrainer to resume from, but {others[-1]}")
            raise UserError(
                f"--output {self}: holds no checkpoint to resume from; expected a run from the start in another --output"
            )
        return load_recipe(self.recipe)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here; the folder is created if need be."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / "run.lock", f"--output {self}: another process is writing this run"):
            yield

    def create(self, recipe: Recipe, overwrite: bool = False, **more: Any) -> None:
        """Begin a run in the folder, in place of the one that was there if ``overwrite``.

        Args:
            more: what ``run.json`` says of it beside seed and versions.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.is_run and not overwrite:
            raise UserError(f"--output {self}: another process has begun a run there")
        # What makes the folder a run's stays until it is replaced, so that --overwrite can be repeated after a kill.
        self._clear()
        write_json(self.info, {"seed": recipe.seed, "versions": versions(), "platform": platform.platform(), **more})
        replace_text(self.recipe, dump_recipe(recipe))

    def discard(self) -> None:
        """Remove a run that ended before its first update was written or saved, and the folder if nothing else is in it."""
        if self.path.is_dir() and not self.metrics.is_file() and not any(self.checkpoints.glob("*")):
            self._clear()
            for file in (self.recipe, self.info):
                file.unlink(missing_ok=True)
            if all(child.name == "run.lock" for child in self.path.iterdir()):
                shutil.rmtree(self.path)

    def _clear(self) -> None:
        for folder in (self.checkpoints, self.model, self.evaluated):
            if folder.exists():
                shutil.rmtree(folder)
        for file in (self.metrics, self.rollouts, self.evaluations, self.samples, self.summary, self.report):
            file.unlink(missing_ok=True)

    def write_summary(self, recipe: Recipe, **more: Any) -> dict[str, Any]:
        """What became of a run, from the rows that it wrote, before an interruption too; written and returned.

        Args:
            more: what the rows do not tell.
        """
        metrics, evaluations = read_jsonl(self.metrics), read_jsonl(self.evaluations)
        last = metrics[-1]
        # Of the first update that has tokens; a resumed run may have made another.
        audited = next((row for row in metrics if "audit/logp_difference_mean" in row), None)
        summary = {
            "objective": recipe.objective.name,
            "objective_kwargs": dataclasses.asdict(recipe.objective.make()),
            "accuracy_before": next((row["accuracy"] for row in evaluations if row["update"] == 0), None),
            "accuracy_after": evaluations[-1]["accuracy"] if evaluations else None,
            "rollouts": last["rollout"],
            "updates": last["update"],
            "train_seconds": round(last["seconds"], 1),
            "seed": recipe.seed,
            "audit": audited
            and {"mean": audited["audit/logp_difference_mean"], "maximum": audited["audit/logp_difference_max"]},
            "untrained": describe_untrained(last),
            **more,
        }
        write_json(self.summary, summary)
        return summary

    def rewind(self, update: int) -> None:
        """Drop what was logged after an update, to continue from its checkpoint; say so if rows up to it are gone.

        Raises:
            UserError: a log is damaged.
        """
        for path in filter(Path.is_file, (self.metrics, self.rollouts, self.evaluations, self.samples)):
            try:
                replace_jsonl(path, (row for row in iterate_jsonl(path) if row["update"] <= update))
            except (KeyError, TypeError) as error:
                raise UserError(f"{path}: is damaged; expected the number of an update in each row") from error
        # A machine that lost power may have flushed a checkpoint and not what was appended before.
        rows = len({row["update"] for row in iterate_jsonl(self.metrics)})
        if rows < update:
            logger.warning("%s has rows of %d updates of %d; those of the others are lost.", self.metrics, rows, update)
