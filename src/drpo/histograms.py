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


def bin_of(values: Tensor, edges: Tensor) -> Tensor:
    """The bin of each value, from 0 (up to the first edge) to ``len(edges)`` (beyond the last)."""
    return torch.bucketize(values.flatten(), edges.to(values))


def histogram(bins: Tensor, size: int, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """How many of the counted values are in each of ``size`` bins, [size]."""
    return torch.zeros(size, dtype=dtype, device=bins.device).scatter_add_(0, bins, counted.flatten().to(dtype))


def quantile(counts: Tensor, edges: Tensor, share: float) -> float:
    """The upper edge of the bin within which ``share`` of the values is reached; 0 in a bin of the smallest distances."""
    reached = int((counts.cumsum(0) >= share * counts.sum()).nonzero()[0])
    upper = edges[min(reached, len(edges) - 1)].item()
    return 0.0 if abs(upper) <= edges.abs().min().item() else upper
