from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.objectives.regions import EITHER, ONE_MINUS_CLIP_LOW, ONE_PLUS_CLIP_HIGH, RATIO, Operator, Region
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class CISPO(Objective):
    """The log-likelihood weighted by the clipped ratio, which gets no gradient (arXiv 2506.13585).

    A clipped token keeps a gradient, of bounded size: r·w = clip(r).

    Args:
        clip_low: how far below 1 the ratio is clipped; 1 or more leaves it unclipped there, as the
            paper does (the default is verl's).
        clip_high: how far above 1 the ratio is clipped.
    """

    formula: ClassVar[str] = "sg(clip(r, 1 − clip_low, 1 + clip_high))·A·log π, where sg stops the gradient"
    weight: ClassVar[str] = "clip(r, 1 − clip_low, 1 + clip_high) / r"
    source: ClassVar[str] = "arXiv 2506.13585"
    anchor: ClassVar[Anchor] = "old"
    region: ClassVar[Region | None] = Region(RATIO, side=EITHER, low=ONE_MINUS_CLIP_LOW, high=ONE_PLUS_CLIP_HIGH)
    operator: ClassVar[Operator] = "weight"

    clip_low: float = 10.0
    clip_high: float = 0.2

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 0.0, 1.0 if self.clip_low >= 1 else math.inf

    def _clipped(self, batch: TokenBatch) -> Tensor:
        return batch.ratio.detach().clamp(1 - self.clip_low, 1 + self.clip_high)

    def loss(self, batch: TokenBatch) -> Tensor:
        return -self._clipped(batch) * batch.advantage * batch.logp

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return self._clipped(batch) / batch.ratio.detach()
