"""Held-out accuracy of the policy being trained, sampled from all of its distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from drpo.data.problems import Problem, as_prompt, tokenize_prompt
from drpo.errors import RewardError
from drpo.rewards import Reward, checked_scores, scores_of
from drpo.rollout.sampling import neutral_sampling
from drpo.trainer.rewards import raising_together

if TYPE_CHECKING:
    from drpo.trainer.trainer import DRPOTrainer

BATCH_SIZE = 512
"""Completions generated at once."""


def evaluate(
    trainer: DRPOTrainer, problems: Sequence[Problem], reward: Reward, samples: int, seed: int
) -> list[dict[str, Any]]:
    """Sample ``samples`` completions of every problem at the training temperature and score them.

    The sampling settings are neutral, also where the rollouts are sampled with top-p, top-k or min-p, so that
    accuracies can be compared between runs and with those of ``drpo eval``. Transformers samples, also where a
    ``rollout_func`` samples the rollouts. TRL's own ``trainer.evaluate()`` samples as it trains.

    The same seed draws the same random numbers; the trainer's own are left as they were. Ranks
    share the problems, and every rank gets the whole result.

    Returns:
        A row a completion, those of a problem together, with ``prompt``, ``answer``, ``completion`` and ``reward``, 0.0
        where there was none.
    """
    accelerator = trainer.accelerator
    tokenizer: Any = trainer.processing_class
    template_options: Any = trainer.chat_template_kwargs
    # A sum of rewards says less than its first part whether an answer is right.
    judge = checked_scores(getattr(reward, "correctness", reward), trainer.args.reward_timeout)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    # Ranks may have to generate together: where problems run out, the last one makes up the number.
    mine = [min(index, len(problems) - 1) for index in range(rank, math.ceil(len(problems) / ranks) * ranks, ranks)]
    repeated = [problems[index] for index in mine for _ in range(samples)]
    batches = [slice(start, start + BATCH_SIZE) for start in range(0, len(repeated), BATCH_SIZE)]
    configs = [getattr(trainer, "generation_config", None), trainer.policy.generation_config]
    completion_ids: list[list[int]] = []
    scores: list[float | None] = []
    was_training = trainer.model.training
    trainer.model.eval()
    with torch.random.fork_rng(), neutral_sampling(*filter(None, configs)):
        torch.manual_seed(seed + rank)
        for batch in batches:
            prompt_ids = [tokenize_prompt(problem, tokenizer, **template_options) for problem in repeated[batch]]
            completion_ids += trainer._generate_single_turn(prompt_ids, None, {}, 1)[0]
        prompts = [as_prompt(problem, tokenizer) for problem in repeated]
        completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        answers = [problem.answer for problem in repeated]
        with raising_together():
            for batch in batches:
                columns = prompts[batch], completions[batch], completion_ids[batch], answers[batch]
                scores += scores_of(judge, *columns, trainer.state)
    trainer.model.train(was_training)
    rows = [
        {"prompt": problem.prompt, "answer": problem.answer, "completion": completion, "reward": score}
        for problem, completion, score in zip(repeated, completions, scores, strict=True)
    ]
    rows = gather_object(rows[: len(problems[rank::ranks]) * samples])
    if all(row["reward"] is None for row in rows):
        name = getattr(judge, "__name__", "")
        raise RewardError(
            f"reward {name}: returned None for all {len(rows)} held-out completions; expected some numbers"
        )
    return [{**row, "reward": row["reward"] or 0.0} for row in rows]
