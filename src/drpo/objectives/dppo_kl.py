from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, MaskObjective
from drpo.objectives.divergences import binary_kl, moving_away
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DPPOBinaryKL(MaskObjective):
    """DPPO's hard mask with the KL divergence of "this token or another" (arXiv 2602.04879).

    Args:
        delta: nats, the divergence beyond which a token that is still moving away stops counting.
    """

    formula: ClassVar[str] = (
        "M·r·A, with M = 0 where A(r − 1) > 0 and D > delta, else 1; D = μ·log(μ/π) + (1 − μ)·log((1 − μ)/(1 − π))"
    )
    source: ClassVar[str] = "arXiv 2602.04879"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 0.05

    def is_masked(self, batch: TokenBatch) -> Tensor:
        return moving_away(batch) & (binary_kl(batch, batch.others_log_ratio) > self.delta)
