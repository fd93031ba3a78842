from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DRPOTV(Objective):
    """An ablation of DRPO: |π − μ| itself as the penalty, in place of its square (arXiv 2606.09821, Fig. 5).

    The weight does not depend on how far π has gone, only on which side of μ it is.

    Args:
        beta: how much the penalty counts. The default, 1/12.5, is the paper's threshold read as a coefficient.
    """

    formula: ClassVar[str] = "r·A − beta·|A|·|π − μ|"
    weight: ClassVar[str] = "1 − sign(A(r − 1))·beta·μ"
    source: ClassVar[str] = "arXiv 2606.09821, Fig. 5"
    anchor: ClassVar[Anchor] = "sampler"

    beta: float = 0.08

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 1 - self.beta, 1 + self.beta

    def loss(self, batch: TokenBatch) -> Tensor:
        return self.beta * batch.advantage.abs() * batch.shift.abs() - batch.ratio * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return 1 - self.beta * batch.advantage.sign() * batch.excess.detach().sign() * batch.anchor_prob
