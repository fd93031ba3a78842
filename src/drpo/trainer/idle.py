"""Rollouts that nothing can be trained on, and data that makes none."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather

from drpo.metrics.untrained import REASONS
from drpo.trainer.batch import RolloutBatch, has_advantage, loss_mask
from drpo.trainer.config import DRPOConfig

logger = logging.getLogger(__name__)


class IdleRollouts:
    """Counts the rollouts in which no token can have a gradient, and says so at the first and after any other.

    Args:
        needs_advantage: whether a sequence with A = 0 has no gradient.

    Attributes:
        counts: rollouts so far, by :data:`drpo.metrics.untrained.REASONS`.
    """

    def __init__(self, needs_advantage: bool) -> None:
        self.counts: dict[str, int] = {}
        self._needs_advantage = needs_advantage
        self._is_in_a_row = False

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"counts": dict(self.counts), "is_in_a_row": self._is_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.counts, self._is_in_a_row = dict(state_dict["counts"]), state_dict["is_in_a_row"]

    def add(self, batch: RolloutBatch, number: int) -> None:
        """Look at a rollout; all ranks do together.

        Args:
            batch: of this rank.
            number: of the rollout, from 1 on.
        """
        counted = loss_mask(batch).bool().any(dim=1)
        trained = has_advantage(batch) if self._needs_advantage else counted
        signs: Any = gather(torch.stack([counted.any(), trained.any()])[None])
        is_counted, is_trained = signs.any(dim=0).tolist()
        if is_trained:
            self._is_in_a_row = False
            return
        rewards: Any = gather(batch["rewards"])
        reason = "equal_rewards" if is_counted else "all_masked"
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if PartialState().is_main_process and not self._is_in_a_row:
            values = rewards[~rewards.isnan()].unique()
            shown = f" (all {values.item():g})" if is_counted and len(values) == 1 else ""
            logger.warning("Rollout %d has nothing to train on: %s%s.", number, REASONS[reason], shown)
        self._is_in_a_row = True


def refuse_too_few_prompts(dataset: Any, args: DRPOConfig) -> None:
    """Refuse a data set with fewer rows than a rollout has prompts: TRL would make no rollout of it, and no step.

    Raises:
        ValueError: it has fewer.
    """
    assert args.generation_batch_size is not None
    assert args.num_generations is not None
    prompts = args.generation_batch_size // args.num_generations
    if len(dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(dataset)} rows, and a rollout takes {prompts} prompts ({args.generation_batch_size} "
            f"completions / num_generations {args.num_generations}), so that no step would be made; expected at least "
            f"{prompts} rows, or a smaller per_device_train_batch_size, gradient_accumulation_steps or updates_per_rollout"
        )
