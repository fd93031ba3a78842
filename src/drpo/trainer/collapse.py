"""Training that collapses is stopped, and the best checkpoint from before it is kept and named."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from drpo.errors import TrainingStoppedError
from drpo.trainer.checkpoint import checkpoints_in, update_of


class StopOnCollapse(TrainerCallback):
    """Stops training once the reward has stayed below half of its best, and keeps the best checkpoint whatever is deleted.

    A checkpoint's reward is the mean over the last ``rollouts`` before it. With ``load_best_model_at_end`` the best is
    Transformers' own.

    The best and what came after it are read from the trainer's log, which a checkpoint holds too; with ``logging_steps``
    above 1 these are means over some rollouts. A best reward of at most 0 has no half: training goes on.

    Args:
        rollouts: how many in a row.
    """

    def __init__(self, rollouts: int) -> None:
        self._rollouts = rollouts

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember the best checkpoint of a run that goes on; what it was is not in the last one's own state."""
        self.on_save(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember the best checkpoint, which this library does not delete then."""
        if not args.load_best_model_at_end:
            best = self._find_best(args, state)
            # With a best one Transformers deletes others as training ends, the last one too where one is kept.
            state.best_model_checkpoint = str(best) if best and state.global_step < state.max_steps else None

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the rewards logged so far.

        Raises:
            TrainingStoppedError: training has collapsed.
        """
        rewards = [(row["reward"], row["step"]) for row in state.log_history if row.get("reward") is not None]
        best, best_update = max(rewards, default=(0.0, 0))
        if best <= 0:
            return
        held = max(update for reward, update in rewards if reward >= best / 2)
        last, last_update = rewards[-1]
        if last_update - held < self._rollouts * args.updates_per_rollout:
            return
        best_checkpoint = self._find_best(args, state, until=held)
        where = f"the best checkpoint is {best_checkpoint}" if best_checkpoint else "no checkpoint is from before it"
        raise TrainingStoppedError(
            f"the reward has been below half of its best ({best:.3g} at update {best_update}) for {self._rollouts} rollouts, "
            f"last {last:.3g}; it fell after update {held}, and {where}"
        )

    def _find_best(self, args: Any, state: Any, until: float = math.inf) -> Path | None:
        """The checkpoint up to an update with the highest reward, the latest of equals."""
        window = self._rollouts * args.updates_per_rollout
        best, best_reward = None, -math.inf
        for checkpoint in checkpoints_in(Path(args.output_dir)):
            update = update_of(checkpoint)
            rewards = [
                row["reward"]
                for row in state.log_history
                if row.get("reward") is not None and update - window < row["step"] <= update <= until
            ]
            if rewards and (reward := statistics.fmean(rewards)) >= best_reward:
                best, best_reward = checkpoint, reward
        return best
