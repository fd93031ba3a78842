"""Policy-gradient objectives for language models with a smooth trust region (DRPO, arXiv 2606.09821) and their relatives."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drpo.advantage import group_advantage
    from drpo.aggregation import Counts, aggregate, mean_lengths_by_prompt, token_scale
    from drpo.kernels import FusedLoss, PackedTokens, fused_policy_loss
    from drpo.metrics import TrustRegion, TrustRegionMetrics
    from drpo.objectives import CORRECTIONS, OBJECTIVES, Corrected, Objective, make_correction, make_objective
    from drpo.tokens import TokenBatch, TopK
    from drpo.trainer.config import DRPOConfig
    from drpo.trainer.trainer import DRPOTrainer

__version__ = "0.1.0"

__all__ = [
    "CORRECTIONS",
    "OBJECTIVES",
    "Corrected",
    "Counts",
    "DRPOConfig",
    "DRPOTrainer",
    "FusedLoss",
    "Objective",
    "PackedTokens",
    "TokenBatch",
    "TopK",
    "TrustRegion",
    "TrustRegionMetrics",
    "aggregate",
    "fused_policy_loss",
    "group_advantage",
    "make_correction",
    "make_objective",
    "mean_lengths_by_prompt",
    "token_scale",
]

_MODULES = {
    "advantage": ("group_advantage",),
    "aggregation": ("Counts", "aggregate", "mean_lengths_by_prompt", "token_scale"),
    "kernels": ("FusedLoss", "PackedTokens", "fused_policy_loss"),
    "metrics": ("TrustRegion", "TrustRegionMetrics"),
    "objectives": ("CORRECTIONS", "OBJECTIVES", "Corrected", "Objective", "make_correction", "make_objective"),
    "tokens": ("TokenBatch", "TopK"),
    "trainer.config": ("DRPOConfig",),
    "trainer.trainer": ("DRPOTrainer",),
}


def __getattr__(name: str) -> Any:
    # Torch and TRL take seconds to import: the command line's help and error messages do not wait for them.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"drpo.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
