"""The LM head and the objective in one pass, without the logits of more than a few tokens."""

from drpo.kernels.fused import FusedLoss, fused_policy_loss

__all__ = ["FusedLoss", "fused_policy_loss"]
