from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from drpo.objectives.base import Anchor, MaskObjective
from drpo.objectives.regions import EITHER, ONE_MINUS_CLIP_LOW, ONE_PLUS_CLIP_HIGH, RATIO, Region


@dataclass(frozen=True)
class RolloutIS(MaskObjective):
    """The surrogate of the tokens whose ratio to the sampler is within a band, whatever the sign of A (arXiv 2602.15763, §4.1.2).

    SAO (arXiv 2607.07508) is the same with 0.3 and 5.

    Args:
        clip_low: how far r may fall below 1 before a token stops counting.
        clip_high: how far r may rise above 1 before a token stops counting.
    """

    region: ClassVar[Region] = Region(RATIO, side=EITHER, low=ONE_MINUS_CLIP_LOW, high=ONE_PLUS_CLIP_HIGH)
    source: ClassVar[str] = "arXiv 2602.15763, §4.1.2; arXiv 2607.07508"
    anchor: ClassVar[Anchor] = "sampler"

    clip_low: float = 0.2
    clip_high: float = 0.28
