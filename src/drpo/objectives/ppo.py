from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.objectives.regions import ONE_MINUS_CLIP_LOW, ONE_PLUS_CLIP_HIGH, RATIO, Region
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class PPO(Objective):
    """The clipped surrogate of PPO and GRPO, with DAPO's separate bounds (arXiv 1707.06347, Eq. 7; arXiv 2503.14476, Eq. 10).

    Args:
        clip_low: how far r may fall below 1 before a token with A < 0 stops counting.
        clip_high: how far r may rise above 1 before a token with A > 0 stops counting.
    """

    formula: ClassVar[str] = "min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A)"
    weight: ClassVar[str] = "0 where (A > 0, r > 1 + clip_high) or (A < 0, r < 1 − clip_low), else 1"
    source: ClassVar[str] = "arXiv 1707.06347, Eq. 7; arXiv 2503.14476, Eq. 10"
    anchor: ClassVar[Anchor] = "old"
    region: ClassVar[Region] = Region(RATIO, low=ONE_MINUS_CLIP_LOW, high=ONE_PLUS_CLIP_HIGH)  # pyright: ignore[reportIncompatibleVariableOverride]

    clip_low: float = 0.2
    clip_high: float = 0.28

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 0.0, 1.0

    def loss(self, batch: TokenBatch) -> Tensor:
        clipped = batch.ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return -torch.minimum(batch.ratio * batch.advantage, clipped * batch.advantage)

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return (~self.is_outside(batch)).to(batch.advantage.dtype)
