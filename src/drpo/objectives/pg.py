from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class PG(Objective):
    """The importance-weighted surrogate r·A with no regularisation (arXiv 2606.09821, Eq. 2)."""

    formula: ClassVar[str] = "r·A"
    weight: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2606.09821, Eq. 2"
    anchor: ClassVar[Anchor] = "sampler"

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0

    def loss(self, batch: TokenBatch) -> Tensor:
        return -batch.ratio * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return torch.ones_like(batch.advantage)
