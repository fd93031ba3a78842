from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from drpo.objectives.base import Anchor, MaskObjective, TopKObjective
from drpo.objectives.regions import TOPK_KL, Region


@dataclass(frozen=True)
class DPPOTopKKL(MaskObjective, TopKObjective):
    """DPPO's hard mask with the KL divergence over the sampler's likeliest tokens (arXiv 2602.04879).

    Args:
        delta: nats, the divergence beyond which a token that is still moving away stops counting.
    """

    region: ClassVar[Region] = Region(TOPK_KL)
    source: ClassVar[str] = "arXiv 2602.04879"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 0.05
