from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Anchor, TopKObjective
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DRPOTopK(TopKObjective):
    """DRPO with its penalty computed over the sampler's likeliest tokens instead of from the one that was drawn.

    Over y ~ μ, DRPO's penalty of one sample has the mean E[μ(r − 1)²] = Σ_v (π_v − μ_v)². Here the
    terms of the top K are added up as they are, and only a token drawn from outside stands for the
    others, with its own μ(r − 1)². For an |A| that does not depend on the token drawn, the penalty
    and its gradient have DRPO's expectation for every K, and no variance where K is the vocabulary.

    Args:
        delta: as DRPO's.
    """

    formula: ClassVar[str] = (
        "r·A − |A|·(Σ_top-K (π_v − μ_v)² + 1[not in top K]·μ·(r − 1)²) / (2·delta), Σ over the sampler's top K"
    )
    weight: ClassVar[str] = (
        "1 − sign(A(r − 1))·μ·|π − μ| / delta where the sampled token is in the top K, DRPO's elsewhere; "
        "the other tokens of the top K get −|A|·π_v·(π_v − μ_v) / delta"
    )
    source: ClassVar[str] = "of this library, from arXiv 2606.09821, Eq. 8"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 12.5

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 1 - 1 / self.delta, 1 + 1 / self.delta

    def loss(self, batch: TokenBatch) -> Tensor:
        likeliest = batch.likeliest
        within = (likeliest.logp.exp() - likeliest.behavior_logp.exp()).square().sum(dim=2)
        outside = torch.where(likeliest.is_sampled.any(dim=2), 0.0, batch.shift * batch.excess)
        penalty = batch.advantage.abs() * (within + outside) / (2 * self.delta)
        return penalty - batch.ratio * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        likeliest = batch.likeliest
        within = (_pull(batch) * likeliest.is_sampled).sum(dim=2) / batch.ratio.detach()
        pull = torch.where(likeliest.is_sampled.any(dim=2), within, batch.shift.detach())
        return 1 - batch.advantage.sign() * pull / self.delta

    def top_k_coefficient(self, batch: TokenBatch) -> Tensor:
        pull = batch.advantage.abs().unsqueeze(2) * _pull(batch) / self.delta
        return -pull.masked_fill(batch.likeliest.is_sampled, 0.0)


def _pull(batch: TokenBatch) -> Tensor:
    """The derivative of (π_v − μ_v)² / 2 by log π_v, [B, T, K]."""
    pi, mu = batch.likeliest.logp.detach().exp(), batch.likeliest.behavior_logp.exp()
    return pi * (pi - mu)
