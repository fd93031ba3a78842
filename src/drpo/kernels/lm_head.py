"""The LM head: its logits, and the gradients of hidden states, weight and bias, added up chunk by chunk."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from drpo.kernels.logits import LogitTransform

CHUNK_BYTES = {"cpu": 40 * 2**20, "cuda": 1536 * 2**20}
"""Logits and their gradient in memory at once, by device type. More makes the products more efficient."""

CACHE_LINE = 64
"""In bytes."""


class Head(NamedTuple):
    """An LM head in the dtype that products run in: weight [V, D], bias [V], and what is made of its output."""

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform

    def logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The tokens in as few chunks as fit into memory, and the logits [M, V] of each, before the transform.

        The next chunk's take the place of the last one's.
        """
        # Half-precision states have fp32 logits where the device can, and a gradient beside them.
        wide = hidden.is_cuda and hidden.dtype.itemsize < 4
        dtype = torch.float32 if wide else hidden.dtype
        per_logit = dtype.itemsize + (hidden.dtype.itemsize if wide else 0)
        budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
        most = max(1, budget // (len(self.weight) * per_logit))
        chunks = math.ceil(len(hidden) / most)
        if not chunks:
            return
        size = math.ceil(len(hidden) / chunks)
        if hidden.device.type != "cpu":
            buffer = hidden.new_empty(size, len(self.weight), dtype=dtype)
        elif chunks > 1:
            buffer = workspace(threading.get_ident(), most, len(self.weight), dtype)
        else:
            buffer = _apart(size, len(self.weight), dtype)
        for start in range(0, len(hidden), size):
            rows = slice(start, min(start + size, len(hidden)))
            logits = buffer[: rows.stop - start]
            if self.bias is None or wide:
                _multiply(hidden[rows], self.weight.t(), out=logits)
                if self.bias is not None:
                    logits.add_(self.bias)
            else:
                # Addition within the product rounds once.
                torch.addmm(self.bias, hidden[rows], self.weight.t(), out=logits)
            yield rows, logits


@lru_cache(maxsize=1)
def workspace(thread: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The chunk of a thread, kept from one call to the next: a CPU takes a while to hand out fresh memory."""
    # What is made in inference mode can be written to only there.
    with torch.inference_mode(False):
        return _apart(rows, columns, dtype)


def _apart(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    # Rows a power of two apart meet in the same few places of a CPU's caches, which products take longer for.
    wider = torch.empty(rows, columns + CACHE_LINE // dtype.itemsize, dtype=dtype)
    # oneDNN's bf16 products on AMX read past the end of a row and multiply what is there by 0: it must be no NaN.
    wider[:, columns:] = 0
    return wider[:, :columns]


class Gradients:
    """Of a loss by hidden states [N, D], weight [V, D] and bias [V]; those that are not needed are never computed.

    Weight and bias add up in fp32 at least. The gradient of fp16 hidden states is kept in fp32:
    coefficients may exceed fp16's range before the loss is scaled.
    """

    def __init__(self, hidden: Tensor, head: Head, needed: tuple[bool, bool, bool]) -> None:
        self._states, self._head = hidden, head
        self._needs_hidden, self._needs_weight, self._needs_bias = needed
        self._precise = precise = torch.promote_types(hidden.dtype, torch.float32)
        dtype = precise if hidden.dtype == torch.float16 else hidden.dtype
        self._hidden = torch.zeros_like(hidden, dtype=dtype) if self._needs_hidden else None
        self._bias = torch.zeros_like(head.weight[:, 0], dtype=precise) if self._needs_bias else None
        self._weight: Tensor | None = None

    def add(self, rows: slice, gradient: Tensor, coefficient: Tensor) -> None:
        """Add those of one chunk.

        Args:
            rows: where the chunk is among the hidden states.
            gradient: [M, V], of each token's −log π by the logits, over the transform's slope; destroyed.
            coefficient: [M], what each token's −log π counts in the loss. Tokens with 0 cost nothing.
        """
        kept = _to_front(gradient, coefficient != 0)
        if not len(kept):
            return
        gradient = gradient[: len(kept)]
        coefficient = (coefficient[kept].unsqueeze(1) * self._head.transform.slope).to(self._precise)
        if self._hidden is not None:
            by_hidden = _multiply(gradient, self._head.weight) * coefficient
            self._hidden[rows].index_copy_(0, kept, by_hidden.to(self._hidden.dtype))
        if self._bias is not None:
            self._bias += coefficient.squeeze(1) @ gradient.to(self._precise)
        if self._needs_weight:
            states = self._states[rows][kept]
            self._weight = _add_outer(self._weight, gradient, states, coefficient)

    def __iter__(self) -> Iterator[Tensor | None]:
        """By hidden states, weight and bias; None where it was not needed."""
        weight = self._weight
        if self._needs_weight and weight is None:
            weight = torch.zeros_like(self._head.weight)
        return iter((self._hidden, weight, self._bias))


def _to_front(rows: Tensor, keep: Tensor) -> Tensor:
    """Move the rows to keep to the front, in place and only as many as there are gaps; the index each of them had."""
    order = torch.arange(len(rows), device=rows.device)
    count = int(keep.sum())
    if count == len(rows):
        return order
    gaps = (~keep[:count]).nonzero().squeeze(1)
    movers = count + keep[count:].nonzero().squeeze(1)
    rows[gaps] = rows[movers]
    order[gaps] = movers
    return order[:count]


def _multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b; on a GPU half-precision numbers are multiplied into fp32."""
    if a.is_cuda and a.dtype.itemsize < 4:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out=out)


def _add_outer(total: Tensor | None, gradient: Tensor, states: Tensor, scale: Tensor) -> Tensor:
    """total [V, D] + gradient [M, V]ᵀ @ (states [M, D] · scale [M, 1]), in place; fp32 at least, None for a total of 0."""
    scaled = states * scale
    if gradient.dtype.itemsize >= 4:
        return torch.mm(gradient.t(), scaled) if total is None else total.addmm_(gradient.t(), scaled)
    if gradient.is_cuda and gradient.dtype == torch.bfloat16 and total is not None:
        # The total is larger than all else here: added to within the product, it is read and written once.
        return torch.addmm(total, gradient.t(), scaled.to(gradient.dtype), out_dtype=torch.float32, out=total)
    # What may exceed fp16's range stays outside: the largest scale, and as |gradient| ≤ 1, the largest sum there can be.
    outside = torch.maximum(scale.abs().amax(), scaled.abs().sum(dim=0).amax() / 2**15)
    added = _multiply(gradient.t(), (scaled / outside).to(gradient.dtype)).float()
    return added.mul_(outside) if total is None else total.addcmul_(added, outside)
