"""From a recipe to what it needs: problems, configuration, model and trainer, with every mistake a user's."""

from __future__ import annotations

import logging
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PrinterCallback

from drpo.data.files import MalformedRowsError, read_problems
from drpo.data.problems import (
    BUILTIN_MODELS,
    BUILTIN_TASKS,
    Problem,
    as_prompt,
    builtin_problems,
    refuse_longer_prompts,
)
from drpo.data.split import Split
from drpo.errors import UserError
from drpo.precision import BF16_PAYS, time_in_bf16
from drpo.pretrained import load_pretrained
from drpo.rewards import Reward
from drpo.run.checks import describe_overlap, end_tokens, refuse_without_end
from drpo.run.options import build_config
from drpo.run.recipe import Recipe
from drpo.trainer.config import DRPOConfig
from drpo.trainer.trainer import DRPOTrainer

if TYPE_CHECKING:
    from trl.trainer.grpo_trainer import RolloutFunc

logger = logging.getLogger(__name__)

BUILTIN_TRAIN_PROBLEMS = 10_000
"""Distinct training problems of a built-in task, cycled through if the run needs more."""

_TRANSLATED = {"objective", "correction", "reward_timeout"}
_SAME_IN_CONFIG = Recipe.model_fields.keys() & {field.name for field in fields(DRPOConfig)} - _TRANSLATED
"""Fields of a recipe that DRPOConfig has by the same name; it has the defaults of those that are None."""


def quiet_libraries() -> None:
    """Leave to this library what there is to say."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # Pinning memory without an accelerator does nothing, and says so at every epoch.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def load_problems(recipe: Recipe, split: Split, size: int) -> list[Problem]:
    """The problems of a split: all rows of a training file, ``size`` at most of anything else."""
    task = recipe.task
    source = task.train if split == "train" else task.heldout
    if source is None:
        return []
    if source in BUILTIN_TASKS:
        if split == "heldout":
            return builtin_problems(split, size, 0, source)
        return builtin_problems(split, min(size, BUILTIN_TRAIN_PROBLEMS), recipe.seed, source)
    try:
        problems = read_problems(Path(source), prompt=task.prompt, answer=task.answer, template=task.template)
    except MalformedRowsError as error:
        raise MalformedRowsError([f"task.{split}: {mistake}" for mistake in error.mistakes]) from error
    except UserError as error:
        otherwise = "" if Path(source).suffix else f", or one of {', '.join(BUILTIN_TASKS)}"
        raise UserError(f"task.{split}: {error}{otherwise}") from error
    if split == "train" and len(problems) < recipe.prompts_per_rollout:
        raise UserError(
            f"task.train: {source} has {len(problems)} rows; prompts_per_rollout {recipe.prompts_per_rollout} needs as many",
            fix=f"more rows, or prompts_per_rollout: {len(problems)}",
        )
    return problems if split == "train" else problems[:size]


def settle_precision(recipe: Recipe) -> Recipe:
    """The recipe with the precision that ``train_precision: auto`` comes to on this machine, the same on all ranks.

    Raises:
        UserError: the model cannot be loaded.
    """
    if recipe.train_precision != "auto":
        return recipe
    state = PartialState()
    settled = ["fp32"]
    if state.is_main_process:
        share = time_in_bf16(_load_model(recipe)[0].to(state.device))
        settled = ["bf16" if share <= BF16_PAYS else "fp32"]
        logger.warning(
            "A pass of the model takes %.2f times as long in bf16 as in fp32: training in %s.", share, *settled
        )
    broadcast_object_list(settled)
    return recipe.model_copy(update={"train_precision": settled[0]})


def _load_model(recipe: Recipe) -> tuple[Any, Any]:
    source = str(BUILTIN_MODELS.get(recipe.model, recipe.model))
    return load_pretrained(source, torch.float32, field="model", expected=", ".join(BUILTIN_MODELS))


def make_trainer(
    recipe: Recipe,
    reward: Reward,
    problems: list[Problem],
    heldout: list[Problem],
    scratch: str,
    processes: int,
    rollout_func: RolloutFunc | None = None,
) -> DRPOTrainer:
    """The trainer of a recipe. Transformers makes its output folder at once, so it gets a passing one."""
    config = make_config(recipe, scratch, processes)
    model, tokenizer = _load_model(recipe)
    recipe.task.apply(tokenizer, model.config, model.generation_config)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    refuse_without_end(recipe.model, tokenizer, end_tokens(tokenizer, model.generation_config))
    options = cast(dict[str, Any], config.chat_template_kwargs or {})
    for split, asked in (("train", problems), ("heldout", heldout)):
        refuse_longer_prompts(asked, tokenizer, positions, recipe.max_completion_length, f"task.{split}", options)
    if overlap := describe_overlap(problems, heldout):
        logger.warning("%s; accuracy on them says little of others.", overlap)
    try:
        trainer = DRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(
                [{"prompt": as_prompt(p, tokenizer), "answer": p.answer} for p in problems]
            ),
            processing_class=tokenizer,
            peft_config=make_lora(recipe),
            rollout_func=rollout_func,
        )
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.create_optimizer()
    except UserError:
        raise
    except Exception as error:  # each option fails in its own way, deep in a library
        options = [*(f"trainer.{name}" for name in recipe.trainer), *(["lora"] if recipe.lora else [])]
        raise UserError(
            f"cannot set up training with {', '.join(options) or 'this model'}: {type(error).__name__}: {error} "
            "(DRPO_DEBUG=1 shows the traceback)"
        ) from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_config(recipe: Recipe, output_dir: str, processes: int) -> DRPOConfig:
    """The trainer's options, those that follow from the recipe and those under ``trainer``."""
    update = recipe.prompts_per_rollout * recipe.num_generations // recipe.updates_per_rollout
    micro_batch = recipe.micro_batch_size or max(update // processes, 1)
    if update % (micro_batch * processes):
        raise UserError(
            f"micro_batch_size: {micro_batch} x {processes} processes does not divide the {update} samples of an update "
            "(prompts_per_rollout x num_generations / updates_per_rollout)"
        )
    settings: dict[str, Any] = {
        **recipe.model_dump(include=_SAME_IN_CONFIG, exclude_none=True),
        # None is no limit here, and not the default.
        "reward_timeout": recipe.reward_timeout,
        "output_dir": output_dir,
        "objective": recipe.objective.name,
        "objective_kwargs": recipe.objective.hyperparameters,
        "correction": recipe.correction and recipe.correction.name,
        "correction_kwargs": recipe.correction and recipe.correction.hyperparameters,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": update // (micro_batch * processes),
        "max_steps": recipe.rollouts * recipe.updates_per_rollout,
        "save_steps": recipe.checkpoint_every * recipe.updates_per_rollout,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    defaults = {
        "lr_scheduler_type": "constant",
        "save_total_limit": 2,
        "report_to": "none",
        "ddp_find_unused_parameters": False,
        # Without a GPU, Transformers lets bf16 pass only where the CPU is asked for.
        "use_cpu": not torch.accelerator.is_available(),
    }
    config = build_config(settings, defaults, recipe.trainer)
    assert config.generation_batch_size == recipe.prompts_per_rollout * recipe.num_generations
    return config


def make_lora(recipe: Recipe) -> Any:
    """The recipe's adapters for peft; None without."""
    if recipe.lora is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("lora: needs peft; pip install 'drpo[lora]'") from error
    target_modules: Any = recipe.lora.target_modules
    return LoraConfig(
        r=recipe.lora.r, lora_alpha=recipe.lora.alpha, target_modules=target_modules, task_type="CAUSAL_LM"
    )
