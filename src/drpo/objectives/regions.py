"""Which tokens are outside of a trust region: every mask of the family says it in these few words.

A region is what is measured between two policies (the statistic), over what (the scope), which tokens it concerns (the
side) and the bounds. The edge, which two policies, is the objective's own ratio or a correction's. Edge, operator and
scope are the columns of "The Policy Triangle" (H. Zhao, 2026, huaiyizhao.github.io/policy-triangle).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from drpo.objectives.divergences import binary_kl, categories, larger_binary_kl, moving_away
from drpo.tokens import TokenBatch

Operator = Literal["mask", "weight", "shaper"]
"""What a region does: a mask of 0 and 1 or a weight, both without gradient, or a loss that bends."""


@dataclass(frozen=True)
class Statistic:
    """How far the two policies are apart at a token.

    Args:
        symbol: in a formula.
        measure: [B, T], without gradient.
        definition: what the symbol stands for, where it does not say so itself.
        in_logs: whether ``measure`` gives its logarithm, of which means and sums are taken before it is exponentiated.
    """

    symbol: str
    measure: Callable[[TokenBatch], Tensor]
    definition: str = ""
    in_logs: bool = False


@dataclass(frozen=True)
class Scope:
    """Over which tokens a statistic is taken.

    Args:
        name: for people.
        written: with the statistic's symbol.
        written_in_logs: the same for a statistic in logs.
        total: from [B, T] to [B, T], or [B, 1] where all tokens of a sequence share it; 0 where masked comes in.
    """

    name: str
    written: str
    written_in_logs: str
    total: Callable[[Tensor, TokenBatch], Tensor]

    @property
    def over_sequences(self) -> bool:
        return self is not TOKEN


@dataclass(frozen=True)
class Side:
    """Which tokens a region concerns.

    Args:
        name: for people.
        condition: in a formula; empty where it concerns all tokens.
        concerns: [B, T], bool.
    """

    name: str
    condition: str
    concerns: Callable[[TokenBatch], Tensor]


TOKEN = Scope("token", "{}", "{}", lambda values, _: values)
SEQUENCE_MEAN = Scope(
    "sequence mean", "mean {}", "geometric mean of {}", lambda values, t: values.sum(dim=1, keepdim=True) / t.length
)
SEQUENCE_SUM = Scope("sequence sum", "Σ {}", "Π {}", lambda values, _: values.sum(dim=1, keepdim=True))
SEQUENCE_MAX = Scope(
    "sequence max", "max {}", "max {}", lambda values, _: pad(values, (0, 1)).amax(dim=1, keepdim=True)
)
UPDATE = Scope("update", "{}", "{}", lambda values, _: values)
PREFIX = Scope("prefix budget", "{}", "{}", lambda values, _: values)

HARMFUL = Side("harmful", "A(r − 1) > 0", moving_away)
EITHER = Side("either", "", lambda t: torch.ones_like(t.mask))
NEGATIVE = Side("A < 0", "A < 0", lambda t: t.advantage < 0)


def _predicted(t: TokenBatch) -> Tensor:
    pi, mu = categories(t)
    return t.advantage * (t.shift.detach() + (pi * (mu - pi)).sum(dim=2)) > 0


PREDICTED = Side("predicted rise of KL(μ‖π)", "A·((π − μ) + Σ π_v·(μ_v − π_v)) > 0", _predicted)


def _topk_tv(t: TokenBatch) -> Tensor:
    pi, mu = categories(t)
    return (pi - mu).abs().sum(dim=2) / 2


def _topk_kl(t: TokenBatch) -> Tensor:
    pi, mu = categories(t)
    return torch.where(mu > 0, mu * (mu.log() - pi.log()), 0.0).sum(dim=2)


SHIFT = Statistic("|π − μ|", lambda t: t.shift.detach().abs())
EXCESS = Statistic("|r − 1|", lambda t: t.excess.detach().abs())
LOG_RATIO = Statistic("log r", lambda t: t.log_ratio.detach())
RATIO = Statistic("r", lambda t: t.log_ratio.detach(), in_logs=True)
BINARY_KL = Statistic(
    "binary KL", lambda t: binary_kl(t, t.others_log_ratio), "binary KL = μ·log(μ/π) + (1 − μ)·log((1 − μ)/(1 − π))"
)
LARGER_KL = Statistic(
    "D",
    larger_binary_kl,
    "D = the larger of KL(π‖μ) and KL(μ‖π) between (π, 1 − π) and (μ, 1 − μ)",
)
K3 = Statistic("(r − 1 − log r)", lambda t: t.excess.detach() - t.log_ratio.detach())
LOG_INVERSE = Statistic("log(μ/π)", lambda t: -t.log_ratio.detach())
TOPK_TV = Statistic(
    "top-K TV", _topk_tv, "top-K TV = ½·Σ |π − μ| over the sampler's top K, the sampled token and the rest"
)
TOPK_KL = Statistic(
    "top-K KL", _topk_kl, "top-K KL = Σ μ·log(μ/π) over the sampler's top K, the sampled token and the rest"
)


@dataclass(frozen=True)
class Region:
    """A trust region; its bounds are hyperparameters of whoever has it.

    Args:
        statistic: what is measured.
        scope: over which tokens.
        side: which tokens it concerns.
        low: what the statistic may fall to, in a formula; empty where it has no lower bound.
        high: what it may rise to, likewise.
    """

    statistic: Statistic
    scope: Scope = TOKEN
    side: Side = HARMFUL
    low: str = ""
    high: str = "delta"

    @property
    def measured(self) -> str:
        """The statistic over its scope, in a formula."""
        written = self.scope.written_in_logs if self.statistic.in_logs else self.scope.written
        return written.format(self.statistic.symbol)

    @property
    def beyond(self) -> str:
        """When the statistic is beyond a bound, in a formula."""
        bounds = (f"{self.measured} {sign} {bound}" for sign, bound in (("<", self.low), (">", self.high)) if bound)
        return " or ".join(bounds)

    @property
    def outside(self) -> str:
        """When a token is outside, in a formula."""
        return " and ".join(filter(None, [self.side.condition, self.beyond]))

    def measure(self, batch: TokenBatch) -> Tensor:
        """The statistic over its scope, [B, T] or [B, 1]; without gradient."""
        total = self.scope.total(self.statistic.measure(batch), batch)
        return total.exp() if self.statistic.in_logs else total

    def is_outside(self, batch: TokenBatch, low: float | None, high: float | None) -> Tensor:
        """Which tokens are, [B, T], bool; None is no bound."""
        measured = self.measure(batch)
        outside = [measured < low] if low is not None else []
        outside += [measured > high] if high is not None else []
        return self.side.concerns(batch) & functools.reduce(torch.logical_or, outside)
