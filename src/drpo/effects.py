"""What an objective does to tokens, from their gradient weights alone: sums in, shares out."""

from __future__ import annotations

import torch
from torch import Tensor

from drpo.histograms import WEIGHT_EDGES, bin_of, histogram
from drpo.tokens import TokenBatch

UNCHANGED = 1e-3
"""A weight within this of 1 counts as unchanged, within this of 0 as zeroed."""

SIGNS = ("positive", "negative")
EFFECTS = ("attenuated", "zeroed", "reversed", "amplified")


def sums(batch: TokenBatch, weight: Tensor) -> dict[str, Tensor]:
    """What adds up over batches, of tokens [B, T] and their gradient weights [B, T] in the dtype to sum in."""
    dtype, counted = weight.dtype, batch.mask
    steered = counted & (batch.advantage != 0)
    # A token's share in the plain policy gradient, and what the objective takes from it or adds.
    plain = torch.where(counted, batch.advantage.abs() * batch.ratio, 0.0).to(dtype)
    affected = {
        "attenuated": (weight > UNCHANGED) & (weight < 1 - UNCHANGED),
        "zeroed": weight.abs() <= UNCHANGED,
        "reversed": weight < -UNCHANGED,
        "amplified": weight > 1 + UNCHANGED,
    }
    found = {
        "weight": torch.where(steered, weight, 0.0).sum(),
        "plain": plain.sum(),
        "regularised": torch.where(steered, plain * (weight - 1).abs(), 0.0).sum(),
        "weight_histogram": histogram(bin_of(weight, WEIGHT_EDGES), len(WEIGHT_EDGES) + 1, steered, dtype),
    }
    for sign, has_sign in zip(SIGNS, (batch.advantage > 0, batch.advantage < 0), strict=True):
        of_sign = counted & has_sign
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
