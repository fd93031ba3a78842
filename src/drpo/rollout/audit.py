"""Do the log-probs of the sampler and of the trainer agree, before the first update?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from drpo.errors import TrainingStoppedError
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
    """

    mean: float
    maximum: float
    tokens: int
    threshold: float
    mismatches: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.mean <= self.threshold and not self.mismatches

    def __str__(self) -> str:
        relation = "within" if self.mean <= self.threshold else "above"
        return (
            f"Audit of {self.tokens} sampled tokens before any update on them: |log π − log μ| mean {self.mean:.2g}, "
            f"max {self.maximum:.2g}; the mean is {relation} the threshold of {self.threshold:g}."
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
    divergence: float
    """|π − μ|, mean."""
    tokens: int


class Differences:
    """What :class:`Difference` is of, over the micro-batches of an update."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, batch: TokenBatch) -> None:
        difference = (batch.logp.detach() - batch.behavior_logp).abs()
        largest = pad(difference.flatten(), (0, 1)).amax()
        divergence = (batch.logp.detach().exp() - batch.behavior_logp.exp()).abs()
        sums = (difference.sum(), largest, divergence.sum(), batch.mask.sum().to(difference))
        self._parts.append(torch.stack(sums))

    def __bool__(self) -> bool:
        return bool(self._parts)

    def take(self, gather: Callable[[Tensor], Tensor]) -> Difference:
        """What was added on all ranks; forgotten here."""
        # Every rank sees the same numbers, so that all of them stop or none does.
        total, largest, divergence, tokens = gather(torch.stack(self._parts)).view(-1, 4).unbind(dim=1)
        self._parts.clear()
        count = int(tokens.sum().item())
        mean, divergence = (sums.sum().item() / max(1, count) for sums in (total, divergence))
        return Difference(mean, largest.max().item(), divergence, count)


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
        is_exact: whether the sampler is this library's, in Transformers: in fp32 nothing but rounding is between the two.
    """

    model: nn.Module
    temperature: float
    precision: str
    rollout_precision: str
    sampling: Mapping[str, Any] | None
    replays_support: bool
    is_exact: bool

    def audit(self, difference: Difference, threshold: float | None) -> Audit:
        """The audit of a difference; a threshold of None is :data:`EXACT_THRESHOLD` or :data:`APPROXIMATE_THRESHOLD`."""
        if threshold is None:
            is_fp32 = self.precision == self.rollout_precision == "fp32"
            threshold = EXACT_THRESHOLD if self.is_exact and is_fp32 else APPROXIMATE_THRESHOLD
        mismatches = sampling_mismatches(self.temperature, self.sampling or {}, self.replays_support)
        return Audit(difference.mean, difference.maximum, difference.tokens, threshold, mismatches)

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
            unknown.append(
                "precision: the sampler's weights, activations or log-probs may be below fp32, or its weights stale"
            )
        else:
            seen.append(
                f"precision: the trainer's forward pass runs in {self.precision}; keep log-probs and LM head in fp32"
            )
        return seen + unknown


def find_dropout(model: nn.Module) -> str | None:
    """The name of a module that drops out, or a setting of attention that does without a module."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return name
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    return "attention_dropout" if settings.get("attention_dropout") else None
