from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, PenaltyObjective
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DRPOUnweighted(PenaltyObjective):
    """An ablation of DRPO: its penalty without |A| (arXiv 2606.09821, Fig. 4).

    Every token is pulled towards μ alike, those with A = 0 included, so the fixed point
    π* = μ + A·δ depends on the size of the advantage.

    Args:
        delta: the |π − μ| at which the weight of a token with |A| = 1 reaches 0.
    """

    formula: ClassVar[str] = "r·A − μ·(r − 1)² / (2·delta)"
    weight: ClassVar[str] = "1 − (π − μ) / (A·delta); a token with A = 0 gets −r·(π − μ) / delta"
    source: ClassVar[str] = "arXiv 2606.09821, Fig. 4"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 12.5

    def loss(self, batch: TokenBatch) -> Tensor:
        return batch.shift * batch.excess / (2 * self.delta) - batch.ratio * batch.advantage

    def coefficient(self, batch: TokenBatch) -> Tensor:
        return batch.ratio.detach() * (batch.advantage - batch.shift.detach() / self.delta)
