from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, MaskObjective
from drpo.objectives.divergences import moving_away
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DPPOBinaryTV(MaskObjective):
    """A hard mask on tokens that move further out of the trust region |π − μ| ≤ δ (arXiv 2602.04879; arXiv 2606.09821, Eq. 6–7).

    Args:
        delta: the |π − μ| beyond which a token that is still moving away stops counting.
    """

    formula: ClassVar[str] = "M·r·A, with M = 0 where A(r − 1) > 0 and |π − μ| > delta, else 1"
    source: ClassVar[str] = "arXiv 2602.04879; arXiv 2606.09821, Eq. 6–7"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 0.15

    @property
    def edge(self) -> float:
        return self.delta

    def is_masked(self, batch: TokenBatch) -> Tensor:
        return moving_away(batch) & (batch.shift.detach().abs() > self.delta)
