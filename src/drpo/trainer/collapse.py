"""Training that collapses is stopped, and the checkpoint from before it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from drpo.errors import TrainingStoppedError
from drpo.trainer.checkpoint import checkpoints_in, update_of


class StopOnCollapse(TrainerCallback):
    """Stops training once the reward has stayed below half of its best.

    The best and what came after it are read from the trainer's log, which a checkpoint holds too; with ``logging_steps``
    above 1 these are means over some rollouts. A best reward of at most 0 has no half: training goes on.

    Args:
        rollouts: how many in a row.
    """

    def __init__(self, rollouts: int) -> None:
        self._rollouts = rollouts

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
        raise TrainingStoppedError(
            f"the reward has been below half of its best ({best:.3g} at update {best_update}) for {self._rollouts} rollouts, "
            f"last {last:.3g}; {_name_checkpoint(Path(args.output_dir), held)}"
        )


def _name_checkpoint(folder: Path, update: int) -> str:
    """The newest checkpoint that was written up to an update, for a message."""
    before = [checkpoint for checkpoint in checkpoints_in(folder) if update_of(checkpoint) <= update]
    if not before:
        return f"no checkpoint is from before it fell, after update {update}"
    return f"{before[-1]} is from before it fell, after update {update}"
