from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.objectives.regions import Operator
from drpo.tokens import LOG_RATIO_BOUND, TokenBatch


@dataclass(frozen=True)
class VESPO(Objective):
    """The log-likelihood weighted by a function of the whole sequence's ratio that vanishes at both ends (arXiv 2602.10693).

    Args:
        k_positive: the power with which φ vanishes as W falls to 0, for sequences with A ≥ 0.
        lambda_positive: the rate at which φ vanishes as W grows, for the same.
        k_negative: as ``k_positive``, for sequences with A < 0.
        lambda_negative: as ``lambda_positive``, for the same.
    """

    formula: ClassVar[str] = "sg(φ)·A·log π, φ = e^λ·W^k·e^(−λW), W = Π r over the sequence; k and λ by the sign of A"
    weight: ClassVar[str] = "φ / r"
    source: ClassVar[str] = "arXiv 2602.10693"
    anchor: ClassVar[Anchor] = "sampler"
    over_sequences: ClassVar[bool] = True
    operator: ClassVar[Operator] = "weight"

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 0.0, math.inf

    def _phi(self, batch: TokenBatch) -> Tensor:
        log_ratio = batch.log_ratio.detach().sum(dim=1, keepdim=True)
        negative = batch.advantage < 0
        k, rate = (
            torch.where(negative, *batch.advantage.new_tensor(pair))
            for pair in ((self.k_negative, self.k_positive), (self.lambda_negative, self.lambda_positive))
        )
        # Where W overflows its term is −inf, and φ is 0. A k or λ far above the other takes φ beyond fp32 unbounded.
        return (rate + k * log_ratio - rate * log_ratio.exp()).clamp(max=LOG_RATIO_BOUND).exp()

    def loss(self, batch: TokenBatch) -> Tensor:
        return -self._phi(batch) * batch.advantage * batch.logp

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return self._phi(batch) / batch.ratio.detach()
