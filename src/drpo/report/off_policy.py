"""Figures of how far a run was off its policy: each takes runs and returns a plotly figure, or None where nothing was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from drpo.metrics.groups import BUCKETS
from drpo.report.figures import line, style
from drpo.report.read import RunData

ORIGINS = {"engine": "engine", "staleness": "age", "drift": "updates"}
SIGNS = {"positive": "A > 0", "negative": "A < 0"}


def origins(runs: Sequence[RunData]) -> go.Figure | None:
    """Mean distance by where it comes from."""
    keys = {f"{part}/divergence/mean": label for part, label in ORIGINS.items()}
    return _distances(runs, keys, "|π − μ|, mean")


def by_sign(runs: Sequence[RunData]) -> go.Figure | None:
    """Mean |π − μ| of tokens with either sign of the advantage."""
    keys = {f"divergence/mean_{sign}": label for sign, label in SIGNS.items()}
    return _distances(runs, keys, "|π − μ|, mean")


def by_mu(runs: Sequence[RunData]) -> go.Figure | None:
    """Mean |π − μ| of tokens by their μ."""
    ends = [0.0, *BUCKETS.values()]
    keys = {
        f"divergence/mean_{bucket}": f"μ {low:g} to {high:g}"
        for bucket, low, high in zip(BUCKETS, ends, ends[1:], strict=False)
    }
    return _distances(runs, keys, "|π − μ|, mean")


def strength(runs: Sequence[RunData]) -> go.Figure | None:
    """The part of the plain policy gradient that the objective takes away or adds."""
    figure = _figure(runs, {"regulariser/strength": "strength"})
    return figure and figure.update_yaxes(title_text="Σ|A|·r·|w − 1| / Σ|A|·r", rangemode="tozero")


def _distances(runs: Sequence[RunData], keys: Mapping[str, str], title: str) -> go.Figure | None:
    figure = _figure(runs, keys)
    return figure and figure.update_yaxes(title_text=title, type="log", exponentformat="power")


def _figure(runs: Sequence[RunData], keys: Mapping[str, str]) -> go.Figure | None:
    figure = go.Figure()
    for index, run in enumerate(runs):
        for order, (key, label) in enumerate(keys.items()):
            if run.series(key)[0]:
                figure.add_trace(line(run, index, len(runs), key, label, order))
    return style(figure, "rollouts") if figure.data else None
