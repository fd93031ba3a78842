"""What the tokens of updates say of the policy, between two rows of the trainer's log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from drpo.metrics import TrustRegion, TrustRegionMetrics
from drpo.rollout.audit import Differences
from drpo.trainer.batch import RolloutBatch
from drpo.trainer.distance_origins import DistanceOrigins
from drpo.trainer.scoring import Scored

Mode = Literal["train", "eval"]


class Measurements:
    """Collects the scored tokens of micro-batches.

    Args:
        splits_distance: measure where the distance from μ comes from.

    Attributes:
        differences: between sampler and trainer, for the audit of the first update.
    """

    def __init__(self, splits_distance: bool) -> None:
        self.differences = Differences()
        self._trust_region = {"train": TrustRegionMetrics(), "eval": TrustRegionMetrics()}
        self._origins = DistanceOrigins() if splits_distance else None
        self._other_experts: list[Tensor] = []

    def add(self, mode: Mode, batch: RolloutBatch, scored: Scored, is_on_policy: bool) -> None:
        """Add the tokens of a micro-batch, and where π is still what sampled to the differences too."""
        # How far π has gone is measured from what was sampled from, whatever the ratio is taken against.
        self._trust_region[mode].update(scored.sampled, scored.gradient_weight, scored.entropy)
        if mode == "train" and self._origins is not None:
            self._origins.update(batch, scored.sampled)
        if is_on_policy:
            self.differences.add(scored.sampled, scored.other_experts)
        if is_on_policy and scored.other_experts is not None:
            share = scored.other_experts
            sums = [(share > 0).any(dim=1).sum(), share.mean(dim=1).sum(), share.new_tensor(len(share))]
            self._other_experts.append(torch.stack([value.float() for value in sums]))

    def take(self, mode: Mode, gather: Callable[[Tensor], Tensor]) -> tuple[TrustRegion, dict[str, float]]:
        """What was measured since the last call, over all ranks, which call it together; and its metrics by name."""
        measured = self._trust_region[mode].compute(gather)
        self._trust_region[mode].reset()
        origins = self._origins.take(gather) if self._origins is not None and mode == "train" else {}
        routing = self._take_routing(gather) if mode == "train" else {}
        return measured, {**measured.scalars, **origins, **routing}

    def _take_routing(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Before updates: the share of tokens that the policy would send to other experts than the sampler did in one layer at least, and the mean share of their experts."""
        if not self._other_experts:
            return {}
        tokens, experts, count = gather(torch.stack(self._other_experts)).view(-1, 3).sum(dim=0).tolist()
        self._other_experts.clear()
        return {"routing/other_tokens": tokens / count, "routing/other_experts": experts / count} if count else {}
