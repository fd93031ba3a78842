from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from drpo.objectives.mask_drpo import MaskDRPO
from drpo.objectives.regions import SHIFT, Region, at


@dataclass(frozen=True)
class MaskDRPORegion(MaskDRPO):
    """Mask-DRPO with a threshold for its region and one for its penalty (arXiv 2606.09821, Fig. 11, may be read so).

    Args:
        delta: as DRPO's, of the tokens outside. At the default, which is DRPO's, the weight stays above 0.92.
        region_delta: the |π − μ| beyond which a token that is still moving away is penalised. The default is DPPO's.
    """

    region: ClassVar[Region] = Region(SHIFT, high=at("region_delta"))
    formula: ClassVar[str] = MaskDRPO.formula.replace("> delta", "> region_delta")

    delta: float = 12.5
    region_delta: float = 0.15
