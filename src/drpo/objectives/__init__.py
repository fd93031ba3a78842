"""The objectives, one file each."""

from __future__ import annotations

from typing import Any

from drpo.objectives.base import SYMBOLS, Anchor, Objective, TopKObjective, UpdateObjective
from drpo.objectives.cispo import CISPO
from drpo.objectives.clip_cov import ClipCov
from drpo.objectives.corrections import CORRECTIONS, Corrected, Correction, anchored, make_correction
from drpo.objectives.cppo import CPPO
from drpo.objectives.cppo_soft import SoftCPPO
from drpo.objectives.dgpo import DGPO
from drpo.objectives.dppo_kl import DPPOBinaryKL
from drpo.objectives.dppo_topk_kl import DPPOTopKKL
from drpo.objectives.dppo_topk_tv import DPPOTopKTV
from drpo.objectives.dppo_tv import DPPOBinaryTV
from drpo.objectives.dro import DRO
from drpo.objectives.drpo import DRPO
from drpo.objectives.drpo_k3 import DRPOK3
from drpo.objectives.drpo_kl import DRPOKL
from drpo.objectives.drpo_topk import DRPOTopK
from drpo.objectives.drpo_tv import DRPOTV
from drpo.objectives.drpo_unweighted import DRPOUnweighted
from drpo.objectives.gmpo import GMPO
from drpo.objectives.gspo import GSPO
from drpo.objectives.icepop import IcePop
from drpo.objectives.ipo import IPO
from drpo.objectives.kl_cov import KLCov
from drpo.objectives.m2po import M2PO
from drpo.objectives.mask_drpo import MaskDRPO
from drpo.objectives.mask_drpo_region import MaskDRPORegion
from drpo.objectives.p3o import P3O
from drpo.objectives.pdm import PDM
from drpo.objectives.pg import PG
from drpo.objectives.pg_tv_penalty import PGTVPenalty
from drpo.objectives.ppo import PPO
from drpo.objectives.ppo_dual_clip import DualClipPPO
from drpo.objectives.rollout_is import RolloutIS
from drpo.objectives.sapo import SAPO
from drpo.objectives.spo import SPO
from drpo.objectives.vespo import VESPO
from drpo.registry import make

OBJECTIVES: dict[str, type[Objective]] = {
    "drpo": DRPO,
    "mask_drpo": MaskDRPO,
    "mask_drpo_region": MaskDRPORegion,
    "drpo_topk": DRPOTopK,
    "drpo_unweighted": DRPOUnweighted,
    "drpo_kl": DRPOKL,
    "drpo_tv": DRPOTV,
    "drpo_k3": DRPOK3,
    "pg_tv_penalty": PGTVPenalty,
    "dppo_tv": DPPOBinaryTV,
    "dppo_kl": DPPOBinaryKL,
    "dppo_topk_tv": DPPOTopKTV,
    "dppo_topk_kl": DPPOTopKKL,
    "ipo": IPO,
    "rollout_is": RolloutIS,
    "cppo": CPPO,
    "cppo_soft": SoftCPPO,
    "pdm": PDM,
    "spo": SPO,
    "pg": PG,
    "vespo": VESPO,
    "ppo": PPO,
    "ppo_dual_clip": DualClipPPO,
    "icepop": IcePop,
    "m2po": M2PO,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
    "p3o": P3O,
    "cispo": CISPO,
    "sapo": SAPO,
    "dgpo": DGPO,
    "gspo": GSPO,
    "gmpo": GMPO,
    "dro": DRO,
}


ELSEWHERE = {
    "grpo": "ppo, with advantage 'mean-std' where rewards are divided by their standard deviation",
    "dapo": "ppo with aggregation 'token-mean', and dynamic_sampling_rounds",
    "dr_grpo": "ppo with aggregation 'seq-mean-token-sum-norm' and a horizon",
    "bnpo": "ppo with aggregation 'token-mean'",
    "luspo": "gspo with aggregation 'seq-mean-token-sum'",
    "sao": "rollout_is with clip_low 0.3 and clip_high 5",
    "dppo": "dppo_tv or dppo_kl",
    "vanilla": "ppo_dual_clip",
    "geo_mean": "gmpo",
    "reinforce": "pg",
    "tis": "a correction, correction 'token_truncate'",
    **{name: f"a correction, correction {name!r}" for name in CORRECTIONS},
}
"""What other frameworks and papers call an objective, and what does the same here."""


def make_objective(name: str, **hyperparameters: Any) -> Objective:
    """The objective called ``name``, with its own defaults where nothing is given.

    Raises:
        ValueError: an unknown name or hyperparameter (the message lists the choices and the
            nearest match), or a value out of range.
    """
    return make("objective", OBJECTIVES, name, hyperparameters, ELSEWHERE)


__all__ = [
    "CISPO",
    "CORRECTIONS",
    "CPPO",
    "DGPO",
    "DRO",
    "DRPO",
    "DRPOK3",
    "DRPOKL",
    "DRPOTV",
    "ELSEWHERE",
    "GMPO",
    "GSPO",
    "IPO",
    "M2PO",
    "OBJECTIVES",
    "P3O",
    "PDM",
    "PG",
    "PPO",
    "SAPO",
    "SPO",
    "SYMBOLS",
    "VESPO",
    "Anchor",
    "ClipCov",
    "Corrected",
    "Correction",
    "DPPOBinaryKL",
    "DPPOBinaryTV",
    "DPPOTopKKL",
    "DPPOTopKTV",
    "DRPOTopK",
    "DRPOUnweighted",
    "DualClipPPO",
    "IcePop",
    "KLCov",
    "MaskDRPO",
    "MaskDRPORegion",
    "Objective",
    "PGTVPenalty",
    "RolloutIS",
    "SoftCPPO",
    "TopKObjective",
    "UpdateObjective",
    "anchored",
    "make_correction",
    "make_objective",
]
