"""The tokens of one update: log-probs under both policies, advantages, and which tokens count."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""|log π − log μ| is bounded here before it is exponentiated: e^20 is about 5e8."""


@dataclass(frozen=True)
class TopK:
    """Log-probs of both policies on the K tokens that the sampler found likeliest at each position.

    Memory: 9 bytes a token and entry in fp32; 20 entries of 64 × 4096 tokens are 47 MB.

    Args:
        logp: [B, T, K], log π of those tokens under the policy being trained, in nats.
        behavior_logp: [B, T, K], their log μ; gets no gradient.
        is_sampled: [B, T, K], true at the entry that is the token sampled there; at none where
            the token sampled is not among them.
    """

    logp: Tensor
    behavior_logp: Tensor
    is_sampled: Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Sampled tokens as every objective sees them. Checked here, once.

    Args:
        logp: [B, T], log π of each sampled token under the policy being trained, in nats.
        behavior_logp: [B, T], log μ of the same tokens under the policy that the ratio is taken
            against: as the sampler recorded them, or, for an objective anchored on it, of the
            trainer's own policy when the rollout began. Gets no gradient.
        advantage: [B, T], or [B] for one value a sequence; gets no gradient.
        mask: [B, T], true or 1 at tokens that count. Whatever the other tensors hold elsewhere,
            inf and NaN included, reaches neither a loss nor a gradient.
        sampler_logp: [B, T], where ``behavior_logp`` is not the sampler's: the log-probs that the
            sampler recorded. Only corrections of the mismatch between the two read it.
        topk: the sampler's likeliest tokens, for objectives that look beyond the sampled one.

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
    sampler_logp: Tensor | None = None
    topk: TopK | None = None
    log_ratio: Tensor = field(init=False)

    def __post_init__(self) -> None:
        logp, behavior_logp, advantage, mask = self.logp, self.behavior_logp, self.advantage, self.mask
        if logp.dim() != 2:
            raise ValueError(f"logp has shape {tuple(logp.shape)}; expected two dimensions, [B, T]")
        log_probs = {"logp": logp, "behavior_logp": behavior_logp}
        if self.sampler_logp is not None:
            log_probs["sampler_logp"] = self.sampler_logp
        for name, tensor in (*log_probs.items(), ("mask", mask)):
            if tensor.shape != logp.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(logp.shape)}, like logp")
        if advantage.shape == logp.shape[:1]:
            advantage = advantage.unsqueeze(1).expand_as(logp)
        elif advantage.shape != logp.shape:
            raise ValueError(
                f"advantage has shape {tuple(advantage.shape)}; expected {tuple(logp.shape)} or {tuple(logp.shape[:1])}"
            )
        for name, tensor in log_probs.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype")

        dtype = torch.promote_types(torch.promote_types(logp.dtype, behavior_logp.dtype), torch.float32)
        mask = mask.bool()
        # Mask before any arithmetic: exp of a padding difference is inf, and inf * 0 is NaN in the gradient.
        checked = {
            name: torch.where(mask, (tensor if name == "logp" else tensor.detach()).to(dtype), 0.0)
            for name, tensor in {**log_probs, "advantage": advantage}.items()
        }
        _check_values(checked)
        difference = checked["logp"] - checked["behavior_logp"]
        bounded = difference.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        log_ratio = bounded + (difference - difference.detach())
        for name, tensor in (*checked.items(), ("mask", mask), ("log_ratio", log_ratio)):
            object.__setattr__(self, name, tensor)
        if self.topk is not None:
            object.__setattr__(self, "topk", _checked_topk(self.topk, mask, dtype))

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

    @property
    def others_log_ratio(self) -> Tensor:
        """log of (1 − π)/(1 − μ), of any other token than the sampled one, [B, T]; finite, and without gradient."""
        return _log_others(self.logp.detach()) - _log_others(self.behavior_logp)

    @property
    def length(self) -> Tensor:
        """How many tokens of each sequence count, [B, 1] of the log-probs' dtype; 1 where none does."""
        return self.mask.sum(dim=1, keepdim=True).clamp(min=1).to(self.log_ratio.dtype)

    @property
    def sampler_log_ratio(self) -> Tensor:
        """log of π_old/μ, [B, T]: what ``behavior_logp`` and ``sampler_logp`` differ by, bounded at ±20.

        Raises:
            ValueError: there is no ``sampler_logp``.
        """
        if self.sampler_logp is None:
            raise ValueError("sampler_logp is missing; a correction of π_old/μ needs the log-probs of the sampler too")
        return (self.behavior_logp - self.sampler_logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)

    @property
    def support(self) -> TopK:
        """``topk``, for objectives that need it.

        Raises:
            ValueError: there is none.
        """
        if self.topk is None:
            raise ValueError("topk is missing; this objective needs log-probs of the sampler's likeliest tokens")
        return self.topk


def _log_others(logp: Tensor) -> Tensor:
    """log(1 − p), at least that of the smallest number: infinities would have to be told apart, and are slow."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    # Either form keeps the digits that the other one loses: 1 − p where p is nearly 1, log(1 − p) where it is nearly 0.
    half = -math.log(2)
    return torch.where(logp > half, (-logp.expm1()).log(), (-logp.clamp(max=half).exp()).log1p())


def _checked_topk(topk: TopK, mask: Tensor, dtype: torch.dtype) -> TopK:
    shape = topk.logp.shape
    if topk.logp.dim() != 3 or shape[:2] != mask.shape:
        raise ValueError(f"topk.logp has shape {tuple(shape)}; expected {tuple(mask.shape)} and K")
    for name, tensor in (("behavior_logp", topk.behavior_logp), ("is_sampled", topk.is_sampled)):
        if tensor.shape != shape:
            raise ValueError(f"topk.{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}, like topk.logp")
    counted = mask.unsqueeze(2)
    logp, behavior_logp = (
        torch.where(counted, tensor.to(dtype), 0.0) for tensor in (topk.logp, topk.behavior_logp.detach())
    )
    _check_values({"topk.logp": logp, "topk.behavior_logp": behavior_logp})
    return TopK(logp, behavior_logp, topk.is_sampled.bool() & counted)


def _check_values(tensors: dict[str, Tensor]) -> None:
    if all(t.numel() == 0 for t in tensors.values()):
        return
    extremes = torch.stack([torch.stack(t.detach().aminmax()) for t in tensors.values()])
    # A log-prob computed in low precision can exceed 0 by a rounding error, not by more.
    largest = torch.tensor([1e-2 if name.endswith("logp") else torch.inf for name in tensors])
    # NaN is the least and the greatest where there is one.
    if (extremes.isfinite() & (extremes <= largest.to(extremes).unsqueeze(1))).all():
        return
    stacked = torch.stack([t.detach() for t in tensors.values()])
    valid = stacked.isfinite() & (stacked <= largest.to(stacked).view(-1, *[1] * (stacked.dim() - 1)))
    which, *position = (~valid).nonzero()[0].tolist()
    name = list(tensors)[which]
    expected = "a finite number"
    if name.endswith("logp"):
        expected = "a finite log-probability, at most 0 (mask tokens the sampler could not score)"
    raise ValueError(
        f"{name} is {stacked[(which, *position)].item():g} at {position}, a token that counts; expected {expected}"
    )
