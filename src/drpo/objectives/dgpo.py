from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.objectives.regions import ONE_MINUS_CLIP_LOW, ONE_PLUS_CLIP_HIGH, RATIO, Operator, Region
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DGPO(Objective):
    """PPO whose clipped tokens keep a gradient that decays with the ratio, differently on either side (arXiv 2603.14389).

    Args:
        clip_low: how far r may fall below 1 before the weight of a token with A < 0 decays.
        clip_high: how far r may rise above 1 before the weight of a token with A > 0 decays.
        low_power: the power of r with which it decays below.
        high_root: the root of 1/r with which it decays above.
    """

    formula: ClassVar[str] = "sg(w)·r·A, where sg stops the gradient"
    weight: ClassVar[str] = (
        "(r / (1 − clip_low))^low_power where A < 0 and r < 1 − clip_low; "
        "((1 + clip_high) / r)^(1/high_root) where A > 0 and r > 1 + clip_high; else 1"
    )
    source: ClassVar[str] = "arXiv 2603.14389"
    anchor: ClassVar[Anchor] = "old"
    region: ClassVar[Region | None] = Region(RATIO, low=ONE_MINUS_CLIP_LOW, high=ONE_PLUS_CLIP_HIGH)
    operator: ClassVar[Operator] = "weight"

    clip_low: float = 0.2
    clip_high: float = 0.28
    low_power: float = 1.0
    high_root: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_low >= 1:
            raise ValueError(f"clip_low is {self.clip_low!r}; expected less than 1, as r does not fall below 0")

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 0.0, 1.0

    def loss(self, batch: TokenBatch) -> Tensor:
        return -self.gradient_weight(batch) * batch.ratio * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        ratio, advantage = batch.ratio.detach(), batch.advantage
        # Each quotient is 1 at its boundary and below 1 beyond it.
        below = torch.where(advantage < 0, ratio / (1 - self.clip_low), 1.0).clamp(max=1)
        above = torch.where(advantage > 0, (1 + self.clip_high) / ratio, 1.0).clamp(max=1)
        return below**self.low_power * above ** (1 / self.high_root)
