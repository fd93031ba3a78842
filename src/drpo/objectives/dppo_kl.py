from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Objective
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DPPOBinaryKL(Objective):
    """DPPO's hard mask with the KL divergence of "this token or another" (arXiv 2602.04879).

    Args:
        delta: nats, the divergence beyond which a token that is still moving away stops counting.
    """

    formula: ClassVar[str] = (
        "M·r·A, with M = 0 where A(r − 1) > 0 and D > delta, else 1; D = μ·log(μ/π) + (1 − μ)·log((1 − μ)/(1 − π))"
    )
    weight: ClassVar[str] = "M"
    source: ClassVar[str] = "arXiv 2602.04879"

    delta: float = 0.05

    def loss(self, batch: TokenBatch) -> Tensor:
        return -self.gradient_weight(batch) * batch.ratio * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        moving_away = batch.advantage * batch.shift.detach() > 0
        return (~(moving_away & (_binary_kl(batch) > self.delta))).to(batch.advantage.dtype)


def _binary_kl(batch: TokenBatch) -> Tensor:
    """KL of (π, 1 − π) from (μ, 1 − μ) in nats, [B, T]; inf where π is 1 and μ is not."""
    of_token = -batch.behavior_prob * batch.log_ratio.detach()
    behavior_others = -batch.behavior_logp.clamp(max=0).expm1()
    others = -batch.logp.detach().clamp(max=0).expm1()
    of_others = torch.where(behavior_others > 0, behavior_others * (behavior_others.log() - others.log()), 0.0)
    return of_token + of_others
