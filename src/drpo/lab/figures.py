"""Pictures of results: curves of arms side by side, and where in learning rate × updates each of them is stable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from drpo.lab.statistics import Estimate
from drpo.report.figures import COLORS, DASHES, style


def curves(rollouts: Sequence[int], arms: Mapping[str, Sequence[Estimate]]) -> go.Figure:
    """Held-out accuracy over rollouts, a line an arm with its interval.

    Args:
        rollouts: of the evaluations.
        arms: by name, an estimate an evaluation.
    """
    figure = go.Figure()
    for number, (name, estimates) in enumerate(arms.items()):
        color, dash = COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]
        figure.add_scatter(
            x=rollouts, y=[e.value for e in estimates], name=name, line={"color": color, "dash": dash}, legendgroup=name
        )
        figure.add_scatter(
            x=[*rollouts, *reversed(rollouts)],
            y=[*(e.high for e in estimates), *(e.low for e in reversed(estimates))],
            fill="toself",
            fillcolor=color,
            opacity=0.12,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
    figure.update_yaxes(title_text="held-out accuracy", range=[0, 1])
    return style(figure, "rollout", height=440)


def intervals(arms: Mapping[str, Estimate], title: str) -> go.Figure:
    """A value an arm with its interval, best on top."""
    ordered = sorted(arms.items(), key=lambda item: item[1].value)
    values = [e.value for _, e in ordered]
    figure = go.Figure(
        go.Scatter(
            x=values,
            y=[name for name, _ in ordered],
            mode="markers",
            marker={"size": 9, "color": COLORS[0]},
            error_x={
                "array": [e.high - e.value for _, e in ordered],
                "arrayminus": [e.value - e.low for _, e in ordered],
            },
        )
    )
    return style(figure, title, height=110 + 28 * len(ordered))


def stability_map(arms: Mapping[str, Mapping[tuple[float, int], tuple[float, float]]]) -> go.Figure:
    """Final accuracy of each arm over learning rate × updates, side by side, with the share of seeds that collapsed as text.

    Args:
        arms: by name and (learning rate, updates a rollout): final accuracy and share of collapsed seeds.
    """
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure = make_subplots(rows, columns, subplot_titles=list(arms), horizontal_spacing=0.05, vertical_spacing=0.2)
    for place, cells in enumerate(arms.values()):
        rates, updates = (sorted(set(axis)) for axis in zip(*cells, strict=True))
        accuracy = np.array([[cells.get((rate, count), (np.nan, np.nan))[0] for rate in rates] for count in updates])
        text = [[_collapsed(cells.get((rate, count))) for rate in rates] for count in updates]
        figure.add_heatmap(
            z=accuracy,
            x=[f"{rate:g}" for rate in rates],
            y=[str(count) for count in updates],
            text=text,
            texttemplate="%{text}",
            coloraxis="coloraxis",
            row=place // columns + 1,
            col=place % columns + 1,
        )
    figure.update_xaxes(title_text="learning rate", type="category", tickangle=0, tickfont={"size": 11})
    figure.update_yaxes(type="category")
    figure.update_yaxes(title_text="updates a rollout", col=1)
    style(figure, height=80 + 260 * rows)
    colors = {
        "colorscale": "Viridis",
        "cmin": 0,
        "cmax": 1,
        "colorbar": {"title": "final<br>accuracy", "y": 0.45, "len": 0.9},
    }
    return figure.update_layout(coloraxis=colors, hovermode="closest", margin={"t": 60})


def _collapsed(cell: tuple[float, float] | None) -> str:
    return "" if cell is None else f"{cell[0]:.2f}<br>{cell[1]:.0%}"
