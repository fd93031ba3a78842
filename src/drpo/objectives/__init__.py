"""The objectives, one file each."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from drpo.names import unknown_name
from drpo.objectives.base import Objective
from drpo.objectives.cispo import CISPO
from drpo.objectives.dgpo import DGPO
from drpo.objectives.dppo_kl import DPPOBinaryKL
from drpo.objectives.dppo_tv import DPPOBinaryTV
from drpo.objectives.drpo import DRPO
from drpo.objectives.mask_drpo import MaskDRPO
from drpo.objectives.pg import PG
from drpo.objectives.ppo import PPO
from drpo.objectives.sapo import SAPO
from drpo.objectives.spo import SPO

OBJECTIVES: dict[str, type[Objective]] = {
    "drpo": DRPO,
    "mask_drpo": MaskDRPO,
    "dppo_tv": DPPOBinaryTV,
    "dppo_kl": DPPOBinaryKL,
    "spo": SPO,
    "ppo": PPO,
    "cispo": CISPO,
    "sapo": SAPO,
    "dgpo": DGPO,
    "pg": PG,
}


def make_objective(name: str, **hyperparameters: Any) -> Objective:
    """The objective called ``name``, with its own defaults where nothing is given.

    Raises:
        ValueError: an unknown name or hyperparameter (the message lists the choices and the
            nearest match), or a value out of range.
    """
    if name not in OBJECTIVES:
        raise ValueError(unknown_name("objective", name, OBJECTIVES))
    objective = OBJECTIVES[name]
    known = [field.name for field in fields(objective)]
    for given in hyperparameters:
        if given not in known:
            raise ValueError(unknown_name(f"hyperparameter of {name}", given, known))
    return objective(**hyperparameters)


__all__ = [
    "CISPO",
    "DGPO",
    "DRPO",
    "OBJECTIVES",
    "PG",
    "PPO",
    "SAPO",
    "SPO",
    "DPPOBinaryKL",
    "DPPOBinaryTV",
    "MaskDRPO",
    "Objective",
    "make_objective",
]
