"""Scaled dot-product attention on a CPU: queries that share keys read them where they are, and short sequences have their gradient in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CPU_SDPA = "cpu_sdpa"
"""The name of this attention among Transformers' own."""

FP32_BACKWARD_TO = 128
"""Keys up to which PyTorch's backward pass in half precision is slower on a CPU than forward and backward in fp32."""


def use_cpu_sdpa(model: Any) -> None:
    """Let a model whose attention is Transformers' ``sdpa`` use :func:`attend_on_cpu`.

    Models that do not look their attention up among Transformers' stay as they are.
    """
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        AttentionInterface.register(CPU_SDPA, attend_on_cpu)
        AttentionMaskInterface.register(CPU_SDPA, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.config._attn_implementation = CPU_SDPA


def attend_on_cpu(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' ``sdpa`` attention, the same numbers in less time on a CPU.

    Where there is a mask, as in generation, Transformers copies keys and values once for every query head that
    shares them, at every token; PyTorch's kernel for a CPU reads them in place.

    Args:
        module: the attention layer.
        query: [B, H, Q, D].
        key: [B, H / groups, K, D], as ``value``.
        attention_mask: [B, 1, Q, K], boolean or added to the scores; None attends to all, or to what is before.
        dropout: of the attention's weights.
        scaling: of the scores; None is 1/√D.
        is_causal: without a mask; None asks the layer.
        kwargs: what else the layer says, for ``sdpa`` on other devices.

    Returns:
        [B, Q, H, D], and no weights.
    """
    if query.device.type != "cpu":
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return sdpa(module, query, key, value, attention_mask, **options)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = bool(query.shape[2] > 1 and attention_mask is None and is_causal)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if needs_gradient and query.itemsize == 2 and key.shape[2] <= FP32_BACKWARD_TO and dropout == 0:
        output = _BackwardInFp32.apply(query, key, value, attention_mask, is_causal, scaling)
    else:
        output = _attend(query, key, value, attention_mask, is_causal, scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "is_causal": is_causal}
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, **options)


class _BackwardInFp32(torch.autograd.Function):
    """Attention in half precision whose gradient is that of the same attention in fp32, computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scaling: float | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.is_causal, ctx.scaling = is_causal, scaling
        return _attend(query, key, value, mask, is_causal, scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *states, mask = ctx.saved_tensors
        query, key, value = leaves = [state.float().requires_grad_() for state in states]
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            output = _attend(query, key, value, mask, ctx.is_causal, ctx.scaling)
        of_leaves = torch.autograd.grad(output, leaves, gradients[0].float())
        of_states = (gradient.to(state.dtype) for gradient, state in zip(of_leaves, states, strict=True))
        return *of_states, None, None, None
