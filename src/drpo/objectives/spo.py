from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.objectives.regions import EXCESS, Region, at
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class SPO(Objective):
    """A quadratic penalty on the ratio, a χ² divergence weighted by |A| (arXiv 2606.09821, Eq. 5).

    Its weight depends on r − 1 alone, so it has no bound on tokens that are rare under μ.

    Args:
        epsilon: the |r − 1| at which the weight reaches 0.
    """

    formula: ClassVar[str] = "r·A − |A|·(r − 1)² / (2·epsilon)"
    weight: ClassVar[str] = "1 − sign(A(r − 1))·|r − 1| / epsilon"
    source: ClassVar[str] = "arXiv 2606.09821, Eq. 5"
    anchor: ClassVar[Anchor] = "sampler"
    region: ClassVar[Region | None] = Region(EXCESS, high=at("epsilon"))

    epsilon: float = 12.5

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return -math.inf, math.inf

    def loss(self, batch: TokenBatch) -> Tensor:
        penalty = batch.advantage.abs() * batch.excess.square() / (2 * self.epsilon)
        return penalty - batch.ratio * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return 1 - batch.advantage.sign() * batch.excess.detach() / self.epsilon
