from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DRPOK3(Objective):
    """An ablation of DRPO: the k3 estimate of KL(μ‖π) as the penalty, in place of the quadratic (arXiv 2606.09821, Fig. 5).

    Args:
        beta: how much the penalty counts. The default, 1/12.5, is the paper's threshold read as a coefficient.
    """

    formula: ClassVar[str] = "r·A − beta·|A|·(r − 1 − log r)"
    weight: ClassVar[str] = "1 − sign(A(r − 1))·beta·|r − 1| / r"
    source: ClassVar[str] = "arXiv 2606.09821, Fig. 5"
    anchor: ClassVar[Anchor] = "sampler"

    beta: float = 0.08

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return -math.inf, math.inf

    def loss(self, batch: TokenBatch) -> Tensor:
        penalty = self.beta * batch.advantage.abs() * (batch.excess - batch.log_ratio)
        return penalty - batch.ratio * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return 1 - self.beta * batch.advantage.sign() * batch.excess.detach() / batch.ratio.detach()
