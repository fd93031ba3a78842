from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class SAPO(Objective):
    """A sigmoid gate on the ratio in place of the clip (arXiv 2511.20347).

    The weight is 1 at r = 1 and fades on both sides, for either sign of A.

    Args:
        tau_positive: how sharply the weight of tokens with A > 0 fades with |r − 1|.
        tau_negative: the same for tokens with A ≤ 0.
    """

    formula: ClassVar[str] = "(4/τ)·σ(τ(r − 1))·A, with τ = tau_positive where A > 0, else tau_negative"
    weight: ClassVar[str] = "4·σ(τ(r − 1))·(1 − σ(τ(r − 1)))"
    source: ClassVar[str] = "arXiv 2511.20347"
    anchor: ClassVar[Anchor] = "old"

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 0.0, 1.0

    def _tau(self, batch: TokenBatch) -> Tensor:
        positive, negative = batch.advantage.new_tensor([self.tau_positive, self.tau_negative])
        return torch.where(batch.advantage > 0, positive, negative)

    def loss(self, batch: TokenBatch) -> Tensor:
        tau = self._tau(batch)
        # 1 − σ(−x) is σ(x), and keeps the digits of its derivative where σ(x) is nearly 1.
        return -4 / tau * (1 - torch.sigmoid(-tau * batch.excess)) * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        distance = self._tau(batch) * batch.excess.detach()
        return 4 * torch.sigmoid(distance) * torch.sigmoid(-distance)
