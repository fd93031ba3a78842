from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from drpo.objectives.base import Anchor, MaskObjective, TopKObjective
from drpo.objectives.regions import PREDICTED, SHIFT, Region


@dataclass(frozen=True)
class PDM(MaskObjective, TopKObjective):
    """DPPO's hard mask on the tokens whose policy gradient is predicted to raise KL(μ‖π) (arXiv 2607.10848).

    A step along A·∇log π of the sampled token changes KL(μ‖π) by A·Σ (π − μ)(1[sampled] − π), to
    first order in the logits; DPPO looks at the sign of the sampled token's own A(π − μ) instead.

    Args:
        delta: the |π − μ| beyond which a token whose gradient raises the divergence stops counting.
    """

    region: ClassVar[Region] = Region(SHIFT, side=PREDICTED)
    source: ClassVar[str] = "arXiv 2607.10848"
    anchor: ClassVar[Anchor] = "sampler"

    delta: float = 0.15
