from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Anchor, PenaltyObjective, UpdateObjective
from drpo.objectives.divergences import covariance, moments
from drpo.objectives.regions import EITHER, UPDATE, Bound, Region, Statistic
from drpo.tokens import TokenBatch

COVARIANCE = Statistic(
    "cov", lambda t: covariance(t, moments(t)), "cov = (A − mean A)·(log π − mean log π), over the update"
)


@dataclass(frozen=True)
class KLCov(PenaltyObjective, UpdateObjective):
    """The surrogate with a penalty on |log r| of the few tokens that lower the entropy most (arXiv 2505.22617).

    Args:
        share: of an update's tokens that are penalised, those with the largest covariance, at least one; none where more
            than that many share the largest, as all do where advantages are equal.
        beta: how much the penalty counts.
    """

    formula: ClassVar[str] = (
        f"r·A − beta·|log r|·1[cov ≥ the 1 − share quantile of the update], {COVARIANCE.definition}"
    )
    weight: ClassVar[str] = "1 − beta·sign(log r) / (r·A) for a penalised token, else 1"
    source: ClassVar[str] = "arXiv 2505.22617"
    anchor: ClassVar[Anchor] = "old"
    region: ClassVar[Region | None] = Region(
        COVARIANCE,
        UPDATE,
        EITHER,
        high=Bound("the 1 − share quantile"),
    )

    share: float = 2e-4
    beta: float = 1.0

    def summary(self, update: TokenBatch) -> Tensor:
        """The means of A and log π, and the least covariance of those penalised."""
        means = moments(update)
        values = covariance(update, means)[update.mask]
        count = min(len(values), max(1, int(self.share * len(values))))
        least = values.new_tensor(torch.inf)
        if count:
            largest = values.topk(count).values
            is_tied = (values == largest[0]).sum() > count
            least = torch.where(is_tied, torch.inf, largest[-1])
        return torch.cat([means, least.double().view(1)])

    def is_outside(self, batch: TokenBatch) -> Tensor:
        *means, least = self.summary_of(batch)
        return (covariance(batch, torch.stack(means)) >= least) & batch.mask

    def loss(self, batch: TokenBatch) -> Tensor:
        penalty = torch.where(self.is_outside(batch), self.beta * batch.log_ratio.abs(), 0.0)
        return penalty - batch.ratio * batch.advantage

    def coefficient(self, batch: TokenBatch) -> Tensor:
        pull = torch.where(self.is_outside(batch), self.beta * batch.log_ratio.detach().sign(), 0.0)
        return batch.ratio.detach() * batch.advantage - pull
