"""What an objective is: a per-token loss and the weight it puts on the policy gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor

from drpo.objectives.regions import SHIFT, TOKEN, Operator, Region
from drpo.tokens import Anchor, TokenBatch

SYMBOLS: dict[Anchor, str] = {"sampler": "μ", "old": "π_old"}

SMALLEST, LARGEST = 1e-9, 1e9
"""What a hyperparameter may be: losses and gradients stay finite in fp32 with any in between."""


@dataclass(frozen=True)
class Hyperparameters:
    """A frozen dataclass whose fields are numbers > 0, within ``SMALLEST`` and ``LARGEST``."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and 0 < value < math.inf):
                raise ValueError(f"{field.name} is {value!r}; expected a finite number > 0")
            if not SMALLEST <= value <= LARGEST:
                raise ValueError(f"{field.name} is {value!r}; expected a number from {SMALLEST:g} to {LARGEST:g}")


@dataclass(frozen=True)
class Objective(Hyperparameters, ABC):
    """A policy-gradient objective.

    The gradient weight w is what tells objectives apart, and the two methods are tied by it:

        ∂loss/∂log π = −A · r · w, the loss of every token by its own log-prob and no other

    An objective over whole sequences takes what it computes from all tokens of a sequence (a mean
    ratio, a budget) as a constant, and lets each token's log-prob carry its share of the gradient.
    That is the gradient of the sequence's loss: a reduction weighs all tokens of a row alike.

    A subclass is a frozen dataclass whose fields are positive hyperparameters, each with its
    default. ``formula`` is the quantity maximised, per token, in which sg stops the gradient;
    ``weight`` says what w is; ``anchor`` which policy the ratio is taken against.
    """

    formula: ClassVar[str]
    weight: ClassVar[str]
    source: ClassVar[str]
    anchor: ClassVar[Anchor]

    acts_without_advantage: ClassVar[bool] = False
    """Whether a token with A = 0 has a gradient too."""

    over_sequences: ClassVar[bool] = False
    """Whether what a token gets depends on the other tokens of its sequence."""

    over_updates: ClassVar[bool] = False
    """Whether it depends on the other tokens of its update too, as :class:`UpdateObjective`'s does."""

    corrects_mismatch: ClassVar[bool] = False
    """Whether the objective weighs tokens by π_old/μ itself, and so needs both."""

    region: ClassVar[Region | None] = None
    """Where the gradient is not the plain one any more; None where no hyperparameter bounds a distance."""

    operator: ClassVar[Operator] = "shaper"
    """How the gradient changes there: tokens are dropped, weighted, or the loss itself bends."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.region is not None:
            cls.over_sequences = cls.over_sequences or cls.region.scope.over_sequences

    @property
    @abstractmethod
    def weight_bounds(self) -> tuple[float, float]:
        """What w stays within, whatever the tokens; infinite where it has no bound."""

    @property
    def edge(self) -> float | None:
        """The |π − μ| at which w reaches 0 or a mask sets in; None where it is not |π − μ| that decides."""
        region = self.region
        if region is None or region.statistic is not SHIFT or region.scope is not TOKEN or region.high is None:
            return None
        return getattr(self, region.high.field) if region.high.field else None

    def is_outside(self, batch: TokenBatch) -> Tensor:
        """Which tokens are outside of the region, [B, T], bool; where there is none, those whose weight is 0 or below."""
        return self.gradient_weight(batch) <= 0 if self.region is None else self.region.is_outside(batch, self)

    @abstractmethod
    def loss(self, batch: TokenBatch) -> Tensor:
        """The loss to minimise of each token, [B, T]; 0 where masked."""

    @abstractmethod
    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        """The weight w of each token's policy gradient, [B, T]; without gradient. Where A = 0 it says nothing."""

    def for_update(self, update: TokenBatch) -> Objective:
        """The objective for parts of this update."""
        return self

    def coefficient(self, batch: TokenBatch) -> Tensor:
        """What each token's ∇log π is multiplied by, [B, T]; without gradient: −∂loss/∂log π = A · r · w."""
        return batch.advantage * batch.ratio.detach() * self.gradient_weight(batch)


@dataclass(frozen=True)
class MaskObjective(Objective):
    """The surrogate r·A of the tokens that a region keeps: M·r·A, so that w = M is 0 or 1.

    A subclass names its region, whose bounds are its hyperparameters.
    """

    weight: ClassVar[str] = "M"
    operator: ClassVar[Operator] = "mask"
    region: ClassVar[Region]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "formula" not in vars(cls):
            definition = cls.region.statistic.definition
            cls.formula = f"M·r·A, with M = 0 where {cls.region.outside}, else 1{definition and f'; {definition}'}"

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 0.0, 1.0

    def loss(self, batch: TokenBatch) -> Tensor:
        return -self.gradient_weight(batch) * batch.ratio * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return (~self.is_outside(batch)).to(batch.advantage.dtype)


@dataclass(frozen=True)
class UpdateObjective(Objective):
    """An objective for which a token depends on all tokens of its update, by a few numbers: its ``summary``.

    A batch is an update by itself. Where an update is split, :meth:`for_update` takes the summary of the whole, and what
    it returns gives the tokens of any part what they have in the whole.
    """

    over_updates: ClassVar[bool] = True
    over_sequences: ClassVar[bool] = True

    @abstractmethod
    def summary(self, update: TokenBatch) -> Tensor:
        """What the tokens of an update have to know of it; without gradient."""

    def for_update(self, update: TokenBatch) -> Self:
        fixed = copy(self)
        for name, value in (("_summary", self.summary(update)), ("over_updates", False), ("over_sequences", False)):
            object.__setattr__(fixed, name, value)
        return fixed

    def summary_of(self, batch: TokenBatch) -> Tensor:
        """The summary of the update that a batch belongs to."""
        fixed: Tensor | None = getattr(self, "_summary", None)
        return self.summary(batch) if fixed is None else fixed


@dataclass(frozen=True)
class PenaltyObjective(Objective):
    """An objective whose coefficient is not a multiple of A; its weight follows from it."""

    acts_without_advantage: ClassVar[bool] = True

    @abstractmethod
    def coefficient(self, batch: TokenBatch) -> Tensor: ...

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        steered = batch.advantage != 0
        weight = self.coefficient(batch) / (torch.where(steered, batch.advantage, 1.0) * batch.ratio.detach())
        return torch.where(steered, weight, 1.0)

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return -math.inf, math.inf


@dataclass(frozen=True)
class TopKObjective(Objective):
    """An objective that looks at the sampler's likeliest tokens, ``TokenBatch.topk``, beside the sampled one.

    The gradient weight is that of the sampled token's log π, wherever the loss takes it from.

    Args:
        top_k: how many log-probs of each policy a token carries; all of a smaller vocabulary.
    """

    top_k: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.top_k, int):
            raise ValueError(f"top_k is {self.top_k!r}; expected a whole number")

    def top_k_coefficient(self, batch: TokenBatch) -> Tensor:
        """−∂loss/∂log π of the tokens in ``topk`` that were not sampled, [B, T, K]; without gradient."""
        return torch.zeros_like(batch.likeliest.behavior_logp)
