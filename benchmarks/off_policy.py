"""What each cause of μ ≠ π looks like: runs of the built-in recipe that differ in one thing, and where their |π − μ| comes from.

One run a cause, 30 rollouts of 128 samples, with ``split_distance``. A row is the last update of a rollout. vLLM is its
CPU build, in the environment that make .venv-vllm/installed makes.
"""

from __future__ import annotations

import logging
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import tables
from benchmarks.first_rollout import MODEL
from drpo.files import read_jsonl
from drpo.run.folder import RunFolder
from drpo.run.recipe import load_recipe
from drpo.run.train import train
from support.vllm_cpu.engine import Engine

ROLLOUTS = 30


@dataclass(frozen=True)
class Cause:
    """What a run changes: settings of the recipe, or vLLM as its engine, with these options."""

    settings: tuple[str, ...] = ()
    vllm: dict[str, Any] | None = None


CAUSES = {
    "4 updates a rollout": Cause(),
    "16 updates a rollout": Cause(("updates_per_rollout=16",)),
    "samples 4 rollouts old": Cause(("rollout_lag=4",)),
    "rollout in bf16": Cause(("rollout_precision=bf16",)),
    "rollout in fp8": Cause(("rollout_precision=fp8",)),
    "top-p 0.9, replayed": Cause(("trainer.top_p=0.9", "trainer.replay_support=true")),
    "vLLM in fp32": Cause(vllm={"dtype": "float32"}),
    "vLLM in bf16": Cause(vllm={"dtype": "bfloat16"}),
    "vLLM that gets no new weights": Cause(("trainer.stale_sampler=warn",), vllm={"dtype": "float32", "syncs": False}),
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
    for name, cause in CAUSES.items():
        fixed = ("heldout_problems=1", "trainer.split_distance=true", "audit_threshold=1.0", f"rollouts={ROLLOUTS}")
        started = nullcontext() if cause.vllm is None else Engine(MODEL, **cause.vllm)
        with tempfile.TemporaryDirectory() as scratch, started as engine:
            folder = RunFolder(Path(scratch) / "run")
            train(load_recipe(None, [*fixed, *cause.settings]), folder, rollout_func=engine and engine.rollout)
            sampler = f"vLLM {engine.version}" if engine else "Transformers"
            logged = read_jsonl(folder.metrics)
        # The last update of each rollout in which anything had a gradient.
        last = {row["rollout"]: row for row in logged if "divergence/mean" in row}
        for rollout, row in last.items():
            values = {metric: f"{row[metric]:.4g}" if metric in row else "" for metric in (*MEASURED, *ALSO)}
            rows.append({"cause": name, "engine": sampler, "rollout": rollout, **values, **provenance})
    return rows


def plot(rows: list[dict[str, str]]) -> Figure:
    figure = Figure(figsize=(10.5, 8.6), layout="constrained")
    panels = figure.subplots(3, 3, sharex=True, sharey=True)
    for axes, cause in zip(panels.flat, CAUSES, strict=True):
        chosen = [row for row in rows if row["cause"] == cause]
        for order, ((name, label), style) in enumerate(zip(MEASURED.items(), ("-", "--", ":"), strict=True)):
            # A logarithmic scale has no 0, which is what rounding leaves where a single token can be drawn.
            points = [(int(row["rollout"]), float(row[name])) for row in chosen if float(row[name] or 0)]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{order}", label=label, linewidth=1.8)
        axes.set_title(cause, fontsize=10)
        axes.set_yscale("log")
        axes.set_ylim(1e-9, 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("|π − μ|, mean")
    for axes in panels[-1]:
        axes.set_xlabel("rollouts")
    return figure
