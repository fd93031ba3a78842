"""The LM head and the objective in one pass, without the logits of more than a few tokens; attention on a CPU."""

from drpo.kernels.fused import FusedLoss, fused_policy_loss
from drpo.kernels.packed import PackedTokens

__all__ = ["FusedLoss", "PackedTokens", "fused_policy_loss"]
