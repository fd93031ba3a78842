from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.objectives.regions import SHIFT, Region
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class MaskDRPO(Objective):
    """DRPO's penalty only where DPPO would mask: on tokens that move further out of |π − μ| ≤ δ (arXiv 2606.09821, Fig. 11).

    Where DPPO's gradient stops, this one turns back; inside the region it is the plain one.

    Args:
        delta: the |π − μ| beyond which a token that is still moving away is pulled back. The paper
            names none; the default is DPPO's.
    """

    region: ClassVar[Region] = Region(SHIFT)
    formula: ClassVar[str] = (
        "r·A − (1 − M)·|A|·μ·(r − 1)² / (2·delta), with M = 0 where A(r − 1) > 0 and |π − μ| > delta, else 1"
    )
    weight: ClassVar[str] = "1 − (1 − M)·|π − μ| / delta"
    source: ClassVar[str] = "arXiv 2606.09821, Fig. 11"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 0.15

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 1 - 1 / self.delta, 1.0

    def loss(self, batch: TokenBatch) -> Tensor:
        penalty = batch.advantage.abs() * batch.shift * batch.excess / (2 * self.delta)
        return self.is_outside(batch) * penalty - batch.ratio * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return 1 - self.is_outside(batch) * batch.shift.detach().abs() / self.delta
