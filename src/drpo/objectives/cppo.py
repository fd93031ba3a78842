from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from drpo.objectives.base import Anchor, MaskObjective
from drpo.objectives.regions import PREFIX, Bound, Region, Statistic
from drpo.tokens import TokenBatch

SPENT = Statistic(
    "Z",
    lambda t: t.shift.detach().abs(),
    "Z = ω·|π − μ|, ω = weight_min + (1 − weight_min)(T − t)/(T − 1), sums over the tokens before, "
    "b = clip(90 % quantile of |π − μ|, allowance_low, allowance_high)",
)


@dataclass(frozen=True)
class CPPO(MaskObjective):
    """DPPO's hard mask, stricter early in a sequence and tightened by what its prefix has drifted already (arXiv 2606.10968).

    A token at place t of the T that count spends Z = ω·|π − μ|, with ω falling from 1 to
    ``weight_min`` over the sequence. It may spend delta, and less where the tokens before it spent
    more than an allowance for each: the 90 % quantile of |π − μ| over the sequence, within bounds.

    Args:
        delta: the ω·|π − μ| beyond which a token that is still moving away stops counting.
        weight_min: ω of a sequence's last token; at most 1.
        allowance_low: the least that each token before may spend before the budget shrinks.
        allowance_high: the most.
    """

    region: ClassVar[Region] = Region(SPENT, PREFIX, high=Bound("min(delta, delta + b·Σω − ΣZ)"))
    source: ClassVar[str] = "arXiv 2606.10968, Eq. 8–11"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 0.15
    weight_min: float = 0.8
    allowance_low: float = 0.02
    allowance_high: float = 0.04

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_min > 1:
            raise ValueError(f"weight_min is {self.weight_min!r}; expected at most 1, the weight of the first token")
        if self.allowance_low > self.allowance_high:
            raise ValueError(
                f"allowance_low is {self.allowance_low!r}; expected at most allowance_high, {self.allowance_high!r}"
            )

    def is_outside(self, batch: TokenBatch) -> Tensor:
        spent, budget = self.spending(batch)
        return self.region.side.concerns(batch) & (spent > budget)

    def spending(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """What each token spends and what it may, both [B, T]."""
        divergence = self.region.statistic.measure(batch)
        counted = batch.mask.to(divergence.dtype)
        before = counted.cumsum(dim=1) - 1
        weight = counted * (1 - (1 - self.weight_min) * before / (batch.length - 1).clamp(min=1))
        spent = weight * divergence
        allowance = _upper_tenth(divergence, batch).clamp(self.allowance_low, self.allowance_high)
        earned = allowance * _sum_before(weight) - _sum_before(spent)
        return spent, self.delta + earned.clamp(max=0)


def _upper_tenth(values: Tensor, batch: TokenBatch) -> Tensor:
    """The 90 % quantile of those in a sequence that count, interpolated as torch.quantile's, [B, 1]; below 0 if none does."""
    # A tenth of the values is found several times as fast as all are sorted. Two columns more, for the shortest sequences.
    some = values.shape[1] // 10 + 2
    largest = pad(values.masked_fill(~batch.mask, -1.0), (0, 2), value=-1.0).topk(some, dim=1).values
    place = 0.1 * (batch.length - 1)
    above = place.long()
    return torch.lerp(largest.gather(1, above), largest.gather(1, above + 1), place - above)


def _sum_before(values: Tensor) -> Tensor:
    return values.cumsum(dim=1) - values
