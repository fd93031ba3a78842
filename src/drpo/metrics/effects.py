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


def sums(batch: TokenBatch, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What adds up over batches, in ``dtype``, of tokens [B, T] and their gradient weights [B, T]."""
    counted = batch.mask
    steered = counted & (batch.advantage != 0)
    # A token's share in the plain policy gradient, and what the objective takes from it or adds.
    plain = (batch.advantage.abs() * batch.ratio).masked_fill(~steered, 0.0)
    affected = {
        "attenuated": (weight > UNCHANGED) & (weight < 1 - UNCHANGED),
        "zeroed": weight.abs() <= UNCHANGED,
        "reversed": weight < -UNCHANGED,
        "amplified": weight > 1 + UNCHANGED,
    }
    found = {
        "weight": weight.masked_fill(~steered, 0.0).sum(dtype=dtype),
        "plain": plain.sum(dtype=dtype),
        "regularised": (plain * (weight - 1).masked_fill(~steered, 0.0).abs()).sum(dtype=dtype),
        "weight_histogram": histogram(weight_bins(weight), len(WEIGHT_EDGES) + 1, steered, dtype),
    }
    positive = counted & (batch.advantage > 0)
    for sign, of_sign in zip(SIGNS, (positive, steered ^ positive), strict=True):
        found[f"tokens_{sign}"] = of_sign.sum().to(dtype)
        for effect in EFFECTS:
            found[f"{effect}_{sign}"] = (affected[effect] & of_sign).sum().to(dtype)
    return found


def scalars(total: dict[str, float]) -> dict[str, float]:
    """What the sums say, by name; what does not apply is absent.

    ``weight/mean``; ``weight/EFFECT_SIGN``, the share of the tokens whose advantage has that sign
    that the objective attenuates (0 < w < 1), zeroes, reverses (w < 0) or amplifies (w > 1);
    ``regulariser/strength``, Σ|A|·r·|w − 1| / Σ|A|·r: how much of the plain policy gradient the
    objective takes away or adds.
    """
    found = {}
    steered = sum(total[f"tokens_{sign}"] for sign in SIGNS)
    if steered:
        found["weight/mean"] = total["weight"] / steered
    for sign in SIGNS:
        for effect in EFFECTS:
            if total[f"tokens_{sign}"]:
                found[f"weight/{effect}_{sign}"] = total[f"{effect}_{sign}"] / total[f"tokens_{sign}"]
    if total["plain"]:
        found["regulariser/strength"] = total["regularised"] / total["plain"]
    return found
