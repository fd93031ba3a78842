from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, MaskObjective, TopKObjective
from drpo.objectives.divergences import categories
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class PDM(MaskObjective, TopKObjective):
    """DPPO's hard mask on the tokens whose policy gradient is predicted to raise KL(μ‖π) (arXiv 2607.10848).

    A step along A·∇log π of the sampled token changes KL(μ‖π) by A·Σ (π − μ)(1[sampled] − π), to
    first order in the logits; DPPO looks at the sign of the sampled token's own A(π − μ) instead.

    Args:
        delta: the |π − μ| beyond which a token whose gradient raises the divergence stops counting.
    """

    formula: ClassVar[str] = (
        "M·r·A, with M = 0 where A·((π − μ) + Σ π_v·(μ_v − π_v)) > 0 and |π − μ| > delta, else 1; "
        "Σ over the sampler's top K, the sampled token and the rest"
    )
    source: ClassVar[str] = "arXiv 2607.10848"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 0.15

    @property
    def edge(self) -> float:
        return self.delta

    def is_masked(self, batch: TokenBatch) -> Tensor:
        pi, mu = categories(batch)
        shift = batch.shift.detach()
        raises_divergence = batch.advantage * (shift + (pi * (mu - pi)).sum(dim=2)) > 0
        return raises_divergence & (shift.abs() > self.delta)
