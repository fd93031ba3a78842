from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.objectives.regions import SHIFT, Region
from drpo.tokens import TokenBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DRPO(Objective):
    """A quadratic penalty on π − μ, an ℓ2² divergence weighted by |A| (arXiv 2606.09821, Eq. 8–9).

    The weight falls linearly with |π − μ|, is 0 at |π − μ| = δ and negative (corrective) beyond,
    and stays within [1 − 1/δ, 1 + 1/δ] whatever the ratio. A token's fixed point is
    π* = μ + sign(A)·δ.

    Args:
        delta: the |π − μ| at which the weight reaches 0. The default is the paper's. As
            |π − μ| ≤ 1, the weight turns corrective only for delta < 1.
    """

    formula: ClassVar[str] = "r·A − |A|·μ·(r − 1)² / (2·delta)"
    weight: ClassVar[str] = "1 − sign(A(r − 1))·|π − μ| / delta"
    source: ClassVar[str] = "arXiv 2606.09821, Eq. 8–9"
    anchor: ClassVar[Anchor] = "sampler"
    region: ClassVar[Region | None] = Region(SHIFT)

    delta: float = 12.5

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 1 - 1 / self.delta, 1 + 1 / self.delta

    def loss(self, batch: TokenBatch) -> Tensor:
        if self.delta >= 1:
            _tell_confined(self.delta)
        penalty = batch.advantage.abs() * batch.shift * batch.excess / (2 * self.delta)
        return penalty - batch.ratio * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return 1 - batch.advantage.sign() * batch.shift.detach() / self.delta


@cache
def _tell_confined(delta: float) -> None:
    logger.warning(
        "DRPO with delta=%g confines the gradient weight to [%.3g, %.3g]; it reaches 0 and turns corrective only for delta < 1.",
        delta,
        1 - 1 / delta,
        1 + 1 / delta,
    )
