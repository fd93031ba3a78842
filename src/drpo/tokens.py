"""The tokens of one update: log-probs under both policies, advantages, and which tokens count."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from drpo.registry import unknown_name

Anchor = Literal["sampler", "old"]
"""What a ratio is taken against: the sampler's own log-probs (μ), or the trainer's when the rollout began (π_old)."""

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
        behavior_logp: [B, T], log μ of the same tokens, as the sampler recorded them; gets no gradient.
        advantage: [B, T], or [B] for one value a sequence; gets no gradient.
        mask: [B, T], true or 1 at tokens that count. Whatever the other tensors hold elsewhere,
            inf and NaN included, reaches neither a loss nor a gradient.
        old_logp: [B, T], log π_old of the same tokens under the trainer's own policy when the
            rollout began; gets no gradient. Needed where it is the anchor.
        anchor: what the ratio is taken against, ``sampler`` (μ) or ``old`` (π_old).
        topk: the sampler's likeliest tokens, for objectives that look beyond the sampled one.

    Everything is computed in fp32, or in fp64 if log-probs come in fp64.

    Attributes:
        log_ratio: [B, T], log r = log π − log μ (log π_old where that is the anchor), its value bounded at ±20. The gradient passes
            through the bound, so that ∂r/∂log π = r at every token and an objective that pulls
            back still pulls back a token that has run away.

    Raises:
        ValueError: a shape that does not fit, an unknown anchor or one whose log-probs are missing,
            or a value at a counted token that is not finite or not a log-probability.
    """

    logp: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    mask: Tensor
    old_logp: Tensor | None = None
    anchor: Anchor = "sampler"
    topk: TopK | None = None
    log_ratio: Tensor = field(init=False)

    def __post_init__(self) -> None:
        logp, behavior_logp, advantage, mask = self.logp, self.behavior_logp, self.advantage, self.mask
        if logp.dim() != 2:
            raise ValueError(f"logp has shape {tuple(logp.shape)}; expected two dimensions, [B, T]")
        log_probs = {"logp": logp, "behavior_logp": behavior_logp}
        if self.old_logp is not None:
            log_probs["old_logp"] = self.old_logp
        if self.anchor not in get_args(Anchor):
            raise ValueError(unknown_name("anchor", self.anchor, get_args(Anchor)))
        if self.anchor == "old" and self.old_logp is None:
            raise ValueError("old_logp is missing; expected π_old's log-probs, [B, T], since anchor is 'old'")
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
        if logp.requires_grad and logp.dtype == torch.float16:
            raise ValueError(
                "logp has dtype torch.float16, whose largest number, 65504, the gradient of a rare token exceeds; expected "
                "logp.float(), or log-probs in bfloat16, float32 or float64"
            )

        dtype = torch.float32
        for tensor in log_probs.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        mask = mask.bool()
        # Mask before any arithmetic: exp of a padding difference is inf, and inf * 0 is NaN in the gradient.
        checked = {
            name: torch.where(mask, (tensor if name == "logp" else tensor.detach()).to(dtype), 0.0)
            for name, tensor in {**log_probs, "advantage": advantage}.items()
        }
        _check_values(checked)
        difference = checked["logp"] - checked["old_logp" if self.anchor == "old" else "behavior_logp"]
        bounded = difference.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        log_ratio = bounded + (difference - difference.detach())
        for name, tensor in (*checked.items(), ("mask", mask), ("log_ratio", log_ratio)):
            object.__setattr__(self, name, tensor)
        if self.topk is not None:
            object.__setattr__(self, "topk", _checked_topk(self.topk, mask, dtype))

    def against(self, anchor: Anchor) -> Self:
        """The same tokens with their ratio taken against ``anchor``."""
        return self if anchor == self.anchor else replace(self, anchor=anchor)

    @property
    def anchor_logp(self) -> Tensor:
        """Log-probs of the anchor, [B, T]: ``behavior_logp`` or ``old_logp``. Below, μ stands for either."""
        if self.anchor == "sampler":
            return self.behavior_logp
        assert self.old_logp is not None
        return self.old_logp

    @property
    def ratio(self) -> Tensor:
        """r = π/μ, [B, T]."""
        return self.log_ratio.exp()

    @property
    def anchor_prob(self) -> Tensor:
        """μ, [B, T]."""
        return self.anchor_logp.exp()

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
        return self.anchor_prob * self.excess

    @property
    def others_log_ratio(self) -> Tensor:
        """log of (1 − π)/(1 − μ), of any other token than the sampled one, [B, T]; finite, and without gradient."""
        return _log_others(self.logp.detach()) - _log_others(self.anchor_logp)

    @property
    def length(self) -> Tensor:
        """How many tokens of each sequence count, [B, 1] of the log-probs' dtype; 1 where none does."""
        return self.mask.sum(dim=1, keepdim=True).clamp(min=1).to(self.log_ratio.dtype)

    @cached_property
    def mismatch(self) -> TokenBatch:
        """The same tokens with π_old in the place of π: their ratio is ρ = π_old/μ, where μ is the sampler's.

        Raises:
            ValueError: the ratio is π/μ, to which ρ has nothing to add.
        """
        if self.anchor != "old" or self.old_logp is None:
            raise ValueError(f"anchor is {self.anchor!r}; a correction by π_old/μ needs anchor 'old', and old_logp")
        return replace(self, logp=self.old_logp, old_logp=None, anchor="sampler", topk=None)

    @property
    def likeliest(self) -> TopK:
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
