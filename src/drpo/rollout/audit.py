"""Do the log-probs of the sampler and of the trainer agree, before the first update?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from drpo.errors import TrainingStoppedError
from drpo.rollout.routing import find_routers
from drpo.rollout.sampling import sampling_mismatches
from drpo.tokens import TokenBatch

EXACT_THRESHOLD = 1e-3
"""Allowed mean |log π − log μ|, in nats, when one fp32 model both samples (in Transformers) and trains: rounding alone is about 1e-6."""

APPROXIMATE_THRESHOLD = 0.1
"""The same when another engine samples or the precision is lower: bf16 engines differ by about 0.01 to 0.03."""


class AuditError(TrainingStoppedError):
    """The sampler and the trainer do not describe the same policy."""


@dataclass(frozen=True)
class Audit:
    """|log π − log μ| in nats over the tokens of one update, before it is made.

    Args:
        mean: over tokens.
        maximum: over tokens.
        tokens: how many were compared.
        threshold: of the mean, above which training stops.
        mismatches: differences between sampling and scoring that are known from the settings; one
            is enough to stop, however small the mean: greedy decoding, say, leaves no trace in it.
        elsewhere: the share of tokens that the policy sends to another expert than the sampler did, in one layer at
            least; None where no experts were recorded.
    """

    mean: float
    maximum: float
    tokens: int
    threshold: float
    mismatches: tuple[str, ...] = ()
    elsewhere: float | None = None

    @property
    def passed(self) -> bool:
        return self.mean <= self.threshold and not self.mismatches

    def __str__(self) -> str:
        relation = "within" if self.mean <= self.threshold else "above"
        experts = (
            "" if self.elsewhere is None else f" {self.elsewhere:.1%} of the tokens go to other experts than they did."
        )
        return (
            f"Audit of {self.tokens} sampled tokens before any update on them: |log π − log μ| mean {self.mean:.2g}, "
            f"max {self.maximum:.2g}; the mean is {relation} the threshold of {self.threshold:g}.{experts}"
        )

    def check(self, other_causes: Sequence[str]) -> None:
        """Raise :class:`AuditError` if the audit is not passed, with the causes: the mismatches, then the others in order."""
        if not self.passed:
            causes = [*self.mismatches, *other_causes]
            listed = "".join(f"\n  {i}. {cause}" for i, cause in enumerate(causes, 1))
            raise AuditError(f"{self} The ratio π/μ would be wrong from the first update on. Likely causes:{listed}")


class Difference(NamedTuple):
    """Between the log-probs of sampler and trainer, over tokens; all 0 where there are none."""

    mean: float
    """|log π − log μ| in nats."""
    maximum: float
    log_odds: float
    """See :func:`log_odds_sums`."""
    weight: float
    """Of the tokens in that."""
    tokens: int
    elsewhere: float | None
    """As :class:`Audit`'s."""


def log_odds_sums(prob: Tensor, other: Tensor, counted: Tensor) -> Tensor:
    """How far the log-odds of tokens are apart under two policies: Σ|π − π'| and the weight to divide it by, [2], fp32.

    To first order, |π − π'| is π(1 − π) times the change of log π/(1 − π), in nats. The quotient is the mean of that change,
    each token by how much it moves the policy, which hardly depends on how sure the policy is; means of |π − π'| and of
    |log π − log π'| do.

    Args:
        prob: π, of any shape.
        other: π', of the same shape.
        counted: the tokens that count, bool, of the same shape.
    """
    weight = (prob * (1 - prob) + other * (1 - other)) / 2
    return torch.stack([values.masked_fill(~counted, 0.0).sum() for values in ((prob - other).abs(), weight)]).float()


def log_odds_mean(sums: Tensor) -> tuple[float, float]:
    """The mean of the change and its weight, from :func:`log_odds_sums` of any number of parts, [N, 2]."""
    total, weight = sums.sum(dim=0).tolist()
    return (total / weight if weight else 0.0), weight


class Differences:
    """Collects the sums that a :class:`Difference` is computed from, over the micro-batches of an update."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, batch: TokenBatch, other_experts: Tensor | None = None) -> None:
        """Add tokens, and the share of each one's experts that differ, [tokens that count, layers], where they are known."""
        logp = batch.logp.detach()
        difference = (logp - batch.behavior_logp).abs()
        largest = pad(difference.flatten(), (0, 1)).amax()
        sums = torch.stack([difference.sum(), largest, batch.mask.sum().to(difference)])
        log_odds = log_odds_sums(logp.exp(), batch.behavior_logp.exp(), batch.mask.bool())
        elsewhere = (
            sums.new_tensor(torch.nan) if other_experts is None else (other_experts > 0).any(dim=1).sum().to(sums)
        )
        self._parts.append(torch.cat([sums, log_odds, elsewhere.view(1)]))

    def __bool__(self) -> bool:
        return bool(self._parts)

    def take(self, gather: Callable[[Tensor], Tensor]) -> Difference:
        """What was added on all ranks; forgotten here."""
        # Every rank sees the same numbers, so that all of them stop or none does.
        parts = gather(torch.stack(self._parts)).view(-1, 6)
        self._parts.clear()
        total, largest, tokens, *_, elsewhere = parts.unbind(dim=1)
        count = int(tokens.sum().item())
        mean = total.sum().item() / max(1, count)
        share = elsewhere.sum().item() / max(1, count)
        elsewhere_share = None if math.isnan(share) else share
        return Difference(mean, largest.max().item(), *log_odds_mean(parts[:, 3:5]), count, elsewhere_share)


@dataclass(frozen=True)
class AuditedPolicy:
    """What is known of sampler and trainer beside the log-probs of both.

    Args:
        model: the policy, searched for dropout.
        temperature: what the trainer divides its logits by.
        precision: of the training forward pass, such as ``fp32``.
        rollout_precision: of the sampler, where it is this library's.
        sampling: the sampler's settings by Transformers' names; None where they are not known.
        replays_support: whether the trainer scores over the tokens that filters left.
        replays_experts: whether it sends tokens to the experts that the sampler chose.
        is_exact: whether the sampler is this library's, in Transformers: in fp32 nothing but rounding is between the two.
    """

    model: nn.Module
    temperature: float
    precision: str
    rollout_precision: str
    sampling: Mapping[str, Any] | None
    replays_support: bool
    replays_experts: bool
    is_exact: bool

    def audit(self, difference: Difference, threshold: float | None) -> Audit:
        """The audit of a difference; a threshold of None is :data:`EXACT_THRESHOLD` or :data:`APPROXIMATE_THRESHOLD`."""
        if threshold is None:
            is_fp32 = self.precision == self.rollout_precision == "fp32"
            threshold = EXACT_THRESHOLD if self.is_exact and is_fp32 else APPROXIMATE_THRESHOLD
        mismatches = sampling_mismatches(self.temperature, self.sampling or {}, self.replays_support)
        return Audit(
            difference.mean, difference.maximum, difference.tokens, threshold, mismatches, difference.elsewhere
        )

    def likely_causes(self) -> list[str]:
        """Why μ and π may disagree where the sampling settings do not say: first what can be seen, then what cannot be ruled out."""
        seen, unknown = [], []
        if self.sampling is None:
            unknown.append(
                f"temperature: the trainer scores at {self.temperature:g}; check that the sampler uses it too"
            )
            unknown.append("sampling filters: top_p, top_k or min_p in the sampler, which the trainer does not apply")
        if dropout := find_dropout(self.model):
            seen.append(f"dropout: {dropout} is above 0 while training; set it to 0 in the model's configuration")
        unknown.append("chat template or tokeniser: the sampler may see another prompt than the trainer, or BOS twice")
        if self.rollout_precision != self.precision:
            seen.append(f"precision: tokens are sampled in {self.rollout_precision} and scored in {self.precision}")
        elif self.precision == "fp32":
            unknown.append("precision: the sampler's weights, activations or log-probs may be below fp32")
        else:
            seen.append(
                f"precision: the trainer's forward pass runs in {self.precision}; keep log-probs and LM head in fp32"
            )
        if find_routers(self.model) and not self.replays_experts:
            unknown.append(
                "routers: the trainer may choose other experts than the sampler did; router_replay=True takes the sampler's"
            )
        unknown.append("weights: the sampler may have older ones than the trainer")
        return seen + unknown


def find_dropout(model: nn.Module) -> str | None:
    """The name of a module that drops out, or a setting of attention that does without a module."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return name
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    return "attention_dropout" if settings.get("attention_dropout") else None
