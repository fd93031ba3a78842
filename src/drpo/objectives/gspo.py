from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.objectives.regions import (
    HARMFUL_SEQUENCE,
    ONE_MINUS_CLIP_LOW,
    ONE_PLUS_CLIP_HIGH,
    RATIO,
    SEQUENCE_MEAN,
    Region,
)
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class GSPO(Objective):
    """PPO's clip on the ratio of the whole sequence, its geometric mean over tokens (arXiv 2507.18071).

    The loss is that of GSPO-token: the value of s is the sequence's, its gradient each token's own.
    The paper averages over the tokens of a sequence, then over sequences (``seq-mean-token-mean``).

    Args:
        clip_low: how far s may fall below 1 before sequences with A < 0 stop counting.
        clip_high: how far s may rise above 1 before sequences with A > 0 stop counting.
    """

    formula: ClassVar[str] = "min(s·A, clip(s, 1 − clip_low, 1 + clip_high)·A), s = sg(exp(mean log r))·π/sg(π)"
    weight: ClassVar[str] = "0 where (A > 0, s > 1 + clip_high) or (A < 0, s < 1 − clip_low), else s / r"
    source: ClassVar[str] = "arXiv 2507.18071"
    anchor: ClassVar[Anchor] = "old"
    region: ClassVar[Region | None] = Region(
        RATIO, SEQUENCE_MEAN, HARMFUL_SEQUENCE, ONE_MINUS_CLIP_LOW, ONE_PLUS_CLIP_HIGH
    )

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 0.0, math.inf

    def _ratio(self, batch: TokenBatch) -> Tensor:
        mean = (batch.log_ratio.detach().sum(dim=1, keepdim=True) / batch.length).expand_as(batch.log_ratio)
        return (mean + (batch.log_ratio - batch.log_ratio.detach())).exp()

    def loss(self, batch: TokenBatch) -> Tensor:
        ratio = self._ratio(batch)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return -torch.minimum(ratio * batch.advantage, clipped * batch.advantage)

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return (self._ratio(batch).detach() / batch.ratio.detach()).masked_fill(self.is_outside(batch), 0.0)
