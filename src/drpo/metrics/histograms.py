"""Histograms that add up over batches and ranks, and the quantiles read from them."""

from __future__ import annotations

import torch
from torch import Tensor


def _edges(first: int, last: int, per_octave: int) -> Tensor:
    """From 2^first to 2^last, so many evenly spaced in every doubling."""
    octaves = torch.arange(first, last, dtype=torch.float64).exp2().unsqueeze(1)
    steps = 1 + torch.arange(per_octave, dtype=torch.float64) / per_octave
    return torch.cat([(octaves * steps).flatten(), torch.tensor([2.0**last], dtype=torch.float64)])


def _both_sides(distances: Tensor) -> Tensor:
    return torch.cat([-distances.flip(0), distances])


_FINE, _COARSE = 8, 2

DIVERGENCE_EDGES = _edges(-27, 0, _FINE)
"""Edges of the |π − μ| histogram, eight bins a doubling from 7e-9 on: its quantiles are exact to an eighth."""

_DISTANCES = _edges(-27, 5, _FINE)
LOG_RATIO_EDGES = _both_sides(_DISTANCES)
"""Edges of the log-ratio histogram, eight bins a doubling on each side of the one that holds 0."""

_WEIGHT_UNIT = 0.8
_STEPS = _edges(-13, 4, _COARSE)
WEIGHT_EDGES = 1 + _WEIGHT_UNIT * _both_sides(_STEPS)
"""Edges of the gradient-weight histogram, two bins a doubling of |w − 1| from 1e-4 on; w = 0 is the middle of a bin."""

LOGGED_BINS = {"divergence_histogram": len(DIVERGENCE_EDGES) + 1, "weight_histogram": len(WEIGHT_EDGES) + 1}
"""The bins of the histograms that an update logs, by name."""


# Bins go from 0 (below the first edge) to len(edges) (from the last on), as int32 in one dimension; a value on an edge is in
# the bin that is further from 0. They are read from the leading bits of the numbers, since edges are evenly spaced within
# doublings: a search among the edges, and even a logarithm, takes longer than all other measurements together.


def divergence_bins(divergence: Tensor) -> Tensor:
    """Among :data:`DIVERGENCE_EDGES`, of |π − μ|."""
    return _steps(divergence, DIVERGENCE_EDGES, _FINE)


def log_ratio_bins(log_ratio: Tensor) -> Tensor:
    """Among :data:`LOG_RATIO_EDGES`."""
    return _signed(log_ratio, _DISTANCES, _FINE)


def weight_bins(weight: Tensor) -> Tensor:
    """Among :data:`WEIGHT_EDGES`."""
    return _signed((weight - 1) / _WEIGHT_UNIT, _STEPS, _COARSE)


def _signed(value: Tensor, edges: Tensor, per_octave: int) -> Tensor:
    return len(edges) + value.flatten().sign().int() * _steps(value.abs(), edges, per_octave)


def _steps(distance: Tensor, edges: Tensor, per_octave: int) -> Tensor:
    """How many of the edges, made by :func:`_edges`, each distance reaches."""
    distance = distance.float() if distance.dtype.itemsize < 4 else distance
    # An IEEE number ≥ 0, read as an integer, grows with the number; a doubling adds 1 to its exponent.
    integer, mantissa = (torch.int64, 52) if distance.dtype == torch.float64 else (torch.int32, 23)
    shift = mantissa - (per_octave.bit_length() - 1)
    first = int(edges[:1].to(distance.dtype).view(integer)) >> shift
    return ((distance.flatten().view(integer) >> shift) - (first - 1)).clamp_(0, len(edges)).int()


def histogram(bins: Tensor, size: int, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """How many of the counted values are in each of ``size`` bins, [size]."""
    counted = counted.flatten()
    if bins.device.type == "cpu":
        counts = torch.bincount(bins * counted, minlength=size)
        counts[0] -= counted.numel() - counted.sum()
        return counts.to(dtype)
    # bincount waits for a GPU.
    return torch.zeros(size, dtype=dtype, device=bins.device).scatter_add_(0, bins.long(), counted.to(dtype))


def quantile(counts: Tensor, edges: Tensor, share: float, least: float, largest: float, mean: float) -> float:
    """The upper edge of the bin within which ``share`` of the values is reached, as far as their extremes and mean allow it.

    At least 1 − share of the values are at the quantile or above it, the others at ``least`` or above it; and at
    least ``share`` of them are at the quantile or below it.
    """
    reached = int((counts.cumsum(0) >= share * counts.sum()).nonzero()[0])
    upper = edges[min(reached, len(edges) - 1)].item()
    most = (mean - share * least) / (1 - share)
    fewest = (mean - (1 - share) * largest) / share
    return min(max(min(upper, most), fewest, least), largest)
