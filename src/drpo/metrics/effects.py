"""What an objective does to tokens, from their gradient weights alone: sums in, shares out."""

from __future__ import annotations

import torch
from torch import Tensor

from drpo.metrics.histograms import WEIGHT_EDGES, histogram, weight_bins
from drpo.tokens import TokenBatch

UNCHANGED = 1e-3
"""A weight within this of 1 counts as unchanged, within this of 0 as zeroed."""

SIGNS = ("positive", "negative")
EFFECTS = ("attenuated", "zeroed", "reversed", "amplified")
KINDS = ("unchanged", *EFFECTS)
"""What a gradient weight may do to a token, with nothing first."""


def kinds(weight: Tensor) -> Tensor:
    """What each gradient weight does, int64, by its place in :data:`KINDS`."""
    attenuated, zeroed, is_reversed, amplified = range(1, len(KINDS))
    kind = torch.where(weight < 1, attenuated, amplified)
    kind = torch.where(weight < 0, is_reversed, kind)
    kind = torch.where(weight.abs() <= UNCHANGED, zeroed, kind)
    return torch.where((weight - 1).abs() <= UNCHANGED, 0, kind)


def counts_by_group(group: Tensor, weight: Tensor, groups: int) -> Tensor:
    """How many tokens of each group each kind of weight has, int64, [groups, kinds].

    Args:
        group: of each token, [N], from 0 to ``groups`` − 1.
        weight: its gradient weight, [N].
        groups: how many there are.
    """
    places = group * len(KINDS) + kinds(weight)
    return torch.bincount(places, minlength=groups * len(KINDS)).view(groups, len(KINDS))


def sums(batch: TokenBatch, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What adds up over batches, in ``dtype``, of tokens [B, T] and their gradient weights [B, T]."""
    counted = batch.mask
    steered = counted & (batch.advantage != 0)
    # A token's share in the plain policy gradient, and what the objective takes from it or adds.
    plain = (batch.advantage.abs() * batch.ratio).masked_fill(~steered, 0.0)
    kind = kinds(weight)
    parts = {
        "weight": weight.masked_fill(~steered, 0.0).sum(dtype=dtype),
        "plain": plain.sum(dtype=dtype),
        "regularised": (plain * (weight - 1).masked_fill(~steered, 0.0).abs()).sum(dtype=dtype),
        "weight_histogram": histogram(weight_bins(weight), len(WEIGHT_EDGES) + 1, steered, dtype),
    }
    positive = counted & (batch.advantage > 0)
    for sign, of_sign in zip(SIGNS, (positive, steered ^ positive), strict=True):
        parts[f"tokens_{sign}"] = of_sign.sum().to(dtype)
        counts = histogram(kind.flatten(), len(KINDS), of_sign, dtype)
        parts |= {f"{effect}_{sign}": count for effect, count in zip(EFFECTS, counts[1:], strict=True)}
    return parts


def scalars(total: dict[str, float]) -> dict[str, float]:
    """What the sums say, by name; what does not apply is absent.

    ``weight/mean``; ``weight/EFFECT_SIGN``, the share of the tokens whose advantage has that sign
    that the objective attenuates (0 < w < 1), zeroes, reverses (w < 0) or amplifies (w > 1);
    ``regulariser/strength``, Σ|A|·r·|w − 1| / Σ|A|·r: how much of the plain policy gradient the
    objective takes away or adds.
    """
    metrics = {}
    steered = sum(total[f"tokens_{sign}"] for sign in SIGNS)
    if steered:
        metrics["weight/mean"] = total["weight"] / steered
    for sign in SIGNS:
        for effect in EFFECTS:
            if total[f"tokens_{sign}"]:
                metrics[f"weight/{effect}_{sign}"] = total[f"{effect}_{sign}"] / total[f"tokens_{sign}"]
    if total["plain"]:
        metrics["regulariser/strength"] = total["regularised"] / total["plain"]
    return metrics
