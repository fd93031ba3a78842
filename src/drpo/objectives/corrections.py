"""Corrections of the mismatch between the sampler and the trainer: weights by π_old/μ, and masks for any objective.

A weight multiplies a token's loss and gradient by a bounded function of ρ = π_old/μ, which an objective anchored on π_old
leaves out; the names of the weights are those of TRL's ``vllm_importance_sampling_mode``. A mask drops tokens and weighs
none, so that it goes with an objective anchored on μ as well; there it looks at π/μ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from drpo.objectives.base import Anchor, Hyperparameters, Objective, TopKObjective
from drpo.objectives.regions import (
    EITHER,
    EXCESS,
    K3,
    LARGER_KL,
    LOG_INVERSE,
    MISMATCH,
    MISMATCH_OR_SAMPLER,
    NEGATIVE,
    RATIO,
    RHO,
    SAMPLER,
    SEQUENCE_MAX,
    SEQUENCE_MEAN,
    SEQUENCE_SUM,
    Operator,
    Region,
    at,
)
from drpo.registry import make
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class Correction(Hyperparameters, ABC):
    """A weight for each token, from how far two policies are apart. The region's bounds are fields of that name."""

    region: ClassVar[Region]
    operator: ClassVar[Operator]
    formula: ClassVar[str]

    @property
    @abstractmethod
    def largest(self) -> float:
        """What the weight is at most."""

    def is_outside(self, batch: TokenBatch) -> Tensor:
        """Which tokens are outside of the region, [B, T], bool."""
        return self.region.is_outside(batch, self)

    @abstractmethod
    def weight(self, batch: TokenBatch) -> Tensor:
        """[B, T], without gradient."""


@dataclass(frozen=True)
class _Truncate(Correction):
    operator: ClassVar[Operator] = "weight"

    cap: float = 2.0

    def __init_subclass__(cls) -> None:
        cls.formula = f"min({cls.region.measured}, cap)"

    @property
    def largest(self) -> float:
        return self.cap

    def weight(self, batch: TokenBatch) -> Tensor:
        return self.region.measure(batch).clamp(max=self.cap).expand_as(batch.log_ratio)


@dataclass(frozen=True)
class _Band(Correction):
    operator: ClassVar[Operator] = "weight"

    low: float = 0.5
    high: float = 2.0

    def __init_subclass__(cls) -> None:
        cls.formula = f"{cls.region.measured}, 0 where {cls.region.outside}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise ValueError(f"low is {self.low!r}; expected less than high, {self.high!r}")

    @property
    def largest(self) -> float:
        return self.high

    def weight(self, batch: TokenBatch) -> Tensor:
        return self.region.measure(batch).masked_fill(self.is_outside(batch), 0.0)


@dataclass(frozen=True)
class TokenTruncate(_Truncate):
    """Truncated importance sampling.

    Args:
        cap: the largest weight.
    """

    region: ClassVar[Region] = Region(RHO, side=EITHER, high=at("cap"), edge=MISMATCH)


@dataclass(frozen=True)
class SequenceTruncate(_Truncate):
    """Truncated importance sampling of whole sequences.

    Args:
        cap: the largest weight.
    """

    region: ClassVar[Region] = Region(RHO, SEQUENCE_SUM, EITHER, high=at("cap"), edge=MISMATCH)


@dataclass(frozen=True)
class TokenMask(_Band):
    """Masked importance sampling.

    Args:
        low: the ρ below which a token stops counting.
        high: the ρ above which it does.
    """

    region: ClassVar[Region] = Region(RHO, side=EITHER, low=at("low"), high=at("high"), edge=MISMATCH)


@dataclass(frozen=True)
class SequenceMask(_Band):
    """Masked importance sampling of whole sequences.

    Args:
        low: the Π ρ below which a sequence stops counting.
        high: the Π ρ above which it does.
    """

    region: ClassVar[Region] = Region(RHO, SEQUENCE_SUM, EITHER, at("low"), at("high"), MISMATCH)


@dataclass(frozen=True)
class _Reject(Correction):
    operator: ClassVar[Operator] = "mask"

    def __init_subclass__(cls) -> None:
        cls.formula = f"0 where {cls.region.outside}, else 1"

    @property
    def largest(self) -> float:
        return 1.0

    def weight(self, batch: TokenBatch) -> Tensor:
        return (~self.is_outside(batch)).to(batch.log_ratio.dtype)


@dataclass(frozen=True)
class SequenceMaxK3(_Reject):
    """Trust region masking of sequences by their worst token (arXiv 2512.23075, TRM-max).

    Args:
        delta: nats, the largest k3 of a sequence's tokens beyond which it stops counting.
    """

    region: ClassVar[Region] = Region(K3, SEQUENCE_MAX, EITHER, edge=MISMATCH_OR_SAMPLER)

    delta: float = 0.1


@dataclass(frozen=True)
class SequenceMeanK3(_Reject):
    """Trust region masking of sequences by the mean over their tokens (arXiv 2512.23075, TRM-avg).

    Args:
        delta: nats, the mean k3 of a sequence's tokens beyond which it stops counting. The default is the paper's.
    """

    region: ClassVar[Region] = Region(K3, SEQUENCE_MEAN, EITHER, edge=MISMATCH_OR_SAMPLER)

    delta: float = 0.002


@dataclass(frozen=True)
class SequenceGeometric(_Reject):
    """Rejection of sequences by the geometric mean of their ratios (verl's ``seq_mean_k1``).

    Args:
        low: the mean below which a sequence stops counting.
        high: the mean above which it does.
    """

    region: ClassVar[Region] = Region(RATIO, SEQUENCE_MEAN, EITHER, at("low"), at("high"), MISMATCH_OR_SAMPLER)

    low: float = 0.999
    high: float = 1.001


@dataclass(frozen=True)
class OPSM(_Reject):
    """Off-policy sequence masking: bad sequences that π has left already stop counting (arXiv 2512.02556, Eq. 9).

    Args:
        delta: nats, the mean log(μ/π) of a sequence with A < 0 beyond which it stops counting. No value is agreed
            on; the default is the example of TRL's documentation.
    """

    region: ClassVar[Region] = Region(LOG_INVERSE, SEQUENCE_MEAN, NEGATIVE, edge=SAMPLER)

    delta: float = 0.5


@dataclass(frozen=True)
class KPop(_Reject):
    """Masking of tokens by the binary KL divergence, the larger of both ways (AReaL).

    Args:
        delta: nats, the divergence beyond which a token stops counting; AReaL has no default, and this is DPPO's.
    """

    region: ClassVar[Region] = Region(LARGER_KL, side=EITHER, edge=MISMATCH_OR_SAMPLER)

    delta: float = 0.05


@dataclass(frozen=True)
class VACO(_Reject):
    """Masking of the tokens that take a sequence further out of a total variation (arXiv 2603.01365, as in open-instruct).

    Args:
        delta: the mean |r − 1| of a sequence beyond which its tokens with A(r − 1) > 0 stop counting. open-instruct has no
            default; this one is our choice.
    """

    region: ClassVar[Region] = Region(EXCESS, SEQUENCE_MEAN, edge=MISMATCH_OR_SAMPLER)

    delta: float = 0.2


CORRECTIONS: dict[str, type[Correction]] = {
    "token_truncate": TokenTruncate,
    "token_mask": TokenMask,
    "sequence_truncate": SequenceTruncate,
    "sequence_mask": SequenceMask,
    "sequence_max_k3": SequenceMaxK3,
    "sequence_mean_k3": SequenceMeanK3,
    "sequence_geometric": SequenceGeometric,
    "opsm": OPSM,
    "kpop": KPop,
    "vaco": VACO,
}


def make_correction(name: str, **hyperparameters: Any) -> Correction:
    """The correction called ``name``; errors as :func:`drpo.make_objective`'s."""
    return make("correction", CORRECTIONS, name, hyperparameters)


@dataclass(frozen=True)
class Corrected(Objective):
    """An objective under a correction, each token's loss and gradient times its weight.

    Args:
        objective: the objective.
        correction: the correction. One that weighs by π_old/μ supplies what the ratio π/π_old of the objective leaves out.
    """

    formula: ClassVar[str] = "ρ̂·L, with ρ̂ the correction and L what the objective maximises"
    weight: ClassVar[str] = "ρ̂·w, with w the objective's"
    source: ClassVar[str] = "as TRL's vllm_importance_sampling_mode"
    anchor: ClassVar[Anchor] = "old"

    objective: Objective
    correction: Correction

    def __post_init__(self) -> None:
        objective, weighs = self.objective, self.correction.operator == "weight"
        name = type(objective).__name__
        if objective.corrects_mismatch and weighs:
            raise ValueError(f"{name} weighs tokens by π_old/μ itself; leave the correction out")
        if isinstance(objective, TopKObjective):
            raise ValueError(f"{name} looks at the sampler's likeliest tokens, and no correction goes with that")
        over_sequences = objective.over_sequences or self.correction.region.scope.over_sequences
        object.__setattr__(self, "anchor", "old" if weighs else objective.anchor)
        object.__setattr__(self, "acts_without_advantage", objective.acts_without_advantage)
        object.__setattr__(self, "over_sequences", over_sequences)
        object.__setattr__(self, "over_updates", objective.over_updates)
        object.__setattr__(self, "corrects_mismatch", objective.corrects_mismatch or weighs)

    def for_update(self, update: TokenBatch) -> Objective:
        return replace(self, objective=self.objective.for_update(update))

    @property
    def edge(self) -> float | None:
        return self.objective.edge

    def is_outside(self, batch: TokenBatch) -> Tensor:
        return self.correction.is_outside(batch) | self.objective.is_outside(batch)

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
    if anchor == "sampler" and correction.operator == "weight":
        raise ValueError(
            f"correction: {type(correction).__name__} weighs by π_old/μ a loss whose ratio is taken against μ "
            f"already ({name}); expected an objective anchored on the old policy, anchor 'old', or a correction that masks"
        )
    return Corrected(objective, correction)
