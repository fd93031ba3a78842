"""Which tokens are outside of a trust region: every mask of the family says it in these few words.

A region is between which two policies (the edge) what is measured (the statistic), over what (the scope), which tokens it
concerns (the side) and the bounds. Edge, operator and scope are the columns of "The Policy Triangle" (H. Zhao, 2026,
huaiyizhao.github.io/policy-triangle).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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
class Edge:
    """Which two policies a distance is between.

    Args:
        name: for people.
        between: the two as π and μ of a batch.
    """

    name: str
    between: Callable[[TokenBatch], TokenBatch]


@dataclass(frozen=True)
class Bound:
    """What a statistic may fall or rise to.

    Args:
        written: in a formula.
        of: its value, given who has the region, and the batch; None where ``is_outside`` of who has it is its own.
        field: the hyperparameter that it is as it stands; None where it follows from others.
    """

    written: str
    of: Callable[[Any, TokenBatch], Tensor | float] | None = None
    field: str | None = None


def at(field: str) -> Bound:
    """The hyperparameter of that name."""
    return Bound(field, lambda owner, _: getattr(owner, field), field)


DELTA = at("delta")
ONE_MINUS_CLIP_LOW = Bound("1 − clip_low", lambda owner, _: 1 - owner.clip_low)
ONE_PLUS_CLIP_HIGH = Bound("1 + clip_high", lambda owner, _: 1 + owner.clip_high)


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


ANCHOR = Edge("π/anchor", lambda t: t)
SAMPLER = Edge("π/μ", lambda t: t.against("sampler"))
MISMATCH = Edge("π_old/μ", lambda t: t.mismatch)
MISMATCH_OR_SAMPLER = Edge("π_old/μ, or π/μ under anchor sampler", lambda t: t.mismatch if t.anchor == "old" else t)

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
HARMFUL_SEQUENCE = Side(
    "harmful, by sequence",
    "A(s − 1) > 0",
    lambda t: t.advantage.sign() * t.log_ratio.detach().sum(dim=1, keepdim=True) > 0,
)
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
RHO = Statistic("ρ", RATIO.measure, in_logs=True)
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
    """A trust region; its bounds are hyperparameters of whoever has it, its owner.

    Args:
        statistic: what is measured.
        scope: over which tokens.
        side: which tokens it concerns.
        low: what the statistic may fall to; None where it has no lower bound.
        high: what it may rise to, likewise.
        edge: between which policies.
        beside: another region; who is outside of either is outside.
    """

    statistic: Statistic
    scope: Scope = TOKEN
    side: Side = HARMFUL
    low: Bound | None = None
    high: Bound | None = DELTA
    edge: Edge = ANCHOR
    beside: Region | None = None

    @property
    def measured(self) -> str:
        """The statistic over its scope, in a formula."""
        written = self.scope.written_in_logs if self.statistic.in_logs else self.scope.written
        return written.format(self.statistic.symbol)

    @property
    def beyond(self) -> str:
        """When the statistic is beyond a bound, in a formula; of this region alone."""
        ends = ((sign, end) for sign, end in (("<", self.low), (">", self.high)) if end)
        return " or ".join(f"{self.measured} {sign} {end.written}" for sign, end in ends)

    @property
    def where(self) -> str:
        """That, and when a token is outside of the region beside this one, in a formula; :attr:`side` is said elsewhere."""
        return f"{self.beyond}; or {self.beside.outside}" if self.beside else self.beyond

    @property
    def outside(self) -> str:
        """When a token is outside, in a formula."""
        beyond = f"({self.beyond})" if self.side.condition and " or " in self.beyond else self.beyond
        own = " and ".join(filter(None, [self.side.condition, beyond]))
        return f"{own}; or {self.beside.outside}" if self.beside else own

    def measure(self, batch: TokenBatch) -> Tensor:
        """The statistic over its scope, [B, T] or [B, 1]; without gradient."""
        policies = self.edge.between(batch)
        total = self.scope.total(self.statistic.measure(policies), policies)
        return total.exp() if self.statistic.in_logs else total

    def is_outside(self, batch: TokenBatch, owner: Any) -> Tensor:
        """Which tokens are, [B, T], bool. :meth:`drpo.objectives.Objective.is_outside` is what an objective goes by: a few say more there.

        Args:
            batch: the tokens.
            owner: whose hyperparameters the bounds are.
        """
        measured = self.measure(batch)
        beyond = [measured < self.low.of(owner, batch)] if self.low and self.low.of else []
        beyond += [measured > self.high.of(owner, batch)] if self.high and self.high.of else []
        outside = self.side.concerns(self.edge.between(batch)) & functools.reduce(torch.logical_or, beyond)
        return outside | self.beside.is_outside(batch, owner) if self.beside else outside
