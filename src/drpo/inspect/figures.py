"""Figures of inspected rollouts: each function takes an inspection, or a part of it, and returns a plotly figure."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import plotly.graph_objects as go

from drpo.inspect.analyze import Inspection
from drpo.inspect.region import Region
from drpo.metrics.effects import EFFECTS
from drpo.metrics.histograms import DIVERGENCE_EDGES
from drpo.report.figures import COLORS, DASHES, STATISTICS, style, tick_whole, with_markers
from drpo.report.groups import MU_GROUPS, SIGN_GROUPS

_PATTERNS = {"unchanged": "", "attenuated": "/", "zeroed": "x", "reversed": "\\", "amplified": "."}


def beyond(inspection: Inspection) -> go.Figure:
    """The share of tokens at which |π − μ| is larger than so much."""
    # The bins above an edge, of which the last lies beyond all of them.
    above = list(accumulate(reversed(inspection.divergence_histogram[1:])))[::-1]
    edges, shares = DIVERGENCE_EDGES.tolist(), [count / inspection.tokens or None for count in above]
    figure = go.Figure(go.Scatter(x=edges, y=shares, line={"color": COLORS[0]}))
    style(figure, "|π − μ|", "share of tokens beyond", log=True)
    return figure.update_xaxes(type="log", exponentformat="power")


def groups(inspection: Inspection) -> go.Figure:
    """|π − μ| by the sign of the advantage and by μ: mean and 99 % quantile."""
    measured = inspection.measured
    titles = {
        group: title for group, title in (SIGN_GROUPS | MU_GROUPS).items() if f"divergence/mean_{group}" in measured
    }
    figure = go.Figure()
    for order, statistic in enumerate(("mean", "p99")):
        figure.add_bar(
            x=list(titles.values()),
            y=[measured[f"divergence/{statistic}_{group}"] or None for group in titles],
            name=STATISTICS[statistic],
            marker={"color": COLORS[order], "pattern": {"shape": ("", "/")[order]}},
        )
    return style(figure, None, "|π − μ|", log=True)


def distances(measured: Mapping[int, Mapping[str, float]], x_title: str) -> go.Figure:
    """|π − μ| over steps or ages: mean, 99 % quantile and maximum."""
    figure = go.Figure()
    for order, (statistic, label) in enumerate(STATISTICS.items()):
        figure.add_scatter(
            x=list(measured),
            y=[scalars[f"divergence/{statistic}"] or None for scalars in measured.values()],
            name=label,
            mode=with_markers(len(measured)),
            line={"color": COLORS[order], "dash": DASHES[order]},
        )
    return tick_whole(style(figure, x_title, "|π − μ|", log=True))


def outside(region: Region) -> go.Figure:
    """The share of tokens outside the region at each δ, by the sign of the advantage, and the strength of the regulariser."""
    deltas = [hits.delta for hits in region.deltas]
    by_sign = {
        f"outside, {sign}": [
            next((g.outside for groups in hits.by.values() for g in groups if g.label == sign), None)
            for hits in region.deltas
        ]
        for sign in SIGN_GROUPS.values()
    }
    lines = by_sign | {"strength": [hits.strength for hits in region.deltas]} if deltas else {}
    figure = go.Figure()
    for order, (name, values) in enumerate(lines.items()):
        figure.add_scatter(
            x=deltas, y=values, name=name, mode="lines+markers", line={"color": COLORS[order], "dash": DASHES[order]}
        )
    style(figure, "δ", "share")
    # At equal distances the values of δ have room on a phone too.
    return figure.update_xaxes(type="category").update_yaxes(rangemode="tozero")


def what_if(inspection: Inspection) -> go.Figure:
    """What every objective would have done to the tokens with A ≠ 0, as shares of them."""
    names = list(reversed(inspection.what_if))
    figure = go.Figure()
    for effect, color in zip(("unchanged", *EFFECTS), ("#DDDDDD", *COLORS), strict=False):
        figure.add_bar(
            y=names,
            x=[inspection.what_if[name].effects[effect] for name in names],
            name=effect,
            orientation="h",
            marker={"color": color, "pattern": {"shape": _PATTERNS[effect]}},
        )
    style(figure, "share of tokens with A ≠ 0", height=140 + 26 * len(names))
    return figure.update_layout(barmode="stack", hovermode="y unified").update_xaxes(range=[0, 1])
