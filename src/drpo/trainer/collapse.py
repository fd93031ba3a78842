"""Training that collapses is stopped, and the best checkpoint from before it is kept and named."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from drpo.errors import TrainingStoppedError
from drpo.trainer.checkpoint import checkpoints_in, update_of


class StopOnCollapse(TrainerCallback):
    """Stops training once the reward has stayed below half of its best, and keeps the best checkpoint whatever is deleted.

    A checkpoint's reward is the mean of those logged since the one before it. With ``load_best_model_at_end`` the best is
    Transformers' own.

    The best and what came after it are read from the trainer's log, which a checkpoint holds too; with ``logging_steps``
    above 1 these are means over some rollouts. A best reward of at most 0 has no half: training goes on.

    Args:
        rollouts: how many in a row.
    """

    def __init__(self, rollouts: int) -> None:
        self._rollouts = rollouts

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember the best checkpoint, which Transformers and this library do not delete."""
        if not args.load_best_model_at_end:
            best = _find_best(Path(args.output_dir), state.log_history)
            state.best_model_checkpoint = best and str(best)

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
        best_checkpoint = _find_best(Path(args.output_dir), state.log_history, until=held)
        where = f"the best checkpoint is {best_checkpoint}" if best_checkpoint else "no checkpoint is from before it"
        raise TrainingStoppedError(
            f"the reward has been below half of its best ({best:.3g} at update {best_update}) for {self._rollouts} rollouts, "
            f"last {last:.3g}; it fell after update {held}, and {where}"
        )


def _find_best(folder: Path, log: Sequence[dict[str, Any]], until: float = math.inf) -> Path | None:
    """The checkpoint up to an update with the highest mean reward since the one before it, the latest of equals."""
    best, best_reward, since = None, -math.inf, 0
    for checkpoint in checkpoints_in(folder):
        if update_of(checkpoint) > until:
            break
        rewards = [
            row["reward"]
            for row in log
            if row.get("reward") is not None and since < row["step"] <= update_of(checkpoint)
        ]
        since = update_of(checkpoint)
        if rewards and (reward := statistics.fmean(rewards)) >= best_reward:
            best, best_reward = checkpoint, reward
    return best
