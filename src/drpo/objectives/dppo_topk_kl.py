from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Anchor, MaskObjective, TopKObjective
from drpo.objectives.divergences import categories, moving_away
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DPPOTopKKL(MaskObjective, TopKObjective):
    """DPPO's hard mask with the KL divergence over the sampler's likeliest tokens (arXiv 2602.04879).

    Args:
        delta: nats, the divergence beyond which a token that is still moving away stops counting.
    """

    formula: ClassVar[str] = (
        "M·r·A, with M = 0 where A(r − 1) > 0 and D > delta, else 1; "
        "D = Σ μ·log(μ/π) over the sampler's top K, the sampled token and the rest"
    )
    source: ClassVar[str] = "arXiv 2602.04879"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 0.05

    def is_masked(self, batch: TokenBatch) -> Tensor:
        pi, mu = categories(batch)
        divergence = torch.where(mu > 0, mu * (mu.log() - pi.log()), 0.0).sum(dim=2)
        return moving_away(batch) & (divergence > self.delta)
