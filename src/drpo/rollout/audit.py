"""Do the log-probs of the sampler and of the trainer agree, before the first update?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

EXACT_THRESHOLD = 1e-3
"""Allowed mean |log π − log μ|, in nats, when one fp32 model both samples (in Transformers) and trains: rounding alone is about 1e-6."""

APPROXIMATE_THRESHOLD = 0.1
"""The same when another engine samples or the precision is lower: bf16 engines differ by about 0.01 to 0.03."""


class AuditError(RuntimeError):
    """The sampler and the trainer do not describe the same policy."""


@dataclass(frozen=True)
class Audit:
    """|log π − log μ| in nats over the tokens of the first update, before it is made."""

    mean: float
    maximum: float
    tokens: int
    threshold: float

    @property
    def passed(self) -> bool:
        return self.mean <= self.threshold

    def __str__(self) -> str:
        relation = "within" if self.passed else "above"
        return (
            f"Audit of {self.tokens} sampled tokens before any update: |log π − log μ| mean {self.mean:.2g}, "
            f"max {self.maximum:.2g}; the mean is {relation} the threshold of {self.threshold:g}."
        )

    def check(self, causes: Sequence[str]) -> None:
        """Raise :class:`AuditError`, with the causes in order, if the mean is above the threshold."""
        if not self.passed:
            listed = "".join(f"\n  {i}. {cause}" for i, cause in enumerate(causes, 1))
            raise AuditError(f"{self} The ratio π/μ would be wrong from the first update on. Likely causes:{listed}")


def likely_causes(
    model: nn.Module, *, scoring_temperature: float, sampling: Mapping[str, Any] | None, precision: str
) -> list[str]:
    """Why μ and π may disagree: first what can be seen to be so, then what cannot be ruled out.

    Args:
        model: the policy, searched for dropout.
        scoring_temperature: what the trainer divides its logits by.
        sampling: the generation settings, where they are known.
        precision: of the training forward pass, such as ``fp32``.
    """
    seen, unknown = [], []
    sampling_temperature = (sampling or {}).get("temperature")
    if sampling_temperature is None:
        unknown.append(
            f"temperature: the trainer scores at {scoring_temperature:g}; check that the sampler uses it too"
        )
    elif sampling_temperature != scoring_temperature:
        seen.append(
            f"temperature: tokens are sampled at {sampling_temperature:g} and scored at {scoring_temperature:g}"
        )
    neutral = {"top_p": (None, 1.0), "top_k": (None, 0, -1), "min_p": (None, 0.0), "repetition_penalty": (None, 1.0)}
    filters = (
        {name: sampling.get(name) for name, off in neutral.items() if sampling.get(name) not in off} if sampling else {}
    )
    if filters:
        named = ", ".join(f"{name}={value:g}" for name, value in filters.items())
        seen.append(
            f"sampling filters: {named} renormalises the sampler's distribution; the trainer scores the full one"
        )
    elif sampling is None:
        unknown.append("sampling filters: top_p, top_k or min_p in the sampler, which the trainer does not apply")
    dropout = _dropout(model)
    if dropout:
        seen.append(
            f"dropout: {', '.join(dropout)} is above 0 while training; set it to 0 in the model's configuration"
        )
    unknown.append("chat template or tokeniser: the sampler may see another prompt than the trainer, or BOS twice")
    low = (
        []
        if precision == "fp32"
        else [f"precision: the trainer's forward pass runs in {precision}; keep log-probs and LM head in fp32"]
    )
    seen += low
    if not low:
        unknown.append(
            "precision: the sampler's weights, activations or log-probs may be below fp32, or its weights stale"
        )
    return seen + unknown


def _dropout(model: nn.Module) -> list[str]:
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    configured = [
        k for k, v in settings.items() if k.endswith(("dropout", "_pdrop")) and isinstance(v, float) and v > 0
    ]
    return configured or modules[:1]
