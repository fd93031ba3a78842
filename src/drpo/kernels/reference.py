"""The fused loss as anyone would write it: all logits at once, differentiated by autograd. For tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from drpo.kernels.fused import FusedLoss
from drpo.kernels.packed import PackedTokens
from drpo.objectives import Objective


def reference_policy_loss(
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
    """As :func:`drpo.kernels.fused_policy_loss`, of which it takes the arguments, in memory for several [N, V]."""
    logits = torch.nn.functional.linear(hidden, lm_head_weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    log_probs = (logits / temperature).log_softmax(dim=1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    logp = log_probs.gather(1, tokens.token_ids.unsqueeze(1)).squeeze(1)
    top_k_logp = None if tokens.top_k_ids is None else log_probs.gather(1, tokens.top_k_ids)
    batch = tokens.batch(logp, top_k_logp)
    loss = (tokens.scale * tokens.flatten(objective.loss(batch))).sum()
    return FusedLoss(loss, logp.detach(), entropy, tokens.flatten(objective.gradient_weight(batch)))
