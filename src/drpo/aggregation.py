"""From per-token losses to one number: every reduction is a weight per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from drpo.registry import unknown_name

Aggregation = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "prompt-mean"
]
"""verl's names, and ``prompt-mean``. A sequence is a row with at least one token that counts."""


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
    mean_lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of each token's loss in the sum, [B, T] of ``dtype``; 0 where masked.

    With the counts of the whole update, the scaled losses of its micro-batches and ranks add up
    to the loss of the update, however it was split.

    Args:
        mask: [B, T].
        mode: ``token-mean``, the mean over tokens; ``seq-mean-token-sum`` and
            ``seq-mean-token-mean``, the sum or mean over a sequence's tokens, averaged over
            sequences; ``seq-mean-token-sum-norm``, the sum divided by ``horizon``, averaged;
            ``prompt-mean``, the mean over the tokens of all completions of a prompt, averaged over prompts, each as often as
            it has completions that count, so that neither long completions nor prompts with long ones weigh more.
        counts: of the whole update; the mask's own by default.
        horizon: tokens, the fixed length that ``seq-mean-token-sum-norm`` divides by.
        mean_lengths: [B], for ``prompt-mean``: those of :func:`mean_lengths_by_prompt`.

    Raises:
        ValueError: an unknown mode, or one without what it needs or with what another needs.
    """
    check_aggregation(mode, horizon)
    if (mean_lengths is not None) != (mode == "prompt-mean"):
        raise ValueError(f"mean_lengths with aggregation {mode!r}: prompt-mean needs them, the others take none")
    counts = counts or Counts.of(mask)
    mask = mask.bool().to(dtype)
    if mode == "token-mean":
        return mask / counts.tokens.clamp(min=1)
    per_sequence = mask / counts.sequences.clamp(min=1)
    if mode == "seq-mean-token-sum":
        return per_sequence
    if mode == "seq-mean-token-mean":
        return per_sequence / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if mean_lengths is not None:
        return per_sequence / mean_lengths.to(dtype).clamp(min=1).unsqueeze(1)
    assert horizon is not None
    return per_sequence / horizon


def check_aggregation(mode: Aggregation, horizon: int | None) -> None:
    """Check that a mode is known, and has a horizon where it needs one.

    Raises:
        ValueError: it is not so.
    """
    if mode not in get_args(Aggregation):
        raise ValueError(unknown_name("aggregation", mode, get_args(Aggregation)))
    if (horizon is not None) != (mode == "seq-mean-token-sum-norm"):
        raise ValueError(
            f"horizon is {horizon} with aggregation {mode!r}; seq-mean-token-sum-norm needs one, the others take none"
        )
    if horizon is not None and horizon <= 0:
        raise ValueError(f"horizon is {horizon}; expected a number of tokens > 0")


def mean_lengths_by_prompt(lengths: Tensor, group_size: int) -> Tensor:
    """How many tokens that count the average completion of each sequence's prompt has, [B].

    Args:
        lengths: [B], tokens that count of each sequence, those of one prompt together; one of 0 is no sequence.
        group_size: completions a prompt.
    """
    of_groups = lengths.view(-1, group_size)
    means = of_groups.sum(dim=1) / (of_groups > 0).sum(dim=1).clamp(min=1)
    return means.repeat_interleave(group_size)


def aggregate(
    loss: Tensor,
    mask: Tensor,
    mode: Aggregation = "token-mean",
    *,
    counts: Counts | None = None,
    horizon: int | None = None,
    mean_lengths: Tensor | None = None,
) -> Tensor:
    """Per-token losses [B, T] reduced to a scalar; arguments as in :func:`token_scale`."""
    if loss.shape != mask.shape:
        raise ValueError(f"loss has shape {tuple(loss.shape)}; expected {tuple(mask.shape)}, like mask")
    dtype = torch.promote_types(loss.dtype, torch.float32)
    scale = token_scale(mask, mode, counts=counts, horizon=horizon, mean_lengths=mean_lengths, dtype=dtype)
    return torch.where(mask.bool(), loss * scale, 0.0).sum()
