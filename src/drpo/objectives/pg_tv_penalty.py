from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, PenaltyObjective
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class PGTVPenalty(PenaltyObjective):
    """The log-likelihood with |r − 1| as a penalty on every token, as UniRL has it (a form of the TV ablation of arXiv 2606.09821, Fig. 5).

    Unlike ``drpo_tv`` it has no importance weight, and its penalty counts neither |A| nor μ, so that a token with A = 0
    has a gradient too.

    Args:
        beta: how much the penalty counts.
    """

    formula: ClassVar[str] = "A·log π − beta·|r − 1|"
    weight: ClassVar[str] = "1/r − beta·sign(r − 1) / A; a token with A = 0 gets −beta·sign(r − 1)·r"
    source: ClassVar[str] = "UniRL; whether it is that of arXiv 2606.09821, Fig. 5, is not known"
    anchor: ClassVar[Anchor] = "sampler"

    beta: float = 0.15

    def loss(self, batch: TokenBatch) -> Tensor:
        return self.beta * batch.excess.abs() - batch.advantage * batch.logp

    def coefficient(self, batch: TokenBatch) -> Tensor:
        return batch.advantage - self.beta * batch.excess.detach().sign() * batch.ratio.detach()
