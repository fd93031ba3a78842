"""Policy loss and its gradient in one pass over the tokens: three matrix products, the logits of one chunk in memory.

The derivative of an objective by a token's log-prob is known once the log-prob is: −scale · coefficient
(:meth:`drpo.objectives.Objective.coefficient`). So the logits of a chunk of tokens become their own
gradient at once, and the gradients of hidden states and head are ready when the loss is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drpo.kernels.lm_head import Gradients, Head
from drpo.kernels.logits import LogitTransform
from drpo.kernels.packed import PackedTokens
from drpo.kernels.softmax import Rows, differentiate
from drpo.objectives import Objective, TopKObjective


class FusedLoss(NamedTuple):
    """What :func:`fused_policy_loss` returns.

    Attributes:
        loss: scalar, Σ scale · loss of each token; differentiable once, by hidden states and head.
        logp: [N], log π of each token in nats, without gradient.
        entropy: [N], of π at each token in nats, without gradient.
        gradient_weight: [N], the objective's of each token, without gradient.
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    gradient_weight: Tensor


def fused_policy_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    tokens: PackedTokens,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> FusedLoss:
    """The loss of any objective from hidden states, and its gradient, without ever holding all logits.

    Forward computes the gradients too, from ``objective.coefficient``; backward hands them over.
    A chunk of tokens at a time, that takes the head's product and two for the gradients, which is the
    least there is; tokens whose coefficient is 0 take part in the first alone, and a frozen head
    or body costs no product. An objective that looks at whole sequences (``over_sequences``) takes the
    head's product twice. Under autocast products run in its dtype; log-probs are fp32, or fp64 of fp64.

    Args:
        hidden: [N, D], the body's output at the positions that predict the tokens.
        lm_head_weight: [V, D].
        tokens: the N tokens sampled there.
        objective: any of :data:`drpo.OBJECTIVES`.
        bias: [V], of the head.
        temperature: what logits are divided by.
        logit_scale: what the model multiplies its logits by.
        softcap: z becomes softcap · tanh(z / softcap) before the division by the temperature.

    Raises:
        TypeError: an objective that is none.
        ValueError: shapes or values that do not fit, or what the objective needs is missing.
        RuntimeError: in backward, when a graph of it is asked for (``create_graph=True``).
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective is {objective!r}; expected an Objective, as drpo.make_objective makes")
    if hidden.dim() != 2 or len(hidden) != len(tokens):
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; expected ({len(tokens)}, D), as token_ids has")
    if lm_head_weight.dim() != 2 or lm_head_weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"lm_head_weight has shape {tuple(lm_head_weight.shape)}; expected (V, {hidden.shape[1]}), as hidden has"
        )
    name = type(objective).__name__
    if objective.over_sequences and tokens.sequence_ids is None:
        raise ValueError(f"sequence_ids is missing; {name} looks at whole sequences")
    if isinstance(objective, TopKObjective) and tokens.top_k_ids is None:
        raise ValueError(f"top_k_ids is missing; {name} looks at the sampler's likeliest tokens")
    if bias is not None and bias.shape != lm_head_weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; expected ({len(lm_head_weight)},), as lm_head_weight has"
        )
    tokens.check_vocabulary(len(lm_head_weight))
    transform = LogitTransform(temperature, logit_scale, softcap)
    # Autograd turns gradients off within a function's forward.
    differentiated = torch.is_grad_enabled()
    return FusedLoss(
        *_FusedPolicyLoss.apply(hidden, lm_head_weight, bias, tokens, objective, transform, differentiated)
    )


class _FusedPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: PackedTokens,
        objective: Objective,
        transform: LogitTransform,
        differentiated: bool,
    ) -> FusedLoss:
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.save_for_backward(hidden, weight, bias)
        ctx.arguments = tokens, objective, transform
        ctx.needed = tuple(differentiated and needed for needed in ctx.needs_input_grad[:3])
        result, ctx.gradients = _evaluate(ctx, hidden, weight, bias)
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError("fused_policy_loss is differentiable once; create_graph=True asks for more")
        # Handed over, so that autograd need not copy them; a second backward computes them anew.
        gradients = ctx.gradients or _evaluate(ctx, *ctx.saved_tensors)[1]
        ctx.gradients = None
        # The head's is large: not multiplied where there is nothing to multiply by.
        if grad_outputs[0] != 1:
            gradients = tuple(None if gradient is None else gradient.mul_(grad_outputs[0]) for gradient in gradients)
        rounded = (
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, ctx.saved_tensors, strict=True)
        )
        return *rounded, None, None, None, None


def _evaluate(
    ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[FusedLoss, tuple[Tensor | None, ...]]:
    """The loss, and its gradients by hidden states, weight and bias, each in the dtype of its tensor but for fp16.

    A gradient in fp16 stays in fp32 until the backward pass has applied the scale of the loss, which keeps it in range.
    """
    tokens, objective, transform = ctx.arguments
    states = hidden.to(ctx.dtype)
    head = Head(weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype), transform)
    gradients = Gradients(states, head, ctx.needed)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        result = _compute(states, head, tokens, objective, gradients)
    by = (
        gradient if gradient is None or tensor is None or tensor.dtype == torch.float16 else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, (hidden, weight, bias), strict=True)
    )
    return result._replace(loss=result.loss.to(result.logp.dtype)), tuple(by)


def _compute(hidden: Tensor, head: Head, tokens: PackedTokens, objective: Objective, gradients: Gradients) -> FusedLoss:
    if isinstance(objective, TopKObjective):
        return _compute_top_k(hidden, head, tokens, objective, gradients)
    if objective.over_sequences:
        return _compute_sequences(hidden, head, tokens, objective, gradients)
    return _compute_tokens(hidden, head, tokens, objective, gradients)


def _compute_tokens(
    hidden: Tensor, head: Head, tokens: PackedTokens, objective: Objective, gradients: Gradients
) -> FusedLoss:
    parts = []
    for rows, logits in head.logits(hidden):
        chunk = tokens.chunk(rows)
        scored = differentiate(logits, chunk.token_ids, head.transform, hidden.dtype)
        batch = chunk.batch(scored.logp)
        gradients.add(rows, scored.gradient, chunk.scale * objective.coefficient(batch).squeeze(0))
        loss = (chunk.scale * objective.loss(batch)).sum()
        parts.append(FusedLoss(loss, scored.logp, scored.entropy, objective.gradient_weight(batch).squeeze(0)))
    return _joined(parts, hidden)


def _compute_sequences(
    hidden: Tensor, head: Head, tokens: PackedTokens, objective: Objective, gradients: Gradients
) -> FusedLoss:
    def differentiated() -> Iterator[tuple[slice, Rows]]:
        for rows, logits in head.logits(hidden):
            yield rows, differentiate(logits, tokens.token_ids[rows], head.transform, hidden.dtype)

    # What a token counts is known when its whole sequence is scored; its logits are gone by then.
    parts = []
    for _, scored in differentiated():
        parts.append(FusedLoss(hidden.new_zeros(()), scored.logp, scored.entropy, scored.logp))
    scores = _joined(parts, hidden)
    batch = tokens.batch(scores.logp)
    coefficient = tokens.scale * tokens.flatten(objective.coefficient(batch))
    for rows, scored in differentiated():
        gradients.add(rows, scored.gradient, coefficient[rows])
    loss = (tokens.scale * tokens.flatten(objective.loss(batch))).sum()
    return scores._replace(loss=loss, gradient_weight=tokens.flatten(objective.gradient_weight(batch)))


def _compute_top_k(
    hidden: Tensor, head: Head, tokens: PackedTokens, objective: TopKObjective, gradients: Gradients
) -> FusedLoss:
    parts = []
    for rows, logits in head.logits(hidden):
        chunk = tokens.chunk(rows)
        ids = torch.cat([chunk.token_ids.unsqueeze(1), chunk.likeliest_ids], dim=1)
        z = head.transform(logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True))
        log_probs = z.log_softmax(dim=1)
        probs = log_probs.exp()
        known = log_probs.gather(1, ids)
        logp = known[:, 0]
        batch = chunk.batch(logp, known[:, 1:])
        coefficient = chunk.scale.unsqueeze(1) * torch.cat(
            [objective.coefficient(batch).squeeze(0).unsqueeze(1), objective.top_k_coefficient(batch).squeeze(0)], dim=1
        )
        coefficient = coefficient.to(probs.dtype)
        entropy = -torch.linalg.vecdot(probs, log_probs)
        gradient = probs.mul_(coefficient.sum(dim=1, keepdim=True)).scatter_add_(1, ids, -coefficient)
        if head.transform.softcap is not None:
            gradient.mul_(head.transform.damping(z))
        gradients.add(rows, gradient.to(hidden.dtype), (coefficient != 0).any(dim=1).to(gradient.dtype))
        loss = (chunk.scale * objective.loss(batch)).sum()
        parts.append(FusedLoss(loss, logp, entropy, objective.gradient_weight(batch).squeeze(0)))
    return _joined(parts, hidden)


def _joined(parts: list[FusedLoss], hidden: Tensor) -> FusedLoss:
    nothing = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
    losses, *of_tokens = zip(FusedLoss(nothing.sum(), nothing, nothing, nothing), *parts, strict=True)
    return FusedLoss(torch.stack(losses).sum(), *map(torch.cat, of_tokens))
