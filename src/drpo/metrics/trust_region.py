"""Ratio, divergence and gradient weights of an update's tokens, in sums that add up over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drpo.metrics import effects
from drpo.metrics import groups as breakdown
from drpo.metrics.histograms import DIVERGENCE_EDGES, WEIGHT_EDGES, divergence_bins, histogram, quantile
from drpo.tokens import TokenBatch

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class TrustRegion:
    """Measurements over all tokens seen.

    Args:
        scalars: by name. ``ratio/mean``, ``ratio/max``; ``divergence/mean`` | ``p50`` | ``p90`` |
            ``p99`` | ``max``, of |π − μ|; ``kl/k1``, ``kl/k3``, estimates of KL(μ‖π) in nats;
            ``chi_squared``, mean (r − 1)², of χ²(π‖μ); ``perplexity_ratio``, exp(mean(log μ − log π)), π's perplexity over
            μ's; ``effective_sample_size``, (Σr)² / (N·Σr²); ``entropy`` in nats; and those of
            :func:`drpo.metrics.effects.scalars` and :func:`drpo.metrics.groups.scalars`. A measurement that does
            not apply is absent; of no tokens, all are.
        divergence_histogram: tokens by |π − μ|, between :data:`DIVERGENCE_EDGES` and one bin at either end.
        weight_histogram: tokens with A ≠ 0 by gradient weight, between :data:`WEIGHT_EDGES` and
            one bin at either end.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    divergence_histogram: list[int] = field(default_factory=lambda: [0] * (len(DIVERGENCE_EDGES) + 1))
    weight_histogram: list[int] = field(default_factory=lambda: [0] * (len(WEIGHT_EDGES) + 1))


class TrustRegionMetrics:
    """Accumulates sums, counts and maxima over batches, so that splits into micro-batches and ranks combine exactly.

    Args:
        by_group: measure where the distance from μ sits too (:mod:`drpo.metrics.groups`), which on long batches
            takes about twice as long as all else.
    """

    def __init__(self, by_group: bool = True) -> None:
        self._by_group = by_group
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, batch: TokenBatch, weight: Tensor | None = None, entropy: Tensor | None = None) -> None:
        """Add the tokens of a batch. Distances are of π from the sampler's μ, whatever the batch's anchor; effects by the objective's own ratio.

        Args:
            batch: the tokens, [B, T].
            weight: [B, T], the objective's gradient weight, in every call or in none; without, its effects are not measured.
            entropy: [B, T], of π at each token, in nats; the same choice in every call.
        """
        # MPS has no fp64. Everything is summed in it, and but for k3 nothing else has to be.
        dtype = torch.float32 if batch.logp.device.type == "mps" else torch.float64
        by_objective, batch = batch, batch.against("sampler")
        counted = batch.mask
        excess, divergence, log_ratio = batch.excess, batch.shift.abs(), batch.log_ratio.to(dtype)
        # Where a token does not count its log-probs are 0, and so is each of these.
        per_token = {
            "excess": excess,
            "excess_squared": excess.square(),
            "divergence": divergence,
            "log_ratio": log_ratio,
            "k3": log_ratio.expm1() - log_ratio,
        }
        if entropy is not None:
            per_token["entropy"] = entropy.masked_fill(~counted, 0.0)
        sums = {name: value.sum(dtype=dtype) for name, value in per_token.items()}
        sums["tokens"] = counted.sum()
        bins = divergence_bins(divergence)
        sums["divergence_histogram"] = histogram(bins, len(DIVERGENCE_EDGES) + 1, counted, dtype)
        if weight is not None:
            sums |= _within("effects", effects.sums(by_objective, weight, dtype))
        if self._by_group:
            sums |= _within("breakdown", breakdown.sums(batch, dtype))
        maxima = {
            "ratio": _largest(excess.masked_fill(~counted, -1.0), least=-1.0) + 1,
            "divergence": _largest(divergence, least=0.0),
            "negated_divergence": _largest((-divergence).masked_fill(~counted, -torch.inf), least=-torch.inf),
        }
        if self._by_group:
            maxima |= _within("breakdown", breakdown.extremes(batch))
        self._sums = {name: self._sums.get(name, 0) + value for name, value in sums.items()}
        self._maxima |= {name: torch.maximum(self._maxima.get(name, value), value) for name, value in maxima.items()}

    def compute(self, gather: Callable[[Tensor], Tensor] = lambda t: t) -> TrustRegion:
        """Everything measured since the last reset.

        Args:
            gather: concatenates a one-dimensional tensor over ranks, as ``Accelerator.gather`` does.
        """
        if not self._sums:
            return TrustRegion()
        sums = torch.cat([value.flatten() for value in self._sums.values()])
        maxima = torch.cat([value.flatten() for value in self._maxima.values()])
        sums = gather(sums).view(-1, sums.numel()).sum(dim=0)
        maxima = gather(maxima).view(-1, maxima.numel()).amax(dim=0)
        # The one place where the device is waited for.
        values = torch.cat([sums, maxima]).cpu()
        totals, largest = _split(values[: sums.numel()], self._sums), _split(values[sums.numel() :], self._maxima)
        if not totals["tokens"]:
            return TrustRegion()
        of_groups, of_effects = _of("breakdown", totals), _of("effects", totals)
        extremes_of_groups = _of("breakdown", largest)
        histograms = {"divergence_histogram": totals.pop("divergence_histogram")}
        scalars = _scalars(_numbers(totals), _numbers(largest), histograms["divergence_histogram"])
        if of_effects:
            histograms["weight_histogram"] = of_effects.pop("weight_histogram")
            scalars |= effects.scalars(_numbers(of_effects))
        if self._by_group:
            scalars |= breakdown.scalars(of_groups, extremes_of_groups)
        return TrustRegion(scalars, **{name: counts.long().tolist() for name, counts in histograms.items()})

    def reset(self) -> None:
        self._sums, self._maxima = {}, {}


def _largest(values: Tensor, least: float) -> Tensor:
    return values.amax() if values.numel() else values.new_tensor(least)


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
        "chi_squared": total["excess_squared"] / tokens,
        "perplexity_ratio": math.exp(-total["log_ratio"] / tokens),
    }
    least, most = -largest["negated_divergence"], largest["divergence"]
    for name, share in QUANTILES.items():
        scalars[f"divergence/{name}"] = quantile(
            divergence_histogram,
            DIVERGENCE_EDGES,
            share,
            least=least,
            largest=most,
            mean=scalars["divergence/mean"],
        )
    # Where π has left every token, all ratios are 0 to rounding.
    if ratio_squared > 0:
        scalars["effective_sample_size"] = ratio**2 / (tokens * ratio_squared)
    if "entropy" in total:
        scalars["entropy"] = total["entropy"] / tokens
    return scalars


def _split(values: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One flat tensor in the parts, and by the names, of others."""
    return dict(zip(like, values.split([value.numel() for value in like.values()]), strict=True))


def _numbers(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: tensor.item() for name, tensor in tensors.items()}


def _within(part: str, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}/{name}": value for name, value in sums.items()}


def _of(part: str, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of a part by their own names, taken out of the others."""
    return {name.removeprefix(f"{part}/"): sums.pop(name) for name in list(sums) if name.startswith(f"{part}/")}
