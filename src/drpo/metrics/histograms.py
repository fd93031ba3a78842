"""Histograms that add up over batches and ranks, and the quantiles read from them."""

from __future__ import annotations

import torch
from torch import Tensor

DIVERGENCE_EDGES = torch.logspace(-8, 0, 161, dtype=torch.float64)
"""Edges of the |π − μ| histogram, twenty bins a decade: its quantiles are exact to 12 %."""

_DISTANCES = torch.logspace(-8, 1.35, 188, dtype=torch.float64)
LOG_RATIO_EDGES = torch.cat([-_DISTANCES.flip(0), _DISTANCES])
"""Edges of the log-ratio histogram, twenty bins a decade on each side of the one that holds 0."""

_STEPS = torch.logspace(-4.1, 1.1, 27, dtype=torch.float64)
WEIGHT_EDGES = 1 + torch.cat([-_STEPS.flip(0), _STEPS])
"""Edges of the gradient-weight histogram, five bins a decade of |w − 1| on each side; w = 0 lies inside a bin."""


# The bin of each value, from 0 (up to the first edge) to len(edges) (beyond the last). The edges are evenly spaced on a
# logarithmic scale and a search among them takes longer than all other measurements together; a value within rounding of
# an edge may be on its other side.


def divergence_bins(divergence: Tensor) -> Tensor:
    """Among :data:`DIVERGENCE_EDGES`, of |π − μ|; as many as values, in one dimension."""
    return _steps(divergence, -8, 20, len(DIVERGENCE_EDGES)).long()


def log_ratio_bins(log_ratio: Tensor) -> Tensor:
    """Among :data:`LOG_RATIO_EDGES`."""
    return _signed(log_ratio, -8, 20, len(_DISTANCES))


def weight_bins(weight: Tensor) -> Tensor:
    """Among :data:`WEIGHT_EDGES`."""
    return _signed(weight - 1, -4.1, 5, len(_STEPS))


def _signed(value: Tensor, first: float, per_decade: int, edges: int) -> Tensor:
    return (edges + value.flatten().sign() * _steps(value.abs(), first, per_decade, edges)).long()


def _steps(distance: Tensor, first: float, per_decade: int, edges: int) -> Tensor:
    """How many of so many edges, the first at 10^first, lie below each distance."""
    return ((distance.flatten().log10() - first) * per_decade).ceil().clamp(0, edges).nan_to_num(edges)


def histogram(bins: Tensor, size: int, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """How many of the counted values are in each of ``size`` bins, [size]."""
    return torch.zeros(size, dtype=dtype, device=bins.device).scatter_add_(0, bins, counted.flatten().to(dtype))


def quantile(counts: Tensor, edges: Tensor, share: float) -> float:
    """The upper edge of the bin within which ``share`` of the values is reached; 0 in a bin of the smallest distances."""
    reached = int((counts.cumsum(0) >= share * counts.sum()).nonzero()[0])
    upper = edges[min(reached, len(edges) - 1)].item()
    return 0.0 if abs(upper) <= edges.abs().min().item() else upper
