from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.cppo import CPPO
from drpo.objectives.regions import Operator
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class SoftCPPO(CPPO):
    """CPPO whose tokens beyond their budget are weighted down to it in place of being dropped (of this library, from arXiv 2606.10968)."""

    formula: ClassVar[str] = (
        "sg(w)·r·A, with w = min(1, max(0, B) / Z) where A(r − 1) > 0, else 1; B = min(delta, delta + b·Σω − ΣZ), "
        f"{CPPO.region.statistic.definition}"
    )
    weight: ClassVar[str] = "min(1, max(0, B) / Z) where A(r − 1) > 0, else 1"
    source: ClassVar[str] = "of this library, from arXiv 2606.10968, Eq. 8–11"
    operator: ClassVar[Operator] = "weight"

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        spent, budget = self.spending(batch)
        # Of a rare token Z may underflow to 0.
        left = budget.clamp(min=0) / spent.clamp(min=torch.finfo(spent.dtype).tiny)
        return torch.where(self.region.side.concerns(batch), left.clamp(max=1), 1.0)
