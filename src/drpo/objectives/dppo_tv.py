from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Objective
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DPPOBinaryTV(Objective):
    """A hard mask on tokens that move further out of the trust region |π − μ| ≤ δ (arXiv 2602.04879; arXiv 2606.09821, Eq. 6–7).

    Args:
        delta: the |π − μ| beyond which a token that is still moving away stops counting.
    """

    formula: ClassVar[str] = "M·r·A, with M = 0 where A(r − 1) > 0 and |π − μ| > delta, else 1"
    weight: ClassVar[str] = "M"
    source: ClassVar[str] = "arXiv 2602.04879; arXiv 2606.09821, Eq. 6–7"

    delta: float = 0.15

    def loss(self, batch: TokenBatch) -> Tensor:
        return -self.gradient_weight(batch) * batch.ratio * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        shift = batch.shift.detach()
        moving_away = batch.advantage * shift > 0
        return (~(moving_away & (shift.abs() > self.delta))).to(shift.dtype)
