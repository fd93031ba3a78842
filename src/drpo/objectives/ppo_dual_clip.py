from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.ppo import PPO
from drpo.objectives.regions import NEGATIVE, RATIO, Region, at
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DualClipPPO(PPO):
    """PPO that also bounds the ratio of tokens with A < 0 from above (arXiv 1912.09729).

    PPO's min leaves such a token unclipped however large its ratio, as its gradient brings it back.

    Args:
        clip_dual: the ratio above which a token with A < 0 stops counting; above 1.
    """

    formula: ClassVar[str] = "max(min(r·A, clip(r)·A), clip_dual·A) where A < 0, else min(r·A, clip(r)·A)"
    weight: ClassVar[str] = "PPO's; 0 where A < 0 and r > clip_dual too"
    source: ClassVar[str] = "arXiv 1912.09729"

    region: ClassVar[Region] = replace(PPO.region, beside=Region(RATIO, side=NEGATIVE, high=at("clip_dual")))

    clip_dual: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_dual <= 1:
            raise ValueError(
                f"clip_dual is {self.clip_dual!r}; expected more than 1, the ratio of a token that has not moved"
            )

    def loss(self, batch: TokenBatch) -> Tensor:
        loss = super().loss(batch)
        return torch.where(batch.advantage < 0, torch.minimum(loss, -self.clip_dual * batch.advantage), loss)
