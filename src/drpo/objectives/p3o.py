from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Anchor, PenaltyObjective, UpdateObjective
from drpo.objectives.regions import EITHER, RATIO, UPDATE, Bound, Operator, Region
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class P3O(PenaltyObjective, UpdateObjective):
    """The log-likelihood with a ratio capped at the update's effective sample size, and a KL penalty for the rest of it (arXiv 2605.12380).

    E = (Σ r)² / (n·Σ r²) over the n tokens of an update is 1 where π is the anchor, and falls as they part. It has no
    hyperparameter.
    """

    formula: ClassVar[str] = (
        "sg(min(r, E))·A·log π − (1 − E)·(log r + 1/r − 1), with E = (Σ r)² / (n·Σ r²) over the n tokens of the update"
    )
    weight: ClassVar[str] = "(min(r, E) − (1 − E)·(1 − 1/r) / A) / r"
    source: ClassVar[str] = "arXiv 2605.12380"
    anchor: ClassVar[Anchor] = "old"
    region: ClassVar[Region | None] = Region(
        RATIO, UPDATE, EITHER, high=Bound("E", lambda owner, batch: owner.summary_of(batch))
    )
    operator: ClassVar[Operator] = "weight"

    def summary(self, update: TokenBatch) -> Tensor:
        """E; 1 where no token counts."""
        ratio = update.ratio.detach()[update.mask].double()
        return ratio.sum().square() / (len(ratio) * ratio.square().sum()) if len(ratio) else ratio.new_ones(())

    def _parts(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """What A·log π and the divergence are multiplied by."""
        size = self.summary_of(batch).to(batch.log_ratio.dtype)
        return torch.minimum(batch.ratio.detach(), size), (1 - size).clamp(min=0)

    def loss(self, batch: TokenBatch) -> Tensor:
        capped, missing = self._parts(batch)
        log_ratio = batch.log_ratio.detach()
        # The divergence as a value and its slope, 1 − 1/r, which autograd would round where r is nearly 1.
        excess = (-log_ratio).expm1()
        divergence = log_ratio + excess - excess * (batch.log_ratio - log_ratio)
        return missing * divergence - capped * batch.advantage * batch.logp

    def coefficient(self, batch: TokenBatch) -> Tensor:
        capped, missing = self._parts(batch)
        return capped * batch.advantage + missing * (-batch.log_ratio.detach()).expm1()
