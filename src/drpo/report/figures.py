"""Figures of runs: each function takes data and returns a plotly figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from drpo.metrics.effects import EFFECTS, SIGNS
from drpo.metrics.histograms import WEIGHT_EDGES
from drpo.report.read import RunData

# Okabe and Ito's colours; a dash for each series and a marker for each run, so that little depends on colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def style(figure: go.Figure, x_title: str | None = None, height: int = 360) -> go.Figure:
    """The figure in the looks of all of them."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 64, "r": 24, "t": 36, "b": 52},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        font={"family": "system-ui, sans-serif", "size": 13},
        hovermode="x unified",
        modebar={"orientation": "v"},
    )
    if x_title:
        figure.update_xaxes(title_text=x_title)
    return figure


def line(run: RunData, index: int, runs: int, key: str, label: str, order: int = 0, width: float = 1.5) -> go.Scatter:
    x, y = run.series(key)
    named = f"{escape(run.name)}: {label}" if runs > 1 else label
    color = COLORS[(index if runs > 1 else order) % len(COLORS)]
    dash = DASHES[order % len(DASHES)]
    return go.Scatter(x=x, y=y, name=named, mode="lines", line={"color": color, "dash": dash, "width": width})


def learning(runs: Sequence[RunData]) -> go.Figure:
    """Training reward and held-out accuracy over rollouts."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        figure.add_trace(line(run, index, len(runs), "reward", "training reward", order=1, width=1))
        label = f"{escape(run.name)}: held-out accuracy" if len(runs) > 1 else "held-out accuracy"
        figure.add_trace(
            go.Scatter(
                x=[row["rollout"] for row in run.evaluations],
                y=[row["accuracy"] for row in run.evaluations],
                name=label,
                mode="lines+markers",
                line={"color": COLORS[index % len(COLORS)], "width": 2.5},
                marker={"size": 7, "symbol": index},
            )
        )
    return style(figure, "rollouts").update_yaxes(title_text="mean reward, accuracy", rangemode="tozero")


def divergence(runs: Sequence[RunData]) -> go.Figure:
    """|π − μ| over rollouts: mean, 99 % quantile and maximum."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        for order, (key, label) in enumerate((("mean", "mean"), ("p99", "99 % quantile"), ("max", "maximum"))):
            figure.add_trace(line(run, index, len(runs), f"divergence/{key}", label, order))
    if len(runs) == 1 and (delta := runs[0].objective.edge or 1) < 1:
        rollouts = [row["rollout"] for row in runs[0].metrics]
        edge = {"x": rollouts[:: max(len(rollouts) - 1, 1)], "y": [delta, delta], "name": f"δ = {delta:g}"}
        figure.add_trace(go.Scatter(**edge, mode="lines", line={"color": "#555", "dash": "dash", "width": 1}))
    return style(figure, "rollouts").update_yaxes(title_text="|π − μ|", type="log", dtick=1, exponentformat="power")


def ratio(runs: Sequence[RunData]) -> go.Figure:
    """The ratio π/μ over rollouts: mean and maximum."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        for order, (key, label) in enumerate((("mean", "mean"), ("max", "maximum"))):
            figure.add_trace(line(run, index, len(runs), f"ratio/{key}", label, order))
    return style(figure, "rollouts").update_yaxes(title_text="ratio π/μ", type="log")


def weight_distribution(runs: Sequence[RunData]) -> go.Figure:
    """How often the objective gave which gradient weight to a token with A ≠ 0, over the whole run."""
    figure = go.Figure()
    centers = _weight_labels()
    used = [i for i in range(len(centers)) if any(run.metrics and run.histogram("weight_histogram")[i] for run in runs)]
    # Bins are wider away from 1: weights are drawn at equal distances, from the lowest seen to the highest.
    shown = range(min(used), max(used) + 1) if used else range(0)
    for index, run in enumerate(runs):
        counts = run.histogram("weight_histogram") if run.metrics else [0] * len(centers)
        total = sum(counts) or 1
        label = (
            f"{escape(run.name)} ({escape(run.recipe.objective.name)})"
            if len(runs) > 1
            else escape(run.recipe.objective.name)
        )
        figure.add_trace(
            go.Bar(
                x=[centers[i] for i in shown],
                y=[counts[i] / total or None for i in shown],
                name=label,
                marker={"color": COLORS[index % len(COLORS)], "line": {"width": 0.5, "color": "#000"}},
            )
        )
    style(figure, "gradient weight w (1: the plain policy gradient; 0: no gradient; below 0: pulled back)")
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=[centers[i] for i in shown])
    return figure.update_yaxes(title_text="share of tokens", type="log", dtick=1, exponentformat="power")


def _weight_labels() -> list[str]:
    """A label for each bin of the weight histogram: its middle."""
    middle = (WEIGHT_EDGES[:-1] + WEIGHT_EDGES[1:]) / 2
    labels = []
    for weight in (middle.round(decimals=9) + 0.0).tolist():  # + 0.0: no label "-0"
        decimals = 1 if weight == 1 else max(1, 1 - math.floor(math.log10(abs(weight - 1))))
        labels.append(f"{weight:.{decimals}f}".rstrip("0").rstrip("."))
    return [f"below {WEIGHT_EDGES[0]:.1f}", *labels, f"above {WEIGHT_EDGES[-1]:.1f}"]


def effects(runs: Sequence[RunData]) -> go.Figure:
    """The share of tokens that the objective attenuates, zeroes, reverses or amplifies, by the sign of the advantage."""
    figure = make_subplots(
        cols=2, shared_yaxes=True, subplot_titles=["tokens with A > 0", "tokens with A < 0"], horizontal_spacing=0.04
    )
    for index, run in enumerate(runs):
        for column, sign in enumerate(SIGNS, 1):
            for order, effect in enumerate(EFFECTS):
                trace = line(run, index, len(runs), f"weight/{effect}_{sign}", effect, order)
                trace.update(legendgroup=trace.name, showlegend=column == 1)
                figure.add_trace(trace, row=1, col=column)
    style(figure, "rollouts", height=400).update_layout(legend={"y": 1.1})
    return figure.update_yaxes(title_text="share of tokens", col=1, rangemode="tozero")
