from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, PenaltyObjective
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class DRO(PenaltyObjective):
    """Direct Reward Optimization: the log-likelihood with a quadratic penalty on the log-ratio (arXiv 2405.19107).

    Not DRPO: there is no importance weight, and the penalty is on log r for every token, those with
    A = 0 included.

    Args:
        beta: how much the penalty counts; none is published for language models, so the default is our choice.
    """

    formula: ClassVar[str] = "A·log π − (beta/2)·(log r)²"
    weight: ClassVar[str] = "(1 − beta·log r / A) / r; a token with A = 0 gets −beta·log r"
    source: ClassVar[str] = "arXiv 2405.19107"
    anchor: ClassVar[Anchor] = "old"

    beta: float = 0.1

    def loss(self, batch: TokenBatch) -> Tensor:
        return self.beta / 2 * batch.log_ratio.square() - batch.advantage * batch.logp

    def coefficient(self, batch: TokenBatch) -> Tensor:
        return batch.advantage - self.beta * batch.log_ratio.detach()
