"""Where the distance from μ comes from: the engine that sampled, the age of its weights, the updates since."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from drpo.metrics.trust_region import TrustRegionMetrics
from drpo.tokens import TokenBatch
from drpo.trainer.batch import RolloutBatch, loss_mask

_MEASURED = ("divergence/mean", "divergence/p99", "divergence/max", "log_ratio/p01", "log_ratio/p99")


class DistanceOrigins:
    """Distances between μ, π with the weights of μ, π when the rollout began, and π.

    ``engine`` lies between the first two: one set of weights, computed by the sampler and by the
    trainer. ``staleness`` is what the weights changed by before the rollout began, ``drift`` what the
    updates on it changed since.
    """

    def __init__(self) -> None:
        self._parts: dict[str, TrustRegionMetrics] = {}

    def update(self, batch: RolloutBatch, sampled: TokenBatch) -> None:
        """Add the tokens of a micro-batch.

        Args:
            batch: with ``old_per_token_logps`` and perhaps ``lagged_per_token_logps``.
            sampled: their tokens that count, in order; padding may be between them.
        """
        counted = loss_mask(batch).bool()
        begun = batch["old_per_token_logps"][counted]
        sampled_with = batch["lagged_per_token_logps"][counted] if "lagged_per_token_logps" in batch else begun
        logp, behavior_logp = sampled.logp.detach()[sampled.mask], sampled.behavior_logp[sampled.mask]
        advantage = sampled.advantage[sampled.mask].unsqueeze(0)
        pairs = {"engine": (sampled_with, behavior_logp), "drift": (logp, begun)}
        if "lagged_per_token_logps" in batch:
            pairs["staleness"] = (begun, sampled_with)
        for name, (ours, theirs) in pairs.items():
            mask = torch.ones_like(advantage, dtype=torch.bool)
            pair = TokenBatch(ours.unsqueeze(0), theirs.unsqueeze(0), advantage, mask)
            self._parts.setdefault(name, TrustRegionMetrics()).update(pair)

    def take(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What was measured since the last call, as ``PART/divergence/mean`` and so on."""
        measured = {name: part.compute(gather).scalars for name, part in self._parts.items()}
        self._parts.clear()
        return {
            f"{name}/{key}": scalars[key] for name, scalars in measured.items() for key in _MEASURED if key in scalars
        }
