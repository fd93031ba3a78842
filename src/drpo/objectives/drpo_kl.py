from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.objectives.divergences import binary_kl
from drpo.tokens import LOG_RATIO_BOUND, TokenBatch


@dataclass(frozen=True)
class DRPOKL(Objective):
    """An ablation of DRPO: DPPO's binary KL as the penalty, in place of the quadratic (arXiv 2606.09821, Fig. 5).

    Args:
        beta: how much the penalty counts. The default, 1/12.5, is the paper's threshold read as a coefficient.
    """

    formula: ClassVar[str] = "r·A − beta·|A|·(μ·log(μ/π) + (1 − μ)·log((1 − μ)/(1 − π)))"
    weight: ClassVar[str] = "1 − sign(A(r − 1))·beta·|π − μ| / (r·(1 − π))"
    source: ClassVar[str] = "arXiv 2606.09821, Fig. 5"
    anchor: ClassVar[Anchor] = "sampler"

    beta: float = 0.08

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return -math.inf, math.inf

    def loss(self, batch: TokenBatch) -> Tensor:
        # The divergence as a value and its slope: its own backward is infinite where π is 1.
        divergence = binary_kl(batch, _others(batch)) + _slope(batch) * (batch.logp - batch.logp.detach())
        return self.beta * batch.advantage.abs() * divergence - batch.ratio * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return 1 - self.beta * batch.advantage.sign() * _slope(batch) / batch.ratio.detach()


def _others(batch: TokenBatch) -> Tensor:
    return batch.others_log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _slope(batch: TokenBatch) -> Tensor:
    """The derivative of the divergence by log π: (π − μ)/(1 − π) = π·(1 − μ)/(1 − π) − μ, with a bounded quotient."""
    return batch.logp.detach().exp() * (-_others(batch)).exp() - batch.anchor_prob
