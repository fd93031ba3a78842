from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from drpo.objectives.ppo import PPO
from drpo.objectives.regions import EITHER, MISMATCH, RHO, Region, at
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class IcePop(PPO):
    """PPO whose tokens are weighted by π_old/μ and dropped where the trainer and the sampler disagree too much (arXiv 2510.18855).

    Args:
        mask_low: the π_old/μ below which a token stops counting.
        mask_high: the π_old/μ above which it does.
    """

    formula: ClassVar[str] = "k·min(r·A, clip(r)·A), k = π_old/μ where mask_low ≤ π_old/μ ≤ mask_high, else 0"
    weight: ClassVar[str] = "k times PPO's"
    source: ClassVar[str] = "arXiv 2510.18855"
    corrects_mismatch: ClassVar[bool] = True

    band: ClassVar[Region] = Region(RHO, side=EITHER, low=at("mask_low"), high=at("mask_high"), edge=MISMATCH)
    region: ClassVar[Region] = replace(PPO.region, beside=band)

    mask_low: float = 0.5
    mask_high: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_low >= self.mask_high:
            raise ValueError(f"mask_low is {self.mask_low!r}; expected less than mask_high, {self.mask_high!r}")

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 0.0, self.mask_high

    def _mismatch(self, batch: TokenBatch) -> Tensor:
        return self.band.measure(batch).masked_fill(self.band.is_outside(batch, self), 0.0)

    def loss(self, batch: TokenBatch) -> Tensor:
        return self._mismatch(batch) * super().loss(batch)

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return self.band.measure(batch) * super().gradient_weight(batch)
