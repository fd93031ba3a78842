"""Figures of runs: each function takes data and returns a plotly figure, without traces where nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from drpo.metrics.effects import EFFECTS, SIGNS
from drpo.metrics.histograms import WEIGHT_EDGES
from drpo.report.groups import SIGN_GROUPS
from drpo.report.read import RunData

# Okabe and Ito's colours; a dash for each series and a marker for each run, so that little depends on colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

MOST_MARKERS = 30
"""Points of a line that are marked; more hide its dashes."""

MOST_WEIGHT_TICKS = 9
"""On the axis of gradient weights, whose labels are long."""

STATISTICS = {"mean": "mean", "p99": "99 % quantile", "max": "maximum"}
"""What the statistics of |π − μ| are called."""


def style(
    figure: go.Figure, x_title: str | None = None, y_title: str | None = None, *, height: int = 360, log: bool = False
) -> go.Figure:
    """The figure in the looks of all of them; ``log`` is of the y axis."""
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
    if y_title:
        figure.update_yaxes(title_text=y_title)
    if log:
        figure.update_yaxes(type="log", exponentformat="power")
    return figure


def with_markers(points: int) -> str:
    """The mode of a line through so many points: a single one is seen by its marker alone."""
    return "lines" if points > MOST_MARKERS else "lines+markers"


def tick_whole(figure: go.Figure) -> go.Figure:
    """The figure with at most eleven ticks on its x axes, at whole numbers."""
    traces: Any = figure.data
    ends = [end for trace in traces for end in (trace.x[0], trace.x[-1])]
    span = max(ends) - min(ends) if ends else 0
    steps = (digit * 10**power for power in range(16) for digit in (1, 2, 5))
    return figure.update_xaxes(tick0=0, dtick=next(step for step in steps if span <= 10 * step))


def over_rollouts(runs: Sequence[RunData], metrics: Mapping[str, str], y_title: str, *, log: bool = False) -> go.Figure:
    """Metrics, by name with what to call each, at the last update of each rollout."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        for order, (metric, label) in enumerate(metrics.items()):
            _add_line(figure, runs, index, label, *run.series(metric), order=order)
    return tick_whole(style(figure, "rollouts", y_title, log=log)).update_yaxes(rangemode="tozero")


def learning(runs: Sequence[RunData]) -> go.Figure:
    """Training reward and held-out accuracy over rollouts, with the interval of each accuracy."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        rollouts = [row["rollout"] for row in run.evaluations]
        accuracies = [row["accuracy"] for row in run.evaluations]
        above = [accuracy["high"] - accuracy["mean"] for accuracy in accuracies]
        below = [accuracy["mean"] - accuracy["low"] for accuracy in accuracies]
        _add_line(figure, runs, index, "training reward", *run.series("reward"), order=1, width=1)
        _add_line(
            figure,
            runs,
            index,
            "held-out accuracy",
            rollouts,
            [accuracy["mean"] for accuracy in accuracies],
            width=2.5,
            mode="lines+markers",
            marker={"size": 7, "symbol": index},
            error_y={"array": above, "arrayminus": below, "thickness": 1},
        )
    return tick_whole(style(figure, "rollouts", "mean reward, accuracy")).update_yaxes(rangemode="tozero")


def validation(runs: Sequence[RunData]) -> go.Figure:
    """verl's own validation metrics, by data source."""
    prefix = "verl/val-core/"
    names = dict.fromkeys(name for run in runs for row in run.metrics for name in row if name.startswith(prefix))
    figure = over_rollouts(runs, {name: name.removeprefix(prefix) for name in names}, "mean over samples")
    # The name of the only line is not in the caption.
    return figure.update_layout(showlegend=True)


def divergence(runs: Sequence[RunData]) -> go.Figure:
    """|π − μ| over rollouts, and δ of the runs that have one."""
    metrics = {f"divergence/{statistic}": label for statistic, label in STATISTICS.items()}
    figure = over_rollouts(runs, metrics, "|π − μ|", log=True)
    runs_by_delta: dict[float, list[RunData]] = {}
    for run in runs:
        if run.metrics and run.objective and (delta := run.objective.edge or 1) < 1:
            runs_by_delta.setdefault(delta, []).append(run)
    for order, (delta, sharing) in enumerate(runs_by_delta.items() if figure.data else ()):
        rollouts = [run.metrics[place]["rollout"] for run in sharing for place in (0, -1)]
        names = ", ".join(run.name for run in sharing)
        figure.add_scatter(
            x=[min(rollouts), max(rollouts)],
            y=[delta, delta],
            name=escape(f"{names}: δ = {delta:g}" if len(runs_by_delta) > 1 else f"δ = {delta:g}"),
            mode="lines+markers",
            marker={"size": 4},
            line={"color": "#555", "dash": DASHES[(order + 1) % len(DASHES)], "width": 1},
        )
    return figure


def weight_distribution(runs: Sequence[RunData]) -> go.Figure:
    """How often the objective gave which gradient weight to a token with A ≠ 0, over the whole run."""
    figure = go.Figure()
    labels = _weight_labels()
    logged = {index: run.histogram("weight_histogram") for index, run in enumerate(runs)}
    histograms = {index: counts for index, counts in logged.items() if counts}
    used = [place for place in range(len(labels)) if any(counts[place] for counts in histograms.values())]
    # Bins are wider away from 1: weights are drawn at equal distances, from the lowest seen to the highest.
    shown = slice(min(used), max(used) + 1) if used else slice(0)
    for index, counts in histograms.items() if used else ():
        recipe = runs[index].recipe
        name = recipe.objective.name if recipe else "objective not logged"
        figure.add_bar(
            x=labels[shown],
            y=[count / (sum(counts) or 1) or None for count in counts[shown]],
            name=escape(f"{runs[index].name} ({name})" if len(runs) > 1 else name),
            marker={"color": COLORS[index % len(COLORS)], "line": {"width": 0.5, "color": "#000"}},
        )
    style(figure, "gradient weight w", "share of tokens", log=True)
    # Ticks at w = 1, which is the middle of the labels, and at equal distances from it.
    step = max(1, math.ceil(len(labels[shown]) / MOST_WEIGHT_TICKS))
    ticks = [labels[place] for place in range(len(labels))[shown] if (place - len(labels) // 2) % step == 0]
    return figure.update_xaxes(type="category", categoryorder="array", categoryarray=labels[shown], tickvals=ticks)


def effects(runs: Sequence[RunData]) -> go.Figure:
    """The share of tokens that the objective attenuates, zeroes, reverses or amplifies, by the sign of the advantage."""
    titles = list(SIGN_GROUPS.values())
    figure = make_subplots(cols=2, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    for column, sign in enumerate(SIGNS, 1):
        metrics = {f"weight/{effect}_{sign}": effect for effect in EFFECTS}
        lines = over_rollouts(runs, metrics, "").update_traces(showlegend=column == 1)
        figure.add_traces(list(lines.select_traces()), rows=1, cols=column)
    style(figure, "rollouts", height=400).update_layout(legend={"y": 1.1})
    return tick_whole(figure).update_yaxes(title_text="share of tokens", col=1, rangemode="tozero")


def _add_line(
    figure: go.Figure,
    runs: Sequence[RunData],
    index: int,
    label: str,
    x: Sequence[int],
    y: Sequence[float],
    *,
    order: int = 0,
    width: float = 1.5,
    **options: Any,
) -> None:
    """Add a series of a run, if it has values. Runs differ by color, the series of a run by dash, those of a single run by both.

    Args:
        options: of the trace.
    """
    if not x:
        return
    several = len(runs) > 1
    name = escape(f"{runs[index].name}: {label}" if several else label)
    color = COLORS[(index if several else order) % len(COLORS)]
    figure.add_scatter(
        x=x,
        y=y,
        name=name,
        legendgroup=name,
        line={"color": color, "dash": DASHES[order % len(DASHES)], "width": width},
        **{"mode": with_markers(len(x)), "marker": {"size": 5}, **options},
    )


def _weight_labels() -> list[str]:
    """A label for each bin of the weight histogram: its middle."""
    middle = (WEIGHT_EDGES[:-1] + WEIGHT_EDGES[1:]) / 2
    labels = []
    for weight in (middle.round(decimals=9) + 0.0).tolist():  # + 0.0: no label "-0"
        decimals = 1 if weight == 1 else max(1, 1 - math.floor(math.log10(abs(weight - 1))))
        labels.append(f"{weight:.{decimals}f}".rstrip("0").rstrip("."))
    return [f"below {WEIGHT_EDGES[0]:.1f}", *labels, f"above {WEIGHT_EDGES[-1]:.1f}"]
