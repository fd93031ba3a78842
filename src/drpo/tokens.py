"""The tokens of one update: log-probs under both policies, advantages, and which tokens count."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""|log π − log μ| is bounded here before it is exponentiated: e^20 is about 5e8."""


@dataclass(frozen=True)
class TokenBatch:
    """Sampled tokens as every objective sees them. Checked here, once.

    Args:
        logp: [B, T], log π of each sampled token under the policy being trained, in nats.
        behavior_logp: [B, T], log μ of the same tokens as the behaviour policy (the sampler)
            recorded them; gets no gradient.
        advantage: [B, T], or [B] for one value a sequence; gets no gradient.
        mask: [B, T], true or 1 at tokens that count. Whatever the other tensors hold elsewhere,
            inf and NaN included, reaches neither a loss nor a gradient.

    Everything is computed in fp32, or in fp64 if log-probs come in fp64.

    Attributes:
        log_ratio: [B, T], log r = log π − log μ, its value bounded at ±20. The gradient passes
            through the bound, so that ∂r/∂log π = r at every token and an objective that pulls
            back still pulls back a token that has run away.

    Raises:
        ValueError: a shape that does not fit, or a value at a counted token that is not finite or
            not a log-probability.
    """

    logp: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    mask: Tensor
    log_ratio: Tensor = field(init=False)

    def __post_init__(self) -> None:
        logp, behavior_logp, advantage, mask = self.logp, self.behavior_logp, self.advantage, self.mask
        if logp.dim() != 2:
            raise ValueError(f"logp has shape {tuple(logp.shape)}; expected two dimensions, [B, T]")
        for name, tensor in (("behavior_logp", behavior_logp), ("mask", mask)):
            if tensor.shape != logp.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(logp.shape)}, like logp")
        if advantage.shape == logp.shape[:1]:
            advantage = advantage.unsqueeze(1).expand_as(logp)
        elif advantage.shape != logp.shape:
            raise ValueError(
                f"advantage has shape {tuple(advantage.shape)}; expected {tuple(logp.shape)} or {tuple(logp.shape[:1])}"
            )
        for name, tensor in (("logp", logp), ("behavior_logp", behavior_logp)):
            if not tensor.is_floating_point():
                raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype")

        dtype = torch.promote_types(torch.promote_types(logp.dtype, behavior_logp.dtype), torch.float32)
        mask = mask.bool()
        # Mask before any arithmetic: exp of a padding difference is inf, and inf * 0 is NaN in the gradient.
        logp, behavior_logp, advantage = (
            torch.where(mask, tensor.to(dtype), 0.0) for tensor in (logp, behavior_logp.detach(), advantage.detach())
        )
        checked = {"logp": logp, "behavior_logp": behavior_logp, "advantage": advantage}
        _check_values(checked)
        difference = logp - behavior_logp
        bounded = difference.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        log_ratio = bounded + (difference - difference.detach())
        for name, tensor in (*checked.items(), ("mask", mask), ("log_ratio", log_ratio)):
            object.__setattr__(self, name, tensor)

    @property
    def ratio(self) -> Tensor:
        """r = π/μ, [B, T]."""
        return self.log_ratio.exp()

    @property
    def behavior_prob(self) -> Tensor:
        """μ, [B, T]."""
        return self.behavior_logp.exp()

    @property
    def excess(self) -> Tensor:
        """r − 1, [B, T]."""
        # The value is that of expm1, which keeps precision where the two policies nearly agree; the gradient is
        # that of exp, because expm1's own, (r − 1) + 1, has no digits left where r is tiny.
        ratio = self.ratio
        return self.log_ratio.detach().expm1() + (ratio - ratio.detach())

    @property
    def shift(self) -> Tensor:
        """π − μ = μ(r − 1), [B, T], signed."""
        return self.behavior_prob * self.excess


def _check_values(tensors: dict[str, Tensor]) -> None:
    # A log-prob computed in low precision can exceed 0 by a rounding error, not by more.
    largest = {"logp": 1e-2, "behavior_logp": 1e-2}
    stacked = torch.stack([t.detach() for t in tensors.values()])
    bound = stacked.new_tensor([largest.get(name, float("inf")) for name in tensors]).view(-1, 1, 1)
    valid = stacked.isfinite() & (stacked <= bound)
    if valid.all():
        return
    which, row, column = (~valid).nonzero()[0].tolist()
    name = list(tensors)[which]
    expected = "a finite number"
    if name in largest:
        expected = "a finite log-probability, at most 0 (mask tokens the sampler could not score)"
    raise ValueError(
        f"{name} is {stacked[which, row, column].item():g} at [{row}, {column}], a token that counts; expected {expected}"
    )
