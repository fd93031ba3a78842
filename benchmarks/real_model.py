"""SmolLM2-135M-Instruct learns sums by the recipe smollm2-addition: held-out accuracy before and after, and its course.

The model is fetched from the hub; where there is none, SMOLLM2 names a folder that scripts/smollm2.py made. A few
minutes for each of three seeds on two idle cores.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import tables
from drpo.evaluation.statistics import estimate
from drpo.files import read_jsonl
from drpo.recipes import recipe_paths
from drpo.run.folder import RunFolder
from drpo.run.recipe import load_recipe
from drpo.run.train import train

PACKAGES = ("torch", "transformers", "trl")
SEEDS = (0, 1, 2)


def run(command: str) -> list[dict[str, Any]]:
    provenance = tables.provenance(command, PACKAGES)
    model = [f"model={folder}"] if (folder := os.environ.get("SMOLLM2")) else []
    rows = []
    for seed in SEEDS:
        recipe = load_recipe(recipe_paths()["smollm2-addition"], [*model, f"seed={seed}"])
        with tempfile.TemporaryDirectory() as scratch:
            run_folder = RunFolder(Path(scratch) / "run")
            summary = train(recipe, run_folder)
            evaluations, metrics = read_jsonl(run_folder.evaluations), read_jsonl(run_folder.metrics)
        rewards = {row["rollout"]: row["reward"] for row in metrics if row.get("reward") is not None}
        distances = {row["rollout"]: row["divergence/mean"] for row in metrics if "divergence/mean" in row}
        heldout = {row["rollout"]: row for row in evaluations}
        for rollout in range(recipe.rollouts + 1):
            row: dict[str, Any] = {"seed": seed, "rollout": rollout, "reward": rewards.get(rollout, "")}
            row |= {"divergence": distances.get(rollout, ""), "accuracy": "", "low": "", "high": "", "problems": ""}
            if rollout in heldout:
                correct = heldout[rollout]["correct"]  # of one completion a problem
                interval = estimate(correct)
                row |= {"accuracy": interval["mean"], "low": interval["low"], "high": interval["high"]}
                row["problems"] = len(correct)
            rounded = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
            rows.append({**rounded, "train_seconds": summary["train_seconds"], **provenance})
    return rows


def plot(rows: list[dict[str, str]]) -> Figure:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for seed in SEEDS:
        of_seed = [row for row in rows if int(row["seed"]) == seed]
        rewards = [(int(row["rollout"]), float(row["reward"])) for row in of_seed if row["reward"]]
        axes.plot(*zip(*rewards, strict=True), color=f"C{seed}", linewidth=1.2, alpha=0.7, label=f"reward, seed {seed}")
        heldout = [row for row in of_seed if row["accuracy"]]
        mean, low, high = ([float(row[name]) for row in heldout] for name in ("accuracy", "low", "high"))
        # Beside one another, so that no interval hides another.
        places = [int(row["rollout"]) + 0.15 * (seed - 1) for row in heldout]
        below, above = ([abs(a - b) for a, b in zip(mean, ends, strict=True)] for ends in (low, high))
        axes.errorbar(
            places, mean, yerr=[below, above], fmt="o", color=f"C{seed}", capsize=3, label=f"held out, seed {seed}"
        )
    axes.set(xlabel="rollouts", ylabel="share of sums that are right", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    return figure
