"""The gradient weight of objectives as a picture: against the ratio, and against |π − μ|, for tokens more and less rare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from drpo.objectives import SYMBOLS, Objective
from drpo.tokens import TokenBatch, TopK

BEHAVIOR_PROBS = (0.5, 0.1, 0.01, 0.001)
"""The μ that are drawn."""

LARGEST = 5.0
"""Weights are drawn up to ±this; how far they go beyond is written."""

# Each line is thinner and darker than the one it may lie on, so that all are seen, without colour too.
_STYLES = (
    {"color": "#C8C8C8", "linewidth": 6.5},
    {"color": "#E69F00", "linewidth": 4.0},
    {"color": "#0072B2", "linewidth": 2.2, "linestyle": (0, (4, 1.2))},
    {"color": "#000000", "linewidth": 1.2, "linestyle": (0, (1, 1.5))},
)


def weight_at(objective: Objective, prob: Tensor, behavior_prob: float, advantage: float) -> Tensor:
    """w of single tokens [N] with these π, one μ and one advantage.

    Each is a sequence of its own in a vocabulary of two, sampled by the trainer's own old policy:
    what a whole sequence, likelier tokens or another sampler would change is not there.
    """
    logp = prob.double().log().unsqueeze(1)
    behavior_logp = torch.full_like(logp, behavior_prob).log()
    both = [torch.stack([t, (-t.expm1()).clamp(min=1e-300).log()], dim=2) for t in (logp, behavior_logp)]
    is_sampled = torch.tensor([True, False]).expand_as(both[0])
    batch = TokenBatch(
        logp=logp,
        behavior_logp=behavior_logp,
        advantage=torch.full_like(logp, advantage),
        mask=torch.ones_like(logp),
        old_logp=behavior_logp,
        anchor=objective.anchor,
        topk=TopK(both[0], both[1], is_sampled),
    )
    return objective.gradient_weight(batch).squeeze(1)


def draw_weights(objectives: Mapping[str, Objective]) -> Figure:
    """A row for each objective: w against r for A > 0 and for A < 0, and against |π − μ| for a token moving away."""
    rows = len(objectives)
    figure = Figure(figsize=(10.5, 0.6 + 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, 3, squeeze=False, sharey="row")
    for (name, objective), row in zip(objectives.items(), panels, strict=True):
        drawn: list[list[Tensor]] = [[], [], []]
        for line, behavior_prob in zip(_STYLES, BEHAVIOR_PROBS, strict=True):
            style: dict[str, Any] = {**line, "label": f"μ or π_old = {behavior_prob:g}"}
            ratio = torch.logspace(-2, min(2.0, -math.log10(behavior_prob)), 801, dtype=torch.float64)
            distance = torch.linspace(0, 1 - behavior_prob, 801, dtype=torch.float64)
            for axes, weights, x, prob, advantage in zip(
                row,
                drawn,
                (ratio, ratio, distance),
                (behavior_prob * ratio, behavior_prob * ratio, behavior_prob + distance),
                (1.0, -1.0, 1.0),
                strict=True,
            ):
                weights.append(weight_at(objective, prob.clamp(max=1), behavior_prob, advantage))
                axes.plot(x, weights[-1], **style)
        row[0].set_ylabel(f"{name}\ngradient weight w")
        for axes, where, weights in zip(row, ("A > 0", "A < 0", "A > 0, moving away"), drawn, strict=True):
            axes.set_title(where, fontsize=10)
            _write_extremes(axes, torch.cat(weights))
        anchor = SYMBOLS[objective.anchor]
        for axes in row[:2]:
            axes.set_xscale("log")
            axes.set_xlabel(f"ratio r = π/{anchor}")
            axes.axvline(1, color="#bbb", linewidth=0.8, zorder=0)
        row[2].set_xlabel(f"|π − {anchor}|")
        every = torch.cat([torch.cat(weights) for weights in drawn])
        row[0].set_ylim(
            max(min(every.min().item(), 0), -LARGEST) - 0.25, min(max(every.max().item(), 1), LARGEST) + 0.25
        )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, handlelength=4)
    return figure


def _write_extremes(axes: Axes, weight: Tensor) -> None:
    for extreme, word, height, side in (
        (weight.min().item(), "down", 0.03, "bottom"),
        (weight.max().item(), "up", 0.97, "top"),
    ):
        if abs(extreme) > LARGEST:
            said = f"{word} to {extreme:,.0f}" if abs(extreme) < 1e5 else f"{word} without bound"
            axes.text(0.5, height, said.replace("-", "−"), transform=axes.transAxes, ha="center", va=side, fontsize=9)
    for height, color in ((0, "#888"), (1, "#ddd")):
        axes.axhline(height, color=color, linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
