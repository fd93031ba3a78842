"""Corrections of the mismatch between the sampler and the trainer's old policy, for objectives anchored on the latter.

With ρ = π_old/μ, a token's loss and gradient are multiplied by a bounded function of ρ. The names
are those of TRL's ``vllm_importance_sampling_mode``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Anchor, Hyperparameters, Objective, TopKObjective
from drpo.registry import make
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class Correction(Hyperparameters, ABC):
    """A weight for each token, from what the trainer's old policy and the sampler made of it."""

    formula: ClassVar[str]
    over_sequences: ClassVar[bool] = False

    @property
    @abstractmethod
    def largest(self) -> float:
        """What the weight is at most."""

    @abstractmethod
    def weight(self, batch: TokenBatch) -> Tensor:
        """[B, T], without gradient; the batch is anchored on π_old."""


@dataclass(frozen=True)
class _Truncate(Correction):
    cap: float = 2.0

    @property
    def largest(self) -> float:
        return self.cap


@dataclass(frozen=True)
class _Mask(Correction):
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise ValueError(f"low is {self.low!r}; expected less than high, {self.high!r}")

    @property
    def largest(self) -> float:
        return self.high

    def _kept(self, ratio: Tensor) -> Tensor:
        return torch.where((ratio >= self.low) & (ratio <= self.high), ratio, 0.0)


@dataclass(frozen=True)
class TokenTruncate(_Truncate):
    """Truncated importance sampling.

    Args:
        cap: the largest weight.
    """

    formula: ClassVar[str] = "min(ρ, cap)"

    def weight(self, batch: TokenBatch) -> Tensor:
        return batch.mismatch_log_ratio.exp().clamp(max=self.cap)


@dataclass(frozen=True)
class TokenMask(_Mask):
    """Masked importance sampling.

    Args:
        low: the ρ below which a token stops counting.
        high: the ρ above which it does.
    """

    formula: ClassVar[str] = "ρ where low ≤ ρ ≤ high, else 0"

    def weight(self, batch: TokenBatch) -> Tensor:
        return self._kept(batch.mismatch_log_ratio.exp())


@dataclass(frozen=True)
class SequenceTruncate(_Truncate):
    """Truncated importance sampling of whole sequences.

    Args:
        cap: the largest weight.
    """

    formula: ClassVar[str] = "min(Π ρ, cap), the product over the sequence"
    over_sequences: ClassVar[bool] = True

    def weight(self, batch: TokenBatch) -> Tensor:
        return _of_sequence(batch).clamp(max=self.cap)


@dataclass(frozen=True)
class SequenceMask(_Mask):
    """Masked importance sampling of whole sequences.

    Args:
        low: the Π ρ below which a sequence stops counting.
        high: the Π ρ above which it does.
    """

    formula: ClassVar[str] = "Π ρ where low ≤ Π ρ ≤ high, else 0, the product over the sequence"
    over_sequences: ClassVar[bool] = True

    def weight(self, batch: TokenBatch) -> Tensor:
        return self._kept(_of_sequence(batch))


def _of_sequence(batch: TokenBatch) -> Tensor:
    log_ratio = batch.mismatch_log_ratio
    return log_ratio.sum(dim=1, keepdim=True).exp().expand_as(log_ratio)


CORRECTIONS: dict[str, type[Correction]] = {
    "token_truncate": TokenTruncate,
    "token_mask": TokenMask,
    "sequence_truncate": SequenceTruncate,
    "sequence_mask": SequenceMask,
}


def make_correction(name: str, **hyperparameters: Any) -> Correction:
    """The correction called ``name``; errors as :func:`drpo.make_objective`'s."""
    return make("correction", CORRECTIONS, name, hyperparameters)


@dataclass(frozen=True)
class Corrected(Objective):
    """An objective anchored on the trainer's old policy, each token's loss and gradient times a correction's weight.

    Args:
        objective: the objective.
        correction: the correction; it weighs by π_old/μ what the objective's ratio π/π_old leaves out.
    """

    formula: ClassVar[str] = "ρ̂·L, with ρ̂ the correction and L what the objective maximises"
    weight: ClassVar[str] = "ρ̂·w, with w the objective's"
    source: ClassVar[str] = "as TRL's vllm_importance_sampling_mode"
    anchor: ClassVar[Anchor] = "old"
    corrects_mismatch: ClassVar[bool] = True

    objective: Objective
    correction: Correction

    def __post_init__(self) -> None:
        if self.objective.corrects_mismatch:
            raise ValueError(
                f"{type(self.objective).__name__} weighs tokens by π_old/μ itself; leave the correction out"
            )
        over_sequences = self.objective.over_sequences or self.correction.over_sequences
        object.__setattr__(self, "acts_without_advantage", self.objective.acts_without_advantage)
        object.__setattr__(self, "over_sequences", over_sequences)

    @property
    def edge(self) -> float | None:
        return self.objective.edge

    @property
    def weight_bounds(self) -> tuple[float, float]:
        low, high = self.objective.weight_bounds
        return min(low, 0.0) * self.correction.largest, max(high, 0.0) * self.correction.largest

    def loss(self, batch: TokenBatch) -> Tensor:
        return self.correction.weight(batch) * self.objective.loss(batch)

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        return self.correction.weight(batch) * self.objective.gradient_weight(batch)

    def coefficient(self, batch: TokenBatch) -> Tensor:
        return self.correction.weight(batch) * self.objective.coefficient(batch)


def anchored(objective: Objective, anchor: Anchor | None = None, correction: Correction | None = None) -> Objective:
    """The objective under the correction, if both go with the anchor: the one given, or the objective's own.

    Raises:
        ValueError: they do not.
    """
    anchor = anchor or objective.anchor
    name = type(objective).__name__
    if anchor == "old" and isinstance(objective, TopKObjective):
        raise ValueError(
            f"anchor: got 'old' with {name}, which needs the anchor's likeliest tokens, and they are recorded of the "
            "sampler alone; expected 'sampler'"
        )
    if anchor == "sampler" and objective.corrects_mismatch:
        raise ValueError(f"anchor: got 'sampler' with {name}, which weighs tokens by π_old/μ; expected 'old'")
    if correction is None:
        return objective
    if anchor == "sampler":
        raise ValueError(
            f"correction: {type(correction).__name__} weighs by π_old/μ a loss whose ratio is taken against μ "
            f"already ({name}); expected an objective anchored on the old policy, or anchor 'old'"
        )
    return Corrected(objective, correction)
