"""The row pass of :mod:`drpo.kernels.softmax` as a Triton kernel: one program a row, two reads of it and one write."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from drpo.kernels.logits import LogitTransform

BLOCK = 4096


def differentiate_rows(
    logits: Tensor, token_ids: Tensor, transform: LogitTransform, logp: Tensor, entropy: Tensor, gradient: Tensor
) -> None:
    """Fill ``logp``, ``entropy`` [M] and ``gradient`` [M, V], which may be the logits themselves."""
    if not len(logits):
        return
    softcap = transform.softcap
    kernel: Any = _differentiate
    kernel[(len(logits),)](
        logits,
        logits.stride(0),
        token_ids.contiguous(),
        logp,
        entropy,
        gradient,
        gradient.stride(0),
        transform.slope,
        transform.scale / softcap if softcap else 1.0,
        softcap / transform.temperature if softcap else 1.0,
        VOCABULARY=logits.shape[1],
        HAS_SOFTCAP=softcap is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])),
    )


@triton.jit
def _transformed(x, slope, inner, outer, HAS_SOFTCAP: tl.constexpr):
    if HAS_SOFTCAP:
        # tanh(x) = 2·sigmoid(2x) − 1
        return outer * (2 * tl.sigmoid(2 * inner * x) - 1)
    return slope * x


@triton.jit
def _differentiate(
    logits_ptr,
    logits_stride,
    token_ids_ptr,
    logp_ptr,
    entropy_ptr,
    gradient_ptr,
    gradient_stride,
    slope,
    inner,
    outer,
    VOCABULARY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Under torch.compile numbers of Python come as fp64.
    slope, inner, outer = tl.cast(slope, tl.float32), tl.cast(inner, tl.float32), tl.cast(outer, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * logits_stride
    gradient_row = gradient_ptr + row * gradient_stride
    token = tl.load(token_ids_ptr + row)
    # Read before anything is written: the gradient may take the logits' place.
    token_logit = _transformed(tl.load(logits_row + token).to(tl.float32), slope, inner, outer, HAS_SOFTCAP)

    largest = -float("inf")
    total = 0.0
    total_logit = 0.0
    for start in range(0, VOCABULARY, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < VOCABULARY
        x = tl.load(logits_row + columns, mask=inside, other=0.0).to(tl.float32)
        z = _transformed(x, slope, inner, outer, HAS_SOFTCAP)
        new_largest = tl.maximum(largest, tl.max(tl.where(inside, z, -float("inf")), axis=0))
        # Where all logits so far are −inf there is no mass, and no difference of infinities either.
        reference = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        shrink = tl.exp(largest - reference)
        mass = tl.where(inside, tl.exp(z - reference), 0.0)
        total = total * shrink + tl.sum(mass, axis=0)
        total_logit = total_logit * shrink + tl.sum(mass * tl.where(mass > 0, z, 0.0), axis=0)
        largest = new_largest
    # Differences from the largest logit keep the digits that log Σ exp z has not.
    tl.store(logp_ptr + row, token_logit - largest - tl.log(total))
    tl.store(entropy_ptr + row, largest - total_logit / total + tl.log(total))

    for start in range(0, VOCABULARY, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < VOCABULARY
        x = tl.load(logits_row + columns, mask=inside, other=0.0).to(tl.float32)
        z = _transformed(x, slope, inner, outer, HAS_SOFTCAP)
        gradient = tl.exp(z - largest) / total - tl.where(columns == token, 1.0, 0.0)
        if HAS_SOFTCAP:
            tanh = z / outer
            gradient *= 1 - tanh * tanh
        tl.store(gradient_row + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
