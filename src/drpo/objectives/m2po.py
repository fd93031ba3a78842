from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import UpdateObjective
from drpo.objectives.ppo import PPO
from drpo.objectives.regions import EITHER, UPDATE, Operator, Region, Statistic
from drpo.tokens import TokenBatch

SQUARED = Statistic("(log ρ)²", lambda t: t.mismatch.log_ratio.square(), "ρ = π_old/μ")


@dataclass(frozen=True)
class M2PO(PPO, UpdateObjective):
    """PPO without the tokens that trainer and sampler disagree most about, until the rest agree in second moment (arXiv 2510.01161).

    Args:
        tau: nats², what the mean (log ρ)² of an update's tokens that are kept stays below.
    """

    formula: ClassVar[str] = (
        "M·min(r·A, clip(r)·A), with M = 0 for the tokens with the largest (log ρ)² of the update, as many as it takes "
        "for the mean of the rest to be below tau; ρ = π_old/μ"
    )
    weight: ClassVar[str] = "M times PPO's"
    source: ClassVar[str] = "arXiv 2510.01161"
    corrects_mismatch: ClassVar[bool] = True
    region: ClassVar[Region | None] = Region(SQUARED, UPDATE, EITHER, high="the largest for a mean below tau")
    operator: ClassVar[Operator] = "mask"

    tau: float = 0.04

    def summary(self, update: TokenBatch) -> Tensor:
        """The largest (log ρ)² that is kept, below 0 where none is."""
        ascending = SQUARED.measure(update)[update.mask].double().sort().values
        means = ascending.cumsum(0) / torch.arange(1, len(ascending) + 1, device=ascending.device)
        kept = ascending[means < self.tau]
        return kept[-1] if len(kept) else ascending.new_tensor(-1.0)

    def _kept(self, batch: TokenBatch) -> Tensor:
        return SQUARED.measure(batch) <= self.summary_of(batch)

    def loss(self, batch: TokenBatch) -> Tensor:
        return self._kept(batch) * super().loss(batch)

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return self._kept(batch) * super().gradient_weight(batch)
