from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, MaskObjective, TopKObjective
from drpo.objectives.divergences import categories, moving_away
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DPPOTopKTV(MaskObjective, TopKObjective):
    """DPPO's hard mask with the total variation over the sampler's likeliest tokens (arXiv 2602.04879).

    Args:
        delta: the total variation, at most 1, beyond which a token that is still moving away stops counting.
    """

    formula: ClassVar[str] = (
        "M·r·A, with M = 0 where A(r − 1) > 0 and D > delta, else 1; "
        "D = ½·Σ |π − μ| over the sampler's top K, the sampled token and the rest"
    )
    source: ClassVar[str] = "arXiv 2602.04879"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 0.15

    def is_masked(self, batch: TokenBatch) -> Tensor:
        pi, mu = categories(batch)
        return moving_away(batch) & ((pi - mu).abs().sum(dim=2) / 2 > self.delta)
