"""What the trust region did, for any objective, from the tokens and their gradient weights alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drpo.tokens import TokenBatch

UNCHANGED = 1e-3
"""A weight within this of 1 counts as unchanged, within this of 0 as zeroed."""

DIVERGENCE_EDGES = torch.logspace(-8, 0, 161, dtype=torch.float64)
"""Edges of the |π − μ| histogram, twenty bins a decade: its quantiles are exact to 12 %."""

_STEPS = torch.logspace(-4.1, 1.1, 27, dtype=torch.float64)
WEIGHT_EDGES = 1 + torch.cat([-_STEPS.flip(0), _STEPS])
"""Edges of the gradient-weight histogram, five bins a decade of |w − 1| on each side; w = 0 lies inside a bin."""

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_SIGNS = ("positive", "negative")
_EFFECTS = ("attenuated", "zeroed", "reversed", "amplified")


@dataclass(frozen=True)
class TrustRegion:
    """Measurements over all tokens seen.

    Args:
        scalars: by name. ``ratio/mean``, ``ratio/max``; ``divergence/mean`` | ``p50`` | ``p90`` |
            ``p99`` | ``max``, of |π − μ|; ``kl/k1``, ``kl/k3``, estimates of KL(μ‖π) in nats;
            ``effective_sample_size``, (Σr)² / (N·Σr²); ``weight/mean``;
            ``weight/EFFECT_SIGN``, the share of the tokens whose advantage has that sign that the
            objective attenuates (0 < w < 1), zeroes, reverses (w < 0) or amplifies (w > 1);
            ``entropy`` in nats. A measurement that does not apply is absent; of no tokens, all are.
        divergence_histogram: tokens by |π − μ|, between :data:`DIVERGENCE_EDGES` and one bin at either end.
        weight_histogram: tokens with A ≠ 0 by gradient weight, between :data:`WEIGHT_EDGES` and
            one bin at either end.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    divergence_histogram: list[int] = field(default_factory=lambda: [0] * (len(DIVERGENCE_EDGES) + 1))
    weight_histogram: list[int] = field(default_factory=lambda: [0] * (len(WEIGHT_EDGES) + 1))


class TrustRegionMetrics:
    """Accumulates sums, counts and maxima over batches, so that splits into micro-batches and ranks combine exactly."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, batch: TokenBatch, weight: Tensor, entropy: Tensor | None = None) -> None:
        """Add the tokens of a batch.

        Args:
            batch: the tokens, [B, T].
            weight: [B, T], the objective's gradient weight.
            entropy: [B, T], of π at each token, in nats; the same choice in every call.
        """
        # MPS has no fp64. Everything is summed in it, and but for k3 nothing else has to be.
        dtype = torch.float32 if weight.device.type == "mps" else torch.float64
        counted = batch.mask
        steered = counted & (batch.advantage != 0)
        excess, divergence, log_ratio = batch.excess, batch.shift.abs(), batch.log_ratio.to(dtype)
        # Where a token does not count its log-probs are 0, and so is each of these.
        per_token = {
            "excess": excess,
            "excess_squared": excess.square(),
            "divergence": divergence,
            "log_ratio": log_ratio,
            "k3": log_ratio.expm1() - log_ratio,
            "weight": weight.masked_fill(~steered, 0.0),
        }
        if entropy is not None:
            per_token["entropy"] = entropy.masked_fill(~counted, 0.0)
        sums = {name: value.sum(dtype=dtype) for name, value in per_token.items()}
        sums["tokens"] = counted.sum()
        effects = dict(
            zip(
                _EFFECTS,
                (
                    (weight > UNCHANGED) & (weight < 1 - UNCHANGED),
                    weight.abs() <= UNCHANGED,
                    weight < -UNCHANGED,
                    weight > 1 + UNCHANGED,
                ),
                strict=True,
            )
        )
        positive = counted & (batch.advantage > 0)
        for sign, has_sign in zip(_SIGNS, (positive, steered ^ positive), strict=True):
            sums[f"tokens_{sign}"] = has_sign.sum()
            for effect, affected in effects.items():
                sums[f"{effect}_{sign}"] = (affected & has_sign).sum()
        sums["divergence_histogram"] = _histogram(_divergence_bins(divergence), DIVERGENCE_EDGES, counted, dtype)
        sums["weight_histogram"] = _histogram(_weight_bins(weight), WEIGHT_EDGES, steered, dtype)
        maxima = {
            "ratio": _largest(excess.masked_fill(~counted, -1.0), least=-1.0) + 1,
            "divergence": _largest(divergence, least=0.0),
        }
        self._sums = {name: self._sums.get(name, 0) + value for name, value in sums.items()}
        self._maxima = {name: torch.maximum(self._maxima.get(name, value), value) for name, value in maxima.items()}

    def compute(self, gather: Callable[[Tensor], Tensor] = lambda t: t) -> TrustRegion:
        """Everything measured since the last reset.

        Args:
            gather: concatenates a one-dimensional tensor over ranks, as ``Accelerator.gather`` does.
        """
        if not self._sums:
            return TrustRegion()
        shapes = [value.numel() for value in self._sums.values()]
        sums = torch.cat([value.flatten() for value in self._sums.values()])
        maxima = torch.stack(list(self._maxima.values()))
        sums = gather(sums).view(-1, sums.numel()).sum(dim=0)
        maxima = gather(maxima).view(-1, maxima.numel()).amax(dim=0)
        # The one place where the device is waited for.
        values = torch.cat([sums, maxima]).cpu()
        totals = dict(zip(self._sums, values[: sum(shapes)].split(shapes), strict=True))
        largest = dict(zip(self._maxima, values[sum(shapes) :].tolist(), strict=True))
        divergence_histogram = totals.pop("divergence_histogram")
        weight_histogram = totals.pop("weight_histogram").long().tolist()
        total = {name: value.item() for name, value in totals.items()}
        if not total["tokens"]:
            return TrustRegion()
        return TrustRegion(
            _scalars(total, largest, divergence_histogram), divergence_histogram.long().tolist(), weight_histogram
        )

    def reset(self) -> None:
        self._sums, self._maxima = {}, {}


def _largest(values: Tensor, least: float) -> Tensor:
    return values.amax() if values.numel() else values.new_tensor(least)


def _divergence_bins(divergence: Tensor) -> Tensor:
    return (divergence.log10() + 8) * 20


def _weight_bins(weight: Tensor) -> Tensor:
    excess = weight - 1
    return len(_STEPS) + excess.sign() * ((excess.abs().log10() + 4.1) * 5).clamp(min=0).ceil()


def _histogram(bins: Tensor, edges: Tensor, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """How many counted values are in each bin: at most ``edges[0]``, above it and at most ``edges[1]``, ..., above the last.

    ``bins`` is where each value lies among the edges, counted in edges: they are evenly spaced, and a search takes longer
    than all the rest. A value within rounding of an edge may be on its other side.
    """
    index = bins.flatten().ceil().clamp(0, len(edges)).nan_to_num(len(edges)).long()
    return torch.zeros(len(edges) + 1, dtype=dtype, device=bins.device).scatter_add_(
        0, index, counted.flatten().to(dtype)
    )


def _quantile(histogram: Tensor, quantile: float) -> float:
    reached = (histogram.cumsum(0) >= quantile * histogram.sum()).nonzero()[0].item()
    return 0.0 if reached == 0 else DIVERGENCE_EDGES[min(int(reached), len(DIVERGENCE_EDGES) - 1)].item()


def _scalars(total: dict[str, float], largest: dict[str, float], divergence_histogram: Tensor) -> dict[str, float]:
    tokens = total["tokens"]
    ratio = total["excess"] + tokens
    ratio_squared = total["excess_squared"] + 2 * total["excess"] + tokens
    scalars = {
        "ratio/mean": ratio / tokens,
        "ratio/max": largest["ratio"],
        "divergence/mean": total["divergence"] / tokens,
        "divergence/max": largest["divergence"],
        "kl/k1": -total["log_ratio"] / tokens,
        "kl/k3": total["k3"] / tokens,
        "effective_sample_size": ratio**2 / (tokens * ratio_squared),
    }
    for name, quantile in QUANTILES.items():
        scalars[f"divergence/{name}"] = min(_quantile(divergence_histogram, quantile), largest["divergence"])
    if "entropy" in total:
        scalars["entropy"] = total["entropy"] / tokens
    steered = sum(total[f"tokens_{sign}"] for sign in _SIGNS)
    if steered:
        scalars["weight/mean"] = total["weight"] / steered
    for sign in _SIGNS:
        for effect in _EFFECTS:
            if total[f"tokens_{sign}"]:
                scalars[f"weight/{effect}_{sign}"] = total[f"{effect}_{sign}"] / total[f"tokens_{sign}"]
    return scalars
