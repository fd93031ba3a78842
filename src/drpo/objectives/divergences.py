"""How far π is from μ at a token, beyond the sampled token's |π − μ|; all without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from drpo.tokens import TokenBatch


def moving_away(batch: TokenBatch) -> Tensor:
    """Where the policy gradient takes π further from μ, A(r − 1) > 0; [B, T], bool."""
    # The sign of r − 1, not of π − μ, which is 0 where a rare token's μ underflows.
    return batch.advantage.sign() * batch.excess.detach() > 0


def binary_kl(batch: TokenBatch, others_log_ratio: Tensor) -> Tensor:
    """KL of (π, 1 − π) from (μ, 1 − μ) in nats, [B, T] (arXiv 2602.04879), given log of (1 − π)/(1 − μ)."""
    behavior_others = -batch.anchor_logp.clamp(max=0).expm1()
    return -batch.anchor_prob * batch.log_ratio.detach() - behavior_others * others_log_ratio


def larger_binary_kl(batch: TokenBatch) -> Tensor:
    """The larger one of that and of KL the other way round, [B, T]."""
    probs, others = batch.logp.detach().exp(), -batch.logp.detach().clamp(max=0).expm1()
    reverse = probs * batch.log_ratio.detach() + others * batch.others_log_ratio
    return torch.maximum(binary_kl(batch, batch.others_log_ratio), reverse)


def moments(batch: TokenBatch) -> Tensor:
    """The means of A and of log π over the tokens that count, [2], fp64; 0 where none does."""
    values = torch.stack([batch.advantage, batch.logp.detach()]).double()
    return values.sum(dim=(1, 2)) / batch.mask.sum().clamp(min=1)


def covariance(batch: TokenBatch, means: Tensor) -> Tensor:
    """What each token adds to the covariance of A and log π about these means, [B, T] (arXiv 2505.22617)."""
    advantage, logp = means.to(batch.advantage.dtype)
    return (batch.advantage - advantage) * (batch.logp.detach() - logp)


def categories(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """π and μ over the sampler's top K, the sampled token where it is not among them, and the rest; each [B, T, K + 2].

    The rest is at least the rounding error of 1: below that a difference from 1 says nothing.
    """
    likeliest = batch.likeliest
    within = likeliest.is_sampled.any(dim=2)

    def over(likeliest_logp: Tensor, logp: Tensor) -> Tensor:
        sampled = torch.where(within, 0.0, logp.detach().exp())
        known = torch.cat([likeliest_logp.detach().exp(), sampled.unsqueeze(2)], dim=2)
        rest = (1 - known.sum(dim=2, keepdim=True)).clamp(min=torch.finfo(known.dtype).eps)
        return torch.cat([known, rest], dim=2)

    return over(likeliest.logp, batch.logp), over(likeliest.behavior_logp, batch.anchor_logp)
