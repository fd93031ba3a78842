"""From a block of logits to log-probs, entropies and the gradient of each log-prob, row by row and in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drpo.kernels.logits import LogitTransform

BLOCK_BYTES = 4 * 2**20
"""Logits that are worked on at a time: they stay in a core's cache from the first operation to the last."""


class Rows(NamedTuple):
    """Of each token: log π and the entropy of its distribution, in nats, [M] each, and −∂log π/∂x over the slope, [M, V]."""

    logp: Tensor
    entropy: Tensor
    gradient: Tensor


def differentiate(logits: Tensor, token_ids: Tensor, transform: LogitTransform, dtype: torch.dtype) -> Rows:
    """Score tokens and differentiate their log-probs by the logits.

    On a GPU by a Triton kernel in fp32, elsewhere and of fp64 logits by PyTorch, in fp64 of those.

    Args:
        logits: [M, V], the LM head's output x; destroyed.
        token_ids: [M].
        transform: what the model makes of x.
        dtype: of the gradient, which takes the place of the logits if it is theirs.
    """
    gradient = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    precise = torch.promote_types(logits.dtype, torch.float32)
    logp, entropy = (torch.empty(len(logits), dtype=precise, device=logits.device) for _ in range(2))
    if logits.is_cuda and logits.dtype != torch.float64:
        from drpo.kernels.softmax_triton import differentiate_rows

        differentiate_rows(logits, token_ids, transform, logp, entropy, gradient)
    else:
        _differentiate_blocks(logits, token_ids, transform, logp, entropy, gradient)
    return Rows(logp, entropy, gradient)


def _differentiate_blocks(
    logits: Tensor, token_ids: Tensor, transform: LogitTransform, logp: Tensor, entropy: Tensor, gradient: Tensor
) -> None:
    size = max(1, BLOCK_BYTES // (logits.shape[1] * logp.element_size()))
    scratch, softmax = logp.new_empty(2, min(size, len(logits)), logits.shape[1])
    for x, ids, block_logp, block_entropy, block in zip(
        *(tensor.split(size) for tensor in (logits, token_ids.unsqueeze(1), logp, entropy, gradient)), strict=True
    ):
        z = transform(scratch[: len(x)].copy_(x))
        probs = torch.softmax(z, dim=1, out=softmax[: len(x)])
        # Differences from the largest logit keep the digits that log Σ exp z has not. The likeliest token's probability is at least 1/V.
        largest, log_peak = z.amax(dim=1), probs.amax(dim=1).log()
        torch.add(z.gather(1, ids).squeeze(1) - largest, log_peak, out=block_logp)
        damping = None if transform.softcap is None else transform.damping(z)
        torch.sub(largest - z.mul_(probs).sum(dim=1), log_peak, out=block_entropy)
        probs.scatter_add_(1, ids, probs.new_full(ids.shape, -1.0))
        if damping is not None:
            probs.mul_(damping)
        block.copy_(probs)
