from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from drpo.objectives.base import Anchor, MaskObjective
from drpo.objectives.regions import BINARY_KL, Region


@dataclass(frozen=True)
class DPPOBinaryKL(MaskObjective):
    """DPPO's hard mask with the KL divergence of "this token or another" (arXiv 2602.04879).

    Args:
        delta: nats, the divergence beyond which a token that is still moving away stops counting.
    """

    region: ClassVar[Region] = Region(BINARY_KL)
    source: ClassVar[str] = "arXiv 2602.04879"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 0.05
