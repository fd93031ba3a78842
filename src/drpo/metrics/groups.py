"""Where the distance from the behaviour policy sits: by the sign of A, by μ, in log-ratios; sums in, numbers out."""

from __future__ import annotations

import torch
from torch import Tensor

from drpo.metrics.effects import SIGNS
from drpo.metrics.histograms import (
    DIVERGENCE_EDGES,
    LOG_RATIO_EDGES,
    divergence_bins,
    histogram,
    log_ratio_bins,
    quantile,
)
from drpo.tokens import TokenBatch

BUCKETS = {"mu_to_0.01": 0.01, "mu_to_0.1": 0.1, "mu_to_0.5": 0.5, "mu_to_0.9": 0.9, "mu_to_1": 1.0}
"""μ of a token, by the upper end of its bucket; each begins where the one before it ends."""

LOG_RATIO_QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}

_BINS = len(DIVERGENCE_EDGES) + 1


def sums(batch: TokenBatch, dtype: torch.dtype) -> dict[str, Tensor]:
    """What adds up over batches, of tokens [B, T]."""
    counted = batch.mask
    divergence = torch.where(counted, batch.shift.abs(), 0.0).to(dtype)
    bins = divergence_bins(divergence)
    bucket = find_bucket(batch.anchor_prob)
    parts = {
        "histogram_bucket": histogram(bucket * _BINS + bins, len(BUCKETS) * _BINS, counted, dtype),
        "divergence_bucket": torch.zeros(len(BUCKETS), dtype=dtype, device=bins.device).scatter_add_(
            0, bucket.long(), divergence.flatten()
        ),
        "log_ratio": batch.log_ratio.sum(dtype=dtype),
        "log_ratio_histogram": histogram(log_ratio_bins(batch.log_ratio), len(LOG_RATIO_EDGES) + 1, counted, dtype),
    }
    for sign, has_sign in zip(SIGNS, (batch.advantage > 0, batch.advantage < 0), strict=True):
        steered = counted & has_sign
        parts[f"histogram_{sign}"] = histogram(bins, _BINS, steered, dtype)
        parts[f"divergence_{sign}"] = torch.where(steered, divergence, 0.0).sum()
    return parts


def extremes(batch: TokenBatch) -> dict[str, Tensor]:
    """What combines over batches by maximum: of |π − μ| in each group, signs first, and of log-ratios; and the negated least ones."""
    divergence = batch.shift.abs()
    # By its sign, a token is in the first, the second or, without advantage, none of the groups.
    sign = torch.where(batch.advantage > 0, 0, torch.where(batch.advantage < 0, 1, len(SIGNS)))
    bucket = find_bucket(batch.anchor_prob)
    maxima = {}
    for name, factor in (("largest", 1), ("least", -1)):
        distance, log_ratio = (
            torch.where(batch.mask, factor * values, -torch.inf).flatten() for values in (divergence, batch.log_ratio)
        )
        by_sign = _largest(distance, sign.flatten(), len(SIGNS) + 1)[: len(SIGNS)]
        maxima[f"{name}_divergence"] = torch.cat([by_sign, _largest(distance, bucket, len(BUCKETS))])
        maxima[f"{name}_log_ratio"] = _largest(log_ratio, torch.zeros_like(bucket), 1)
    return maxima


def _largest(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Of each group, -inf where it is empty."""
    return values.new_full((groups,), -torch.inf).scatter_reduce_(0, group.long(), values, "amax")


def find_bucket(behavior_prob: Tensor) -> Tensor:
    """The place of each token's μ among :data:`BUCKETS`, flat; the last one takes a μ that rounding puts above 1."""
    edges = behavior_prob.new_tensor([*BUCKETS.values()][:-1])
    return torch.bucketize(behavior_prob.flatten(), edges, out_int32=True)


def scalars(total: dict[str, Tensor], extremes: dict[str, Tensor]) -> dict[str, float]:
    """What the sums and the extremes say, by name; what does not apply is absent.

    ``divergence/mean_GROUP`` and ``divergence/p99_GROUP`` of |π − μ| where the group is a sign of
    A or one of :data:`BUCKETS`, and ``tokens/BUCKET``, the share of tokens in it;
    ``log_ratio/p01`` | ``p50`` | ``p99``, of log π − log μ in nats.
    """
    metrics = {}
    least, largest = -extremes["least_log_ratio"].item(), extremes["largest_log_ratio"].item()
    log_ratios = total["log_ratio_histogram"]
    mean = (total["log_ratio"] / log_ratios.sum()).item()
    for name, share in LOG_RATIO_QUANTILES.items():
        metrics[f"log_ratio/{name}"] = quantile(
            log_ratios, LOG_RATIO_EDGES, share, least=least, largest=largest, mean=mean
        )
    by_bucket = total["histogram_bucket"].view(len(BUCKETS), _BINS)
    counted = [*(total[f"histogram_{sign}"] for sign in SIGNS), *by_bucket]
    distances = [*(total[f"divergence_{sign}"] for sign in SIGNS), *total["divergence_bucket"]]
    least, largest = (-extremes["least_divergence"]).tolist(), extremes["largest_divergence"].tolist()
    for group, name in enumerate((*SIGNS, *BUCKETS)):
        tokens = counted[group].sum().item()
        if name in BUCKETS:
            metrics[f"tokens/{name}"] = tokens / by_bucket.sum().item()
        if tokens:
            mean = distances[group].item() / tokens
            metrics[f"divergence/mean_{name}"] = mean
            metrics[f"divergence/p99_{name}"] = quantile(
                counted[group], DIVERGENCE_EDGES, 0.99, least=least[group], largest=largest[group], mean=mean
            )
    return metrics
