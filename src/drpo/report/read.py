"""A run folder as data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from drpo.errors import UserError
from drpo.recipe import Recipe, load_recipe
from drpo.run import RunFolder, read_jsonl


@dataclass(frozen=True)
class RunData:
    """What a run wrote.

    Args:
        name: of its folder.
        metrics: a row an update.
        evaluations: a row a held-out evaluation.
        samples: a row a held-out completion.
        info: seed and versions.
        summary: empty while the run is not complete.
    """

    name: str
    recipe: Recipe
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    info: dict[str, Any]
    summary: dict[str, Any]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Rollouts and the values of a metric, at the last update of each at which it was measured."""
        by_rollout: dict[int, float] = {}
        for row in self.metrics:
            if isinstance(row.get(key), (int, float)):
                by_rollout[row["rollout"]] = row[key]
        return list(by_rollout), list(by_rollout.values())

    def histogram(self, key: str) -> list[int]:
        """The histogram of a metric over all updates."""
        return [sum(column) for column in zip(*(row[key] for row in self.metrics), strict=True)]


def read_run(folder: RunFolder) -> RunData:
    """Read a run folder, complete or not."""
    if not folder.is_run:
        raise UserError(f"{folder}: is not a run folder (it has no run.json and recipe.yaml)")
    try:
        return RunData(
            name=folder.path.resolve().name,
            recipe=load_recipe(folder.recipe),
            metrics=read_jsonl(folder.metrics),
            evaluations=read_jsonl(folder.evaluations),
            samples=read_jsonl(folder.samples),
            info=json.loads(folder.info.read_text(encoding="utf-8")),
            summary=json.loads(folder.summary.read_text(encoding="utf-8")) if folder.summary.is_file() else {},
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({error})") from error
