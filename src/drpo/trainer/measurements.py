"""What the tokens of updates say of the policy, between two rows of the trainer's log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from drpo.metrics import TrustRegion, TrustRegionMetrics
from drpo.rollout.audit import Differences
from drpo.trainer.batch import RolloutBatch
from drpo.trainer.mismatch import Split
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
        self._split = Split() if splits_distance else None

    def add(self, mode: Mode, batch: RolloutBatch, scored: Scored, audits: bool) -> None:
        """Add the tokens of a micro-batch, with ``audits`` to the differences too."""
        # How far π has gone is measured from what was sampled from, whatever the ratio is taken against.
        self._trust_region[mode].update(scored.sampled, scored.gradient_weight, scored.entropy)
        if mode == "train" and self._split is not None:
            self._split.update(batch, scored.sampled)
        if audits:
            self.differences.add(scored.sampled)

    def take(self, mode: Mode, gather: Callable[[Tensor], Tensor]) -> tuple[TrustRegion, dict[str, float]]:
        """What was measured since the last call, over all ranks, which call it together; and its metrics by name."""
        measured = self._trust_region[mode].compute(gather)
        self._trust_region[mode].reset()
        origins = self._split.take(gather) if self._split is not None and mode == "train" else {}
        return measured, {**measured.scalars, **origins}
