"""Where the distance from μ comes from: the engine that sampled, the age of its weights, the updates since."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drpo.metrics.trust_region import TrustRegionMetrics
from drpo.tokens import TokenBatch
from drpo.trainer.micro_batches import loss_mask

SAMPLED_WITH, BEGUN_WITH = "logps_sampled_with", "logps_begun_with"
"""Among a trainer's inputs, [B, T]: its own log-probs of the sampled tokens under the weights that sampled them, and under those that it had when the rollout began."""

_MEASURED = ("divergence/mean", "divergence/p99", "divergence/max", "log_ratio/p01", "log_ratio/p99")


class Split:
    """Distances between μ, π with the weights of μ, π when the rollout began, and π.

    ``engine`` lies between the first two: one set of weights, computed by the sampler and by the
    trainer. ``staleness`` is what the weights changed by before the rollout began, ``drift`` what the
    updates on it changed since.
    """

    def __init__(self) -> None:
        self._parts: dict[str, TrustRegionMetrics] = {}

    def update(self, inputs: dict[str, Any], sampled: TokenBatch) -> None:
        """Add the tokens of a micro-batch.

        Args:
            inputs: the trainer's, with :data:`BEGUN_WITH` and perhaps :data:`SAMPLED_WITH`.
            sampled: their tokens that count, in order; padding may be between them.
        """
        counted = loss_mask(inputs).bool()
        begun = inputs[BEGUN_WITH][counted]
        sampled_with = inputs[SAMPLED_WITH][counted] if SAMPLED_WITH in inputs else begun
        logp, behavior_logp = sampled.logp.detach()[sampled.mask], sampled.behavior_logp[sampled.mask]
        advantage = sampled.advantage[sampled.mask].unsqueeze(0)
        pairs = {"engine": (sampled_with, behavior_logp), "drift": (logp, begun)}
        if SAMPLED_WITH in inputs:
            pairs["staleness"] = (begun, sampled_with)
        for name, (ours, theirs) in pairs.items():
            mask = torch.ones_like(advantage, dtype=torch.bool)
            batch = TokenBatch(ours.unsqueeze(0), theirs.unsqueeze(0), advantage, mask)
            self._parts.setdefault(name, TrustRegionMetrics()).update(batch, torch.ones_like(advantage))

    def take(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What was measured since the last call, as ``PART/divergence/mean`` and so on."""
        measured = {name: part.compute(gather).scalars for name, part in self._parts.items()}
        self._parts.clear()
        return {
            f"{name}/{key}": scalars[key] for name, scalars in measured.items() for key in _MEASURED if key in scalars
        }
