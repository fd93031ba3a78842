"""The first rollout of a model, the built-in one on its task by default, as a trainer sees it before any update."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo import DRPOConfig, DRPOTrainer
from drpo.data.problems import BUILTIN_MODELS, Problem, builtin_problems
from drpo.rewards import exact_answer
from drpo.rollout.audit import AuditError
from drpo.trainer.token_log import TokenLog

PROMPTS, GROUP = 64, 8
MODEL = str(BUILTIN_MODELS["arithmetic"])


def first_rollout(
    seed: int,
    kind: type[DRPOTrainer] = DRPOTrainer,
    rollout_func: Any = None,
    of_model: dict[str, Any] | None = None,
    model: str = MODEL,
    problems: Sequence[Problem] = (),
    **settings: Any,
) -> tuple[DRPOTrainer, list[dict[str, Any]]]:
    """A trainer and the rows of its first rollout: PROMPTS prompts, GROUP completions each; the audit may have stopped it there.

    Args:
        seed: of prompts and samples.
        kind: of trainer.
        rollout_func: what samples; Transformers by default.
        of_model: settings that its configuration is loaded with.
        model: a folder.
        problems: PROMPTS of them; the built-in task's by default.
        settings: of the trainer.
    """
    problems = problems or builtin_problems("train", PROMPTS, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **(of_model or {})),
            reward_funcs=exact_answer,
            args=DRPOConfig(
                folder,
                **{
                    "per_device_train_batch_size": PROMPTS * GROUP,
                    "num_generations": GROUP,
                    "updates_per_rollout": 1,
                    "max_steps": 1,
                    "max_completion_length": 20,
                    "gradient_checkpointing": False,
                    "use_cpu": not torch.accelerator.is_available(),
                    "save_strategy": "no",
                    "report_to": "none",
                    "disable_tqdm": True,
                    "seed": seed,
                    **settings,
                },
            ),
            train_dataset=Dataset.from_list([vars(problem) for problem in problems]),
            processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
            rollout_func=rollout_func,
        )
        trainer.token_log = TokenLog(trainer.processing_class)
        with contextlib.suppress(AuditError):
            trainer.train()
    return trainer, trainer.token_log.take()
