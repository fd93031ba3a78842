"""What an objective is: a per-token loss and the weight it puts on the policy gradient."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class Objective(ABC):
    """A policy-gradient objective over single tokens.

    The gradient weight w is what tells objectives apart, and the two methods are tied by it:

        ∂loss/∂log π = −A · r · w

    A subclass is a frozen dataclass whose fields are positive hyperparameters, each with its
    default. ``formula`` is the quantity maximised, per token; ``weight`` says what w is.
    """

    formula: ClassVar[str]
    weight: ClassVar[str]
    source: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and 0 < value <= sys.float_info.max):
                raise ValueError(f"{field.name} is {value!r}; expected a finite number > 0")

    @abstractmethod
    def loss(self, batch: TokenBatch) -> Tensor:
        """The loss to minimise of each token, [B, T]; 0 where masked."""

    @abstractmethod
    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        """The weight w of each token's policy gradient, [B, T]; without gradient."""
