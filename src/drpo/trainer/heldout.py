"""Held-out accuracy of the policy being trained, sampled from all of its distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from drpo.data.problems import Problem, as_prompt
from drpo.rewards import Reward, scores_of

if TYPE_CHECKING:
    from drpo.trainer.trainer import DRPOTrainer

BATCH_SIZE = 512
"""Completions generated at once."""

OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
"""The filters at values that keep all tokens. Not None: Transformers takes the model's own setting then."""


@dataclass(frozen=True)
class Evaluation:
    """Completions of held-out problems and their rewards.

    Args:
        accuracy: share of completions whose reward is at least 1.
        samples: a row a completion, with ``prompt``, ``answer``, ``completion`` and ``reward``, 0.0 where there was none.
    """

    accuracy: float
    samples: list[dict[str, Any]]


def evaluate(trainer: DRPOTrainer, problems: Sequence[Problem], reward: Reward, samples: int, seed: int) -> Evaluation:
    """Sample ``samples`` completions of every problem at the training temperature and score them.

    Nothing is filtered, also where the rollouts are sampled with top-p, top-k or min-p: accuracies of runs
    that differ in these are of the same thing, which is what ``drpo eval`` measures too. Transformers
    samples where a ``rollout_func`` does for the rollouts. TRL's own ``trainer.evaluate()`` samples as it trains.

    The same seed draws the same random numbers; the trainer's own are left as they were. Ranks
    share the problems, and every rank gets the whole result.
    """
    accelerator = trainer.accelerator
    tokenizer: Any = trainer.processing_class
    # A sum of rewards says less than its first part whether an answer is right.
    judge: Reward = getattr(reward, "correctness", reward)
    mine = problems[accelerator.process_index :: accelerator.num_processes]
    asked = [problem for problem in mine for _ in range(samples)]
    rows: list[dict[str, Any]] = []
    was_training = trainer.model.training
    trainer.model.eval()
    with torch.random.fork_rng(), _unfiltered(trainer):
        torch.manual_seed(seed + accelerator.process_index)
        for start in range(0, len(asked), BATCH_SIZE):
            batch = asked[start : start + BATCH_SIZE]
            prompts = [as_prompt(problem, tokenizer) for problem in batch]
            prompt_ids, images, multimodal = trainer._tokenize_prompts(prompts)
            completion_ids, _ = trainer._generate_single_turn(prompt_ids, images, multimodal, 1)
            completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
            answers = [problem.answer for problem in batch]
            scores = scores_of(judge, prompts, completions, completion_ids, answers, trainer.state)
            rows += [
                {
                    "prompt": problem.prompt,
                    "answer": problem.answer,
                    "completion": completion,
                    "reward": score or 0.0,
                }
                for problem, completion, score in zip(batch, completions, scores, strict=True)
            ]
    trainer.model.train(was_training)
    rows = gather_object(rows)
    return Evaluation(accuracy=sum(row["reward"] >= 1 for row in rows) / len(rows), samples=rows)


@contextmanager
def _unfiltered(trainer: DRPOTrainer) -> Iterator[None]:
    """Within this context Transformers samples without filters; vLLM has none, since DRPOConfig refuses them for it."""
    config: Any = getattr(trainer, "generation_config", SimpleNamespace())
    rollouts = {name: getattr(config, name, None) for name in OFF}
    for name, value in OFF.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in rollouts.items():
            setattr(config, name, value)
