"""The training phase of DRPOTrainer against TRL's GRPOTrainer on the same rollouts, by the tokens of prompts and completions.

Four groups of eight completions, all as long as one another and with an advantage, and four updates: what is saved is
the prompt that a group shares, the head, and the pass that scores a rollout once more. Models: the built-in one, in FP32;
and SmolLM2-135M in BF16, from the folder that SMOLLM2 names, once, since TRL's longest case takes minutes.
"""

from __future__ import annotations

import os
from typing import Any

from matplotlib.figure import Figure

from benchmarks.training_phase import Setting, Size, compare
from drpo.data.problems import BUILTIN_MODELS

PROMPTS, COMPLETIONS = (40, 200, 1000), (4, 64, 256)
KINDS = ("TRL", "drpo")


def run(command: str) -> list[dict[str, Any]]:
    models: dict[str, tuple[str, int, bool, int]] = {"built-in": (str(BUILTIN_MODELS["arithmetic"]), 99, False, 3)}
    if folder := os.environ.get("SMOLLM2"):
        models["SmolLM2-135M"] = (folder, 49_152, True, 1)
    rows = []
    for name, (source, vocabulary, bf16, rounds) in models.items():
        settings = [
            Setting(Size(source, vocabulary, 4, 8, 8, completion, prompt, bf16), 0.0, "flat")
            for prompt in PROMPTS
            for completion in COMPLETIONS
        ]
        rows += [{"model": name, **row} for row in compare(settings, rounds, command, KINDS)]
    return rows


def plot(rows: list[dict[str, str]]) -> Figure:
    """How many times faster than TRL's trainer, by the tokens of a prompt, a line for each length of completions."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    models = list(dict.fromkeys(row["model"] for row in rows))
    for axis, model in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True):
        for completion, style in zip(COMPLETIONS, ("o-", "s--", "^:"), strict=True):
            line = [
                row
                for row in rows
                if (row["model"], row["trainer"], row["longest"]) == (model, "drpo", str(completion))
            ]
            axis.plot(
                [int(row["prompt"]) for row in line],
                [float(row["times_faster_than_trl"]) for row in line],
                style,
                label=f"completions of {completion}",
            )
        axis.set(title=model, xlabel="tokens of a prompt", xscale="log", xticks=PROMPTS, xticklabels=map(str, PROMPTS))
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].set_ylabel("times faster than TRL")
    figure.axes[0].legend(frameon=False)
    return figure
