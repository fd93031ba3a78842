"""What another precision or engine does to μ and π: |π − μ| of the built-in model's own samples before any update.

One rollout of 64 prompts, 8 completions each, of the model as it comes, for each engine, precision of the rollout and
precision of training; the same for SEEDS seeds, whose range is given beside their mean. Quantiles are over the tokens
of a seed. vLLM is its CPU build, in the environment that make .venv-vllm/installed makes.
"""

from __future__ import annotations

import logging
import statistics
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure

from benchmarks import tables
from benchmarks.first_rollout import MODEL, first_rollout
from support.vllm_cpu.engine import DTYPES, Engine

SETTINGS = (
    *((rollout, "fp32") for rollout in ("fp32", "fp16", "bf16", "int8", "fp8", "mxfp8", "nvfp4")),
    *(("bf16", "bf16"), ("fp8", "fp8")),
)
"""Precisions of the rollout and of training, where Transformers samples."""

BY_VLLM = (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))
"""The same where vLLM does."""

SEEDS = 5
PACKAGES = ("torch", "torchao", "transformers", "trl")


def gaps(seed: int, **settings: Any) -> dict[str, float]:
    """Statistics of |π − μ| and |log π − log μ| over one rollout."""
    return gaps_of(first_rollout(seed, audit_threshold=100.0, **settings)[1])


def gaps_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The same of a rollout's rows."""
    logp, behavior_logp = (
        torch.tensor([value for row in rows for value in row[name]], dtype=torch.float64)
        for name in ("logp", "behavior_logp")
    )
    distance, log_ratio = (logp.exp() - behavior_logp.exp()).abs(), (logp - behavior_logp).abs()
    return {
        "tokens": len(logp),
        "mean": distance.mean().item(),
        "p99": distance.quantile(0.99).item(),
        "max": distance.max().item(),
        "log_ratio_mean": log_ratio.mean().item(),
        "log_ratio_p99": log_ratio.quantile(0.99).item(),
    }


def run(command: str) -> list[dict[str, Any]]:
    logging.disable()
    transformers.utils.logging.disable_progress_bar()
    provenance = tables.provenance(command, PACKAGES)
    rows = [
        _row("Transformers", rollout, train, rollout_precision=rollout, train_precision=train)
        for rollout, train in SETTINGS
    ]
    for rollout, train in BY_VLLM:
        with Engine(MODEL, DTYPES[rollout]) as engine:
            name = f"vLLM {engine.version}"
            rows.append(_row(name, rollout, train, rollout_func=engine.rollout, train_precision=train))
    return [row | provenance for row in rows]


def _row(engine: str, rollout: str, train: str, **settings: Any) -> dict[str, Any]:
    of_seeds = [gaps(seed, **settings) for seed in range(SEEDS)]
    return {"engine": engine, "rollout": rollout, "train": train, "seeds": SEEDS, **summary(of_seeds)}


def summary(of_seeds: list[dict[str, float]]) -> dict[str, Any]:
    """The tokens of all seeds, and mean and range over seeds of everything else."""
    columns = {name: [values[name] for values in of_seeds] for name in of_seeds[0]}
    row: dict[str, Any] = {"tokens": sum(columns.pop("tokens"))}
    for name, values in columns.items():
        row[name] = f"{statistics.fmean(values):.3g}"
        row[f"{name}_range"] = f"{min(values):.3g} to {max(values):.3g}"
    return row


def plot(rows: list[dict[str, str]]) -> Figure:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    for offset, name, label in ((-0.2, "mean", "mean"), (0.2, "p99", "99 % quantile")):
        middle = [float(row[name]) for row in rows]
        ends = [[float(end) for end in row[f"{name}_range"].split(" to ")] for row in rows]
        spread = [
            [value - low for value, (low, _) in zip(middle, ends, strict=True)],
            [high - value for value, (_, high) in zip(middle, ends, strict=True)],
        ]
        axes.bar([place + offset for place in places], middle, 0.38, yerr=spread, capsize=3, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("|π − μ| before any update")
    axes.set_xticks(list(places), [_label(row) for row in rows], fontsize=8)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _label(row: dict[str, str]) -> str:
    return f"{row['engine']}\n{row['rollout']} rollout\n{row['train']} training"
