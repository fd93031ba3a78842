from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.corrections import TokenMask
from drpo.objectives.ppo import PPO
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
        return TokenMask(low=self.mask_low, high=self.mask_high).weight(batch)

    def loss(self, batch: TokenBatch) -> Tensor:
        return self._mismatch(batch) * super().loss(batch)

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return self._mismatch(batch) * super().gradient_weight(batch)
