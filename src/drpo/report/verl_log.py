"""What verl logs, under the names that DRPOTrainer's metrics have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from drpo.errors import UserError
from drpo.files import read_jsonl
from drpo.metrics.histograms import LOGGED_BINS
from drpo.report.read import RunData
from drpo.report.tokens import read_trained_tokens

LARGEST_STEP = 2**53
"""A browser has no greater whole number."""

_NAMES = {
    "critic/score/mean": "reward",
    "actor/loss": "loss",
    "actor/grad_norm": "grad_norm",
    "actor/lr": "learning_rate",
}
"""Of DRPOTrainer's, for what verl calls otherwise."""


def rename_metrics(data: dict[str, Any], updates: int = 1) -> dict[str, Any]:
    """verl's metrics of a rollout under the names that DRPOTrainer's have.

    Args:
        data: what verl gave its loggers.
        updates: on the rollout; the histograms, of which verl logs the mean, then count the tokens of all of them.

    Raises:
        ValueError: a histogram of another version.
    """
    row: dict[str, Any] = {}
    for name, value in data.items():
        # A number that is none is logged as null.
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            continue
        inner = name.removeprefix("actor/")
        histogram, _, index = inner.partition("/")
        if name in _NAMES:
            row[_NAMES[name]] = value
        elif histogram in LOGGED_BINS:
            if not (index.isdecimal() and int(index) < LOGGED_BINS[histogram]):
                raise ValueError(f"{name} is no bin; expected {LOGGED_BINS[histogram]} of them, as this version logs")
            row.setdefault(histogram, [0] * LOGGED_BINS[histogram])[int(index)] = round(value * updates)
        elif name.startswith("actor/"):
            row[inner] = value
        else:
            row[f"verl/{name}"] = value
    return row


def read_verl_log(path: Path) -> RunData:
    """The log of a run of verl's ``main_ppo``, which its logger ``file`` writes.

    Raises:
        UserError: the file is another.
    """
    metrics: list[dict[str, Any]] = []
    for number, row in enumerate(read_jsonl(path), 1):
        step, data = row.get("step"), row.get("data")
        if type(step) is not int or not 0 <= step < LARGEST_STEP or not isinstance(data, dict):
            raise UserError(f"{path}, row {number}: has no step and data; expected a log of verl's logger file")
        try:
            metrics.append({"update": step, "rollout": step, **rename_metrics(data)})
        except ValueError as error:
            raise UserError(f"{path}, row {number}: {error}") from error
    if not metrics:
        raise UserError(f"{path}: has no rows; expected a log of verl's logger file")
    seconds = sum(row.get("verl/timing_s/step", 0.0) for row in metrics)
    return RunData(
        # As verl calls it, PROJECT/EXPERIMENT: runs of one experiment in several projects are told apart.
        name=f"{path.resolve().parent.name}/{path.stem}",
        recipe=None,
        metrics=metrics,
        evaluations=[],
        samples=[],
        trained=read_trained_tokens(()),
        info={"engine": {"verl": None}},
        summary={"train_seconds": round(seconds, 1)},
    )
