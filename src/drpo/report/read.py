"""A run folder as data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypedDict

from drpo.errors import UserError
from drpo.evaluation.statistics import Estimate, estimate
from drpo.files import iterate_jsonl, read_jsonl
from drpo.metrics.histograms import LOGGED_BINS
from drpo.objectives import Objective
from drpo.report.tokens import TrainedTokens, read_trained_tokens
from drpo.run.folder import RunFolder
from drpo.run.recipe import Recipe, load_recipe


class Evaluation(TypedDict):
    """A held-out evaluation.

    Args:
        rollout: after which it was made.
        accuracy: share of right completions, with its interval over problems.
        problems: how many there were.
        completions: of all problems together.
    """

    rollout: int
    accuracy: Estimate
    problems: int
    completions: int


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run wrote.

    Args:
        name: of its folder.
        recipe: None of a log that has none.
        metrics: a row an update.
        evaluations: the held-out evaluations.
        samples: a row a held-out completion.
        trained: what the objective did to the tokens trained on, if rollouts were recorded.
        info: seed and versions.
        summary: empty while the run is not complete.
        measured: what ``drpo eval`` found afterwards, by the name of its folder.
    """

    name: str
    recipe: Recipe | None
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]
    samples: list[dict[str, Any]]
    trained: TrainedTokens
    info: dict[str, Any]
    summary: dict[str, Any]
    measured: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def objective(self) -> Objective | None:
        return self.recipe and self.recipe.objective.make()

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Rollouts and the values of a metric, at the last update of each at which it was measured."""
        by_rollout: dict[int, float] = {}
        for row in self.metrics:
            if isinstance(row.get(key), (int, float)):
                by_rollout[row["rollout"]] = row[key]
        return list(by_rollout), list(by_rollout.values())

    def histogram(self, key: str) -> list[int]:
        """The histogram of a metric over all updates; empty where none logged it."""
        return [sum(column) for column in zip(*(row[key] for row in self.metrics if key in row), strict=True)]


def read_run(folder: RunFolder) -> RunData:
    """Read a run folder, complete or not."""
    if not folder.is_run:
        raise UserError(f"{folder}: is not a run folder (it has no run.json and recipe.yaml)")
    try:
        return RunData(
            name=folder.path.resolve().name,
            recipe=load_recipe(folder.recipe),
            metrics=_rows(folder.metrics, update=int, rollout=int),
            evaluations=_evaluations(folder.evaluations),
            samples=_rows(folder.samples, rollout=int, prompt=str, completion=str, answer=str),
            trained=read_trained_tokens(iterate_jsonl(folder.rollouts)),
            info=_object(folder.info),
            summary=_object(folder.summary) if folder.summary.is_file() else {},
            measured={path.parent.name: _measured(path) for path in sorted(folder.evaluated.glob("*/evaluation.json"))},
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({error})") from error


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is a {type(value).__name__}; expected an object")
    return value


def _measured(path: Path) -> dict[str, Any]:
    found = _object(path)
    estimates = [found.get("average"), found.get("majority"), *(found.get("pass_at") or {}).values()]
    for statistic in estimates:
        if not (
            isinstance(statistic, dict) and all(isinstance(statistic.get(k), float) for k in ("mean", "low", "high"))
        ):
            raise ValueError(f"{path.parent.name}/{path.name}: expected average, majority and pass_at, with intervals")
    return found


def _evaluations(path: Path) -> list[Evaluation]:
    evaluations: list[Evaluation] = []
    for number, row in enumerate(_rows(path, rollout=int, completions=int, correct=list), 1):
        correct, completions = row["correct"], row["completions"]
        if not correct or not all(isinstance(count, int) for count in correct) or completions < 1:
            raise ValueError(f"{path.name}, row {number}: expected correct with the right completions of each problem")
        accuracy = estimate([count * len(correct) / completions for count in correct])
        evaluations.append(
            {"rollout": row["rollout"], "accuracy": accuracy, "problems": len(correct), "completions": completions}
        )
    return evaluations


def _rows(path: Path, **fields: type) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        for field, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise ValueError(f"{path.name}, row {number}: expected an object with {field}, a {kind.__name__}")
        for name, bins in LOGGED_BINS.items():
            if name in row and not (isinstance(row[name], list) and len(row[name]) == bins):
                raise ValueError(
                    f"{path.name}, row {number}: {name} is not a list of {bins} bins, which this version writes"
                )
    return rows
