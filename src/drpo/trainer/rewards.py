"""What the rewards of a rollout must be to be trained on, and the advantages that come of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor

from drpo.advantage import group_advantage
from drpo.aggregation import mean_lengths_by_prompt
from drpo.errors import RewardError
from drpo.rewards import LARGEST_REWARD
from drpo.trainer.batch import RolloutBatch, loss_mask

if TYPE_CHECKING:
    from drpo.trainer.trainer import DRPOTrainer


def sum_rewards(per_function: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over reward functions, [N] of [N, functions]; NaN where none of them gave a score."""
    unscored = per_function.isnan().all(dim=1)
    return (per_function * weights.to(per_function)).nansum(dim=1).masked_fill(unscored, torch.nan)


def add_advantages(batch: RolloutBatch, trainer: DRPOTrainer, per_function: Tensor) -> None:
    """Write rewards, advantages and what the aggregation needs of a prompt's lengths, of all ranks' scores [N, functions].

    The advantages are logged in place of TRL's.

    Raises:
        RewardError: scores that cannot be trained on.
    """
    check_rewards(per_function, trainer.reward_func_names)
    rewards = sum_rewards(per_function, trainer.reward_weights)
    group_size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    lengths = trainer.accelerator.gather(loss_mask(batch).sum(dim=1))
    try:
        advantages = group_advantage(rewards, group_size, trainer.args.advantage, lengths)
    except ValueError as error:
        raise RewardError(f"reward {', '.join(trainer.reward_func_names)}: {error}") from error
    logged = trainer._logs["advantages"]
    for _ in range(min(len(logged), len(advantages))):
        logged.pop()
    logged.extend(advantages.tolist())
    size = len(lengths) // trainer.accelerator.num_processes
    own = slice(trainer.accelerator.process_index * size, (trainer.accelerator.process_index + 1) * size)
    batch["rewards"], batch["advantages"] = rewards[own], advantages[own]
    if trainer.args.aggregation == "prompt-mean":
        batch["mean_lengths"] = mean_lengths_by_prompt(lengths, group_size)[own]


@contextmanager
def raising_together() -> Iterator[None]:
    """Raise on every rank the RewardError of one within this context: a rank that waits for one that has failed waits for ever."""
    failure: RewardError | None = None
    try:
        yield
    except RewardError as error:
        failure = error
    failures = [message for message in gather_object([str(failure or "")]) if message]
    if failures:
        raise failure or RewardError(failures[0])


def check_rewards(per_function: Tensor, names: Sequence[str]) -> None:
    """Check that no score is too large to train on, [N, functions], scores of reward models included.

    Raises:
        RewardError: one is; the message names the function and the row.
    """
    for column, name in enumerate(names):
        magnitudes = per_function[:, column].nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf).abs()
        if magnitudes.max() > LARGEST_REWARD:
            row = int(magnitudes.argmax())
            raise RewardError(
                f"reward {name}: a score of magnitude {magnitudes[row].item():g} for completion {row} of the rollout; "
                f"expected at most {LARGEST_REWARD:g}, or None"
            )


def check_some_rewards(per_function: Tensor, names: Sequence[str]) -> None:
    """Check that not all scores of a rollout are None, [N, functions].

    Raises:
        RewardError: they are.
    """
    if per_function.isnan().all():
        raise RewardError(
            f"reward {', '.join(names)}: returned None for all {len(per_function)} completions of the rollout; "
            "expected some numbers"
        )
