"""From per-token losses to one number: every reduction is a weight per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from drpo.registry import unknown_name

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
"""verl's names. A sequence is a row with at least one token that counts."""


@dataclass(frozen=True)
class Counts:
    """How many tokens and sequences count in a whole update, over all its micro-batches and ranks.

    Args:
        tokens: scalar, tokens that count.
        sequences: scalar, rows with at least one of them.
    """

    tokens: Tensor
    sequences: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Counts:
        """The counts of one mask [B, T]."""
        return cls(tokens=mask.bool().sum(), sequences=mask.bool().any(dim=1).sum())


def token_scale(
    mask: Tensor,
    mode: Aggregation = "token-mean",
    *,
    counts: Counts | None = None,
    horizon: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of each token's loss in the sum, [B, T] of ``dtype``; 0 where masked.

    With the counts of the whole update, the scaled losses of its micro-batches and ranks add up
    to the loss of the update, however it was split.

    Args:
        mask: [B, T].
        mode: ``token-mean``, the mean over tokens; ``seq-mean-token-sum`` and
            ``seq-mean-token-mean``, the sum or mean over a sequence's tokens, averaged over
            sequences; ``seq-mean-token-sum-norm``, the sum divided by ``horizon``, averaged.
        counts: of the whole update; the mask's own by default.
        horizon: tokens, the fixed length that ``seq-mean-token-sum-norm`` divides by.
    """
    if mode not in get_args(Aggregation):
        raise ValueError(unknown_name("aggregation", mode, get_args(Aggregation)))
    if (horizon is not None) != (mode == "seq-mean-token-sum-norm"):
        raise ValueError(
            f"horizon is {horizon} with aggregation {mode!r}; seq-mean-token-sum-norm needs one, the others take none"
        )
    if horizon is not None and horizon <= 0:
        raise ValueError(f"horizon is {horizon}; expected a number of tokens > 0")
    counts = counts or Counts.of(mask)
    mask = mask.bool().to(dtype)
    if mode == "token-mean":
        return mask / counts.tokens.clamp(min=1)
    per_sequence = mask / counts.sequences.clamp(min=1)
    if mode == "seq-mean-token-sum":
        return per_sequence
    if mode == "seq-mean-token-mean":
        return per_sequence / mask.sum(dim=1, keepdim=True).clamp(min=1)
    assert horizon is not None
    return per_sequence / horizon


def aggregate(
    loss: Tensor,
    mask: Tensor,
    mode: Aggregation = "token-mean",
    *,
    counts: Counts | None = None,
    horizon: int | None = None,
) -> Tensor:
    """Per-token losses [B, T] reduced to a scalar; arguments as in :func:`token_scale`."""
    if loss.shape != mask.shape:
        raise ValueError(f"loss has shape {tuple(loss.shape)}; expected {tuple(mask.shape)}, like mask")
    scale = token_scale(
        mask, mode, counts=counts, horizon=horizon, dtype=torch.promote_types(loss.dtype, torch.float32)
    )
    return torch.where(mask.bool(), loss * scale, 0.0).sum()
