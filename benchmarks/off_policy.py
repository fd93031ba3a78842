"""What each cause of μ ≠ π looks like: runs of the built-in recipe that differ in one thing, and where their |π − μ| comes from.

One run a cause, 30 rollouts of 128 samples, with ``split_distance``. A row is the last update of a rollout.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import tables
from drpo.recipe import load_recipe
from drpo.run import RunFolder, read_jsonl
from drpo.train import train

ROLLOUTS = 30
CAUSES = {
    "4 updates a rollout": (),
    "16 updates a rollout": ("updates_per_rollout=16",),
    "samples 4 rollouts old": ("rollout_lag=4",),
    "rollout in bf16": ("rollout_precision=bf16",),
    "rollout in fp8": ("rollout_precision=fp8",),
    "top-p 0.9, replayed": ("trainer.top_p=0.9", "trainer.replay_support=true"),
}
"""What each run changes in the built-in recipe."""

MEASURED = {
    "engine/divergence/mean": "engine",
    "staleness/divergence/mean": "age of the samples",
    "drift/divergence/mean": "updates",
}
ALSO = ("divergence/mean", "divergence/p99", "rollout/age", "rollout/kept_mass", "regulariser/strength", "reward")
PACKAGES = ("torch", "torchao", "transformers", "trl")


def run(command: str) -> list[dict[str, Any]]:
    logging.disable()
    provenance = tables.provenance(command, PACKAGES)
    rows = []
    for cause, changes in CAUSES.items():
        fixed = ("heldout_problems=1", "trainer.split_distance=true", "audit_threshold=1.0", f"rollouts={ROLLOUTS}")
        with tempfile.TemporaryDirectory() as scratch:
            folder = RunFolder(Path(scratch) / "run")
            train(load_recipe(None, [*fixed, *changes]), folder)
            logged = read_jsonl(folder.metrics)
        # The last update of each rollout in which anything had a gradient.
        last = {row["rollout"]: row for row in logged if "divergence/mean" in row}
        for rollout, row in last.items():
            values = {name: f"{row[name]:.4g}" if name in row else "" for name in (*MEASURED, *ALSO)}
            rows.append({"cause": cause, "rollout": rollout, **values, **provenance})
    return rows


def plot(rows: list[dict[str, str]]) -> Figure:
    figure = Figure(figsize=(10.5, 6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, cause in zip(panels.flat, CAUSES, strict=True):
        chosen = [row for row in rows if row["cause"] == cause]
        for order, ((name, label), style) in enumerate(zip(MEASURED.items(), ("-", "--", ":"), strict=True)):
            # A logarithmic scale has no 0, which is what rounding leaves where a single token can be drawn.
            points = [(int(row["rollout"]), float(row[name])) for row in chosen if float(row[name] or 0)]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{order}", label=label, linewidth=1.8)
        axes.set_title(cause, fontsize=10)
        axes.set_yscale("log")
        axes.set_ylim(1e-9, 0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("|π − μ|, mean")
    for axes in panels[-1]:
        axes.set_xlabel("rollouts")
    return figure
