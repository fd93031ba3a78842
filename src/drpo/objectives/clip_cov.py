from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import UpdateObjective
from drpo.objectives.divergences import covariance, moments
from drpo.objectives.kl_cov import COVARIANCE
from drpo.objectives.ppo import PPO
from drpo.objectives.regions import EITHER, UPDATE, Bound, Operator, Region
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class ClipCov(PPO, UpdateObjective):
    """PPO without a random few of the tokens that lower the entropy much (arXiv 2505.22617).

    Which tokens are drawn follows from the digits of their log-probs under the anchor, so that a split of the update
    draws the same.

    Args:
        share: of an update's tokens that are dropped at most; at least one is, if one is eligible.
        cov_low: the covariance above which a token may be dropped.
        cov_high: the covariance below which it may; above ``cov_low``.
    """

    formula: ClassVar[str] = (
        "M·min(r·A, clip(r)·A), with M = 0 for a random share of the update's tokens, drawn among those with "
        f"cov_low < cov < cov_high that are not clipped; {COVARIANCE.definition}"
    )
    weight: ClassVar[str] = "M times PPO's"
    source: ClassVar[str] = "arXiv 2505.22617"
    region: ClassVar[Region] = Region(
        COVARIANCE,
        UPDATE,
        EITHER,
        high=Bound("cov_low and below cov_high, a random share"),
        beside=PPO.region,
    )
    operator: ClassVar[Operator] = "mask"

    share: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cov_low >= self.cov_high:
            raise ValueError(f"cov_low is {self.cov_low!r}; expected less than cov_high, {self.cov_high!r}")

    def summary(self, update: TokenBatch) -> Tensor:
        """The means of A and log π, and the largest draw of those dropped."""
        means = moments(update)
        draws = _draw(update)[self._eligible(update, means)].sort().values
        wanted = min(len(draws), max(1, int(self.share * int(update.mask.sum()))))
        return torch.cat([means, draws[wanted - 1 : wanted] if wanted else draws.new_tensor([-1.0])])

    def _eligible(self, batch: TokenBatch, means: Tensor) -> Tensor:
        values = covariance(batch, means)
        clipped = PPO.region.is_outside(batch, self)
        return batch.mask & ~clipped & (values > self.cov_low) & (values < self.cov_high)

    def is_outside(self, batch: TokenBatch) -> Tensor:
        return self._is_dropped(batch) | PPO.region.is_outside(batch, self)

    def loss(self, batch: TokenBatch) -> Tensor:
        return ~self._is_dropped(batch) * super().loss(batch)

    def _is_dropped(self, batch: TokenBatch) -> Tensor:
        *means, largest = self.summary_of(batch)
        return self._eligible(batch, torch.stack(means)) & (_draw(batch) <= largest)


def _draw(batch: TokenBatch) -> Tensor:
    """A number from 0 to 1 for each token that looks random, [B, T], fp64: its log-prob's bits times 2^64 over the golden ratio."""
    bits = batch.anchor_logp.double().contiguous().view(torch.int64) * -7046029254386353131
    return ((bits >> 11) & (2**53 - 1)).double() / 2**53
