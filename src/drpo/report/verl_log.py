"""What verl logs, under the names that DRPOTrainer's metrics have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drpo.errors import UserError
from drpo.files import read_jsonl
from drpo.metrics.histograms import LOGGED_BINS
from drpo.report.read import RunData
from drpo.report.tokens import read_trained_tokens

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
    """
    row: dict[str, Any] = {}
    for name, value in data.items():
        inner = name.removeprefix("actor/")
        histogram, _, index = inner.partition("/")
        if name in _NAMES:
            row[_NAMES[name]] = value
        elif histogram in LOGGED_BINS:
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
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a run folder, or a log of verl's logger file")
    metrics: list[dict[str, Any]] = []
    for number, row in enumerate(read_jsonl(path), 1):
        if not (isinstance(row.get("step"), int) and isinstance(row.get("data"), dict)):
            raise UserError(f"{path}, row {number}: has no step and data; expected a log of verl's logger file")
        metrics.append({"update": row["step"], "rollout": row["step"], **rename_metrics(row["data"])})
    seconds = sum(row.get("verl/timing_s/step", 0.0) for row in metrics)
    return RunData(
        name=path.stem,
        recipe=None,
        metrics=metrics,
        evaluations=[],
        samples=[],
        trained=read_trained_tokens(()),
        info={"engine": {"verl": None}},
        summary={"train_seconds": round(seconds, 1)},
    )
