"""Figures of inspected rollouts: each function takes an inspection and returns a plotly figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import plotly.graph_objects as go

from drpo.inspect.analyze import Inspection
from drpo.metrics.effects import EFFECTS
from drpo.metrics.groups import BUCKETS
from drpo.metrics.histograms import DIVERGENCE_EDGES
from drpo.report.figures import COLORS, DASHES, style

GROUPS = {
    "positive": "A > 0",
    "negative": "A < 0",
    **{
        name: f"μ {low:g} to {high:g}"
        for (name, high), low in zip(BUCKETS.items(), (0.0, *BUCKETS.values()), strict=False)
    },
}
"""What the groups of tokens are called."""

MOST_STEPS = 500
"""Points of a curve over steps."""

MOST_MARKERS = 100
"""Points of a curve that are marked; more hide its dashes."""

_PATTERNS = {"unchanged": "", "attenuated": "/", "zeroed": "x", "reversed": "\\", "amplified": "."}


@dataclass(frozen=True)
class Stretch:
    """|π − μ| over neighbouring steps or ages.

    Args:
        first: of them.
        last: of them.
        mean: of their means.
        p99: the largest of their 99 % quantiles.
        largest: of their maxima.
    """

    first: int
    last: int
    mean: float
    p99: float
    largest: float


def stretches(measured: Mapping[int, Mapping[str, float]], most: int) -> list[Stretch]:
    """At most so many stretches, of as many steps or ages each: one each where there are no more than that."""
    keys = list(measured)
    size = steps_a_point(len(keys), most)
    found = []
    for start in range(0, len(keys), size):
        of = keys[start : start + size]
        mean, p99, largest = ([measured[key][f"divergence/{name}"] for key in of] for name in ("mean", "p99", "max"))
        found.append(Stretch(of[0], of[-1], sum(mean) / len(mean), max(p99), max(largest)))
    return found


def steps_a_point(steps: int, most: int) -> int:
    """How many neighbouring steps a point stands for, so that there are at most so many points."""
    return max(1, math.ceil(steps / most))


def beyond(found: Inspection) -> go.Figure:
    """The share of tokens at which |π − μ| is larger than so much."""
    edges = DIVERGENCE_EDGES.tolist()
    # The bins above an edge, of which the last lies beyond all of them.
    above = list(accumulate(reversed(found.divergence_histogram[1:])))[::-1]
    points = [(edge, count / found.tokens) for edge, count in zip(edges, above, strict=True) if count]
    figure = go.Figure(go.Scatter(x=[x for x, _ in points], y=[y for _, y in points], line={"color": COLORS[0]}))
    style(figure, "|π − μ|").update_xaxes(type="log", dtick=1, exponentformat="power")
    return figure.update_yaxes(title_text="share of tokens beyond", type="log", dtick=1, exponentformat="power")


def groups(found: Inspection) -> go.Figure:
    """|π − μ| by the sign of the advantage and by μ: mean and 99 % quantile."""
    named = {key: title for key, title in GROUPS.items() if f"divergence/mean_{key}" in found.measured}
    figure = go.Figure()
    for order, (statistic, label) in enumerate((("mean", "mean"), ("p99", "99 % quantile"))):
        figure.add_trace(
            go.Bar(
                x=list(named.values()),
                y=[found.measured[f"divergence/{statistic}_{key}"] or None for key in named],
                name=label,
                marker={"color": COLORS[order], "pattern": {"shape": ("", "/")[order]}},
            )
        )
    return style(figure).update_yaxes(title_text="|π − μ|", type="log", dtick=1, exponentformat="power")


def steps(found: Inspection) -> go.Figure:
    """|π − μ| over steps: mean, 99 % quantile and maximum."""
    drawn = stretches(found.by_step, MOST_STEPS)
    figure = go.Figure()
    for order, (label, y) in enumerate(
        (
            ("mean", [stretch.mean for stretch in drawn]),
            ("99 % quantile", [stretch.p99 for stretch in drawn]),
            ("maximum", [stretch.largest for stretch in drawn]),
        )
    ):
        figure.add_trace(
            go.Scatter(
                x=[stretch.first for stretch in drawn],
                y=[value or None for value in y],
                name=label,
                mode="lines" if len(drawn) > MOST_MARKERS else "lines+markers",
                line={"color": COLORS[order], "dash": DASHES[order]},
            )
        )
    return style(figure, "step").update_yaxes(title_text="|π − μ|", type="log", dtick=1, exponentformat="power")


def what_if(found: Inspection) -> go.Figure:
    """What every objective would have done to the tokens with A ≠ 0, as shares of them."""
    names = list(reversed(found.what_if))
    figure = go.Figure()
    for order, effect in enumerate(("unchanged", *EFFECTS)):
        figure.add_trace(
            go.Bar(
                y=names,
                x=[found.what_if[name].effects[effect] for name in names],
                name=effect,
                orientation="h",
                marker={
                    "color": "#DDDDDD" if effect == "unchanged" else COLORS[order - 1],
                    "pattern": {"shape": _PATTERNS[effect]},
                },
            )
        )
    style(figure, "share of tokens with A ≠ 0", height=140 + 26 * len(names))
    return figure.update_layout(barmode="stack", hovermode="y unified").update_xaxes(range=[0, 1])
