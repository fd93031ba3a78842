"""The matrix products of an LM head: its logits, and what the gradients of hidden states and weight are made of.

On a GPU half-precision numbers are multiplied into fp32. On a CPU with AVX-512 large fp32 products are oneDNN's, which
PyTorch compiles into its models but gives to MKL in ``torch.mm``; on AMD's EPYC (Zen 5) MKL takes twice as long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

ONEDNN_FROM = 2**28
"""Multiplications of a product that is worth oneDNN, which prepares for half a millisecond for each new shape."""

ONEDNN_OUTER_ROWS = 64
"""Rows of a sum of outer products that is worth oneDNN, which adds it to the total in a step of its own."""

BLOCK_NUMBERS = 2**19
"""That oneDNN returns, or is given a copy of, at a time: a block of the vocabulary. Little new memory is cheap."""


def next_size(rows: int) -> int:
    """The next of eight numbers of rows a doubling. oneDNN keeps half a megabyte for each shape it meets: so they are few."""
    return rows + -rows % _step(rows)


def last_size(rows: int) -> int:
    """The last of those numbers; below the first of them the number itself."""
    return rows - rows % _step(rows) or rows


def _step(rows: int) -> int:
    return 2 ** max(4, rows.bit_length() - 4)


def multiply_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [M, V] = hidden [M, D] @ weight [V, D]ᵀ + bias [V]; out is fp32 where the product can be."""
    if out.dtype != hidden.dtype:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
        if bias is not None:
            out.add_(bias)
    elif _suits_onednn(out.numel() * hidden.shape[1], weight):
        padded = _padded(hidden)
        for block in _blocks(weight, len(padded)):
            logits = _onednn(padded, weight[block], None if bias is None else bias[block])
            out[:, block] = logits[: len(hidden)]
    elif bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        # Rounded once, the bias included.
        torch.addmm(bias, hidden, weight.t(), out=out)


def multiply_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient [M, V] @ weight [V, D], fp32 where the product can be."""
    if _suits_onednn(gradient.numel() * weight.shape[1], weight):
        total = gradient.new_zeros(len(gradient), weight.shape[1])
        for block in _blocks(weight, next_size(len(gradient))):
            total += _onednn(_padded(gradient[:, block]), weight[block].t())[: len(gradient)]
        return total
    return _mm(gradient, weight)


def add_outer(total: Tensor | None, gradient: Tensor, hidden: Tensor, scale: Tensor) -> Tensor:
    """total [V, D] + gradient [M, V]ᵀ @ (hidden [M, D] · scale [M, 1]), in place; fp32 at least, None for a total of 0."""
    if gradient.dtype.itemsize < 4:
        # What may exceed fp16's range stays outside: the largest scale, and as |gradient| ≤ 1, the largest sum there can be.
        scaled = hidden * scale
        outside = torch.maximum(scale.abs().amax(), scaled.abs().sum(dim=0).amax() / 2**15)
        added = _mm(gradient.t(), (scaled / outside).to(gradient.dtype)).float()
        return added.mul_(outside) if total is None else total.addcmul_(added, outside)
    hidden = hidden * scale
    if len(hidden) < ONEDNN_OUTER_ROWS or not _suits_onednn(gradient.numel() * hidden.shape[1], hidden):
        return torch.mm(gradient.t(), hidden) if total is None else total.addmm_(gradient.t(), hidden)
    result = gradient.new_empty(gradient.shape[1], hidden.shape[1]) if total is None else total
    hidden = _padded(hidden)
    for block in _blocks(result, max(hidden.shape)):
        added = _onednn(_padded(gradient[:, block]).t(), hidden.t())
        if total is None:
            result[block] = added
        else:
            result[block] += added
    return result


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype.itemsize < 4:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _suits_onednn(multiplications: int, b: Tensor) -> bool:
    """Whether a product is oneDNN's, which is given ``b`` as it lies in memory."""
    return (
        multiplications >= ONEDNN_FROM
        and b.device.type == "cpu"
        and b.dtype == torch.float32
        and b.is_contiguous()
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ bᵀ + bias. With a stride between rows oneDNN falls back to plain loops, a thousand times as slow."""
    return torch.ops.mkldnn._linear_pointwise(a.contiguous(), b, bias, "none", [], "")


def _padded(rows: Tensor) -> Tensor:
    """With rows of zeros below."""
    missing = next_size(len(rows)) - len(rows)
    return nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _blocks(rows: Tensor, numbers: int) -> Iterator[slice]:
    """Of as many rows as have ``BLOCK_NUMBERS``, at so many each."""
    size = max(1, BLOCK_NUMBERS // numbers)
    return (slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size))
