from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from drpo.objectives.base import Anchor, MaskObjective
from drpo.objectives.regions import EITHER, SHIFT, Region


@dataclass(frozen=True)
class IPO(MaskObjective):
    """A hard mask on all tokens out of the trust region |π − μ| ≤ δ, those on their way back too (prime-rl).

    DPPO keeps the gradient of a token that comes back, and this one drops it: what is out counts as mismatch, not as
    policy. Not the preference loss of that name.

    Args:
        delta: the |π − μ| beyond which a token stops counting.
    """

    region: ClassVar[Region] = Region(SHIFT, side=EITHER)
    source: ClassVar[str] = "prime-rl, docs/algorithms.md"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 0.3
