from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from drpo.objectives.base import Anchor, MaskObjective
from drpo.objectives.regions import SHIFT, Region


@dataclass(frozen=True)
class DPPOBinaryTV(MaskObjective):
    """A hard mask on tokens that move further out of the trust region |π − μ| ≤ δ (arXiv 2602.04879; arXiv 2606.09821, Eq. 6–7).

    Args:
        delta: the |π − μ| beyond which a token that is still moving away stops counting.
    """

    region: ClassVar[Region] = Region(SHIFT)
    source: ClassVar[str] = "arXiv 2602.04879; arXiv 2606.09821, Eq. 6–7"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 0.15
