from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import UpdateObjective
from drpo.objectives.ppo import PPO
from drpo.objectives.regions import EITHER, MISMATCH, UPDATE, Bound, Operator, Region, Statistic
from drpo.tokens import TokenBatch

SQUARED = Statistic("(log ρ)²", lambda t: t.log_ratio.square(), "ρ = π_old/μ")


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
    agreement: ClassVar[Region] = Region(
        SQUARED,
        UPDATE,
        EITHER,
        high=Bound("the largest for a mean below tau", lambda owner, batch: owner.summary_of(batch)),
        edge=MISMATCH,
    )
    region: ClassVar[Region] = replace(agreement, beside=PPO.region)
    operator: ClassVar[Operator] = "mask"

    tau: float = 0.04

    def summary(self, update: TokenBatch) -> Tensor:
        """The largest (log ρ)² that is kept, below 0 where none is."""
        ascending = self.agreement.measure(update)[update.mask].double().sort().values
        means = ascending.cumsum(0) / torch.arange(1, len(ascending) + 1, device=ascending.device)
        kept = ascending[means < self.tau]
        return kept[-1] if len(kept) else ascending.new_tensor(-1.0)

    def loss(self, batch: TokenBatch) -> Tensor:
        return ~self.agreement.is_outside(batch, self) * super().loss(batch)
