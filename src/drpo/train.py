"""From a recipe to a run folder: what the command ``drpo train`` does."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from drpo.errors import UserError
from drpo.evaluation import Evaluation, as_prompt, evaluate
from drpo.names import unknown_name
from drpo.objectives import make_objective
from drpo.progress import Progress
from drpo.recipe import Recipe
from drpo.rewards import Reward, load_reward
from drpo.run import RunFolder, append_jsonl, read_jsonl, update_of, write_json
from drpo.tasks import BUILTIN_MODELS, BUILTIN_TASKS, Problem, builtin_problems, read_problems
from drpo.tasks.arithmetic import Split
from drpo.trainer import DRPOConfig, DRPOTrainer

BUILTIN_TRAIN_PROBLEMS = 10_000
"""Distinct training problems of a built-in task, cycled through if the run needs more."""

SAMPLES_KEPT = 50
"""Completions written to the run folder at each evaluation."""


def train(recipe: Recipe, folder: RunFolder, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Run a recipe in a run folder and return its summary (empty on all ranks but the first).

    The folder is written to once everything else has been checked. With ``resume`` the run in it
    goes on from its last checkpoint; with ``overwrite`` it is replaced.

    Raises:
        UserError: a recipe that cannot be run.
    """
    _quiet_libraries()
    # Accelerate puts several processes on the CPU only if told to.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    reward = load_reward(recipe.reward)
    problems = _load_problems(recipe, "train", recipe.rollouts * recipe.prompts_per_rollout)
    heldout = _load_problems(recipe, "heldout", recipe.heldout_problems)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _make_trainer(recipe, reward, problems, scratch, state.num_processes)
    trainer.args.output_dir = str(folder.checkpoints)

    with folder.locked() if state.is_main_process else nullcontext():
        checkpoint = folder.last_checkpoint if resume else None
        if state.is_main_process and checkpoint is None:
            folder.create(recipe, overwrite)
        elif state.is_main_process and checkpoint is not None:
            folder.rewind(update_of(checkpoint))
        state.wait_for_everyone()
        return _run(trainer, recipe, folder, heldout, reward, checkpoint)


def _make_trainer(recipe: Recipe, reward: Reward, problems: list[Problem], scratch: str, processes: int) -> DRPOTrainer:
    """The trainer of a recipe. Transformers makes its output folder at once, so it gets a passing one."""
    config = _make_config(recipe, scratch, processes)
    model, tokenizer = _load_model(recipe)
    try:
        trainer = DRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(
                [{"prompt": as_prompt(p, tokenizer), "answer": p.answer} for p in problems]
            ),
            processing_class=tokenizer,
            peft_config=_lora(recipe),
        )
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.create_optimizer()
    except UserError:
        raise
    except Exception as error:  # each option fails in its own way, deep in a library
        raise UserError(f"cannot set up training: {type(error).__name__}: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _run(
    trainer: DRPOTrainer,
    recipe: Recipe,
    folder: RunFolder,
    heldout: list[Problem],
    reward: Reward,
    checkpoint: Path | None,
) -> dict[str, Any]:
    is_main, updates = trainer.accelerator.is_main_process, trainer.args.max_steps
    evaluator = Evaluator(trainer, heldout, reward, recipe, folder)
    progress = Progress(total=updates, updates_per_rollout=recipe.updates_per_rollout, show=is_main)
    writer = RunWriter(trainer, evaluator, recipe, folder, progress)
    trainer.add_callback(writer)
    with progress:
        if checkpoint is None and heldout:
            progress.accuracy(evaluator.run(update=0).accuracy, update=0)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if recipe.lora is None:
        trainer.save_model(str(folder.model))
    if not is_main:
        return {}
    if recipe.lora is not None:
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(folder.model)
    tokenizer: Any = trainer.processing_class
    tokenizer.save_pretrained(folder.model)
    summary = _summarise(recipe, folder)
    write_json(folder.summary, summary)
    return summary


def _summarise(recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    """What became of a run, from what it wrote, before an interruption too."""
    metrics, accuracies = read_jsonl(folder.metrics), [row["accuracy"] for row in read_jsonl(folder.evaluations)]
    first, last = metrics[0], metrics[-1]
    objective = make_objective(recipe.objective.name, **recipe.objective.hyperparameters)
    return {
        "objective": recipe.objective.name,
        "objective_kwargs": dataclasses.asdict(objective),
        "accuracy_before": accuracies[0] if accuracies else None,
        "accuracy_after": accuracies[-1] if accuracies else None,
        "rollouts": recipe.rollouts,
        "updates": last["update"],
        "train_seconds": round(last["seconds"], 1),
        "seed": recipe.seed,
        "audit": {"mean": first["audit/logp_difference_mean"], "maximum": first["audit/logp_difference_max"]},
    }


def _quiet_libraries() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # Pinning memory without an accelerator does nothing, and says so at every epoch.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _load_problems(recipe: Recipe, split: Split, size: int) -> list[Problem]:
    task = recipe.task
    source = task.train if split == "train" else task.heldout
    if source is None:
        return []
    if source in BUILTIN_TASKS:
        if split == "heldout":
            return builtin_problems(split, size, seed=0)
        return builtin_problems(split, min(size, BUILTIN_TRAIN_PROBLEMS), recipe.seed)
    try:
        problems = read_problems(Path(source), prompt=task.prompt, answer=task.answer, template=task.template)
    except UserError as error:
        raise UserError(f"task.{split}: {error}") from error
    if split == "train" and len(problems) < recipe.prompts_per_rollout:
        raise UserError(
            f"task.train: {source} has {len(problems)} rows; prompts_per_rollout {recipe.prompts_per_rollout} needs as many"
        )
    return problems if split == "train" else problems[:size]


def _make_config(recipe: Recipe, output_dir: str, processes: int) -> DRPOConfig:
    if recipe.precision == "bf16" and not torch.accelerator.is_available():
        raise UserError("precision: bf16 needs an accelerator and none was found; --set precision=fp32")
    update = recipe.prompts_per_rollout * recipe.num_generations // recipe.updates_per_rollout
    micro_batch = recipe.micro_batch_size or max(update // processes, 1)
    if update % (micro_batch * processes):
        raise UserError(
            f"micro_batch_size: {micro_batch} x {processes} processes does not divide the {update} samples of an update "
            "(prompts_per_rollout x num_generations / updates_per_rollout)"
        )
    chosen = {
        name: getattr(recipe, name)
        for name in ("temperature", "aggregation", "horizon", "advantage", "audit_threshold")
    }
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "objective": recipe.objective.name,
        "objective_kwargs": recipe.objective.hyperparameters,
        "updates_per_rollout": recipe.updates_per_rollout,
        "num_generations": recipe.num_generations,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": update // (micro_batch * processes),
        "max_steps": recipe.rollouts * recipe.updates_per_rollout,
        "learning_rate": recipe.learning_rate,
        "max_completion_length": recipe.max_completion_length,
        "save_steps": recipe.checkpoint_every * recipe.updates_per_rollout,
        "seed": recipe.seed,
        "bf16": recipe.precision == "bf16",
        "logging_steps": 1,
        "disable_tqdm": True,
        "num_train_epochs": 1,
        "save_strategy": "steps",
        "eval_strategy": "no",
        "log_completions": False,
        "push_to_hub": False,
        **{name: value for name, value in chosen.items() if value is not None},
    }
    defaults = {
        "lr_scheduler_type": "constant",
        "save_total_limit": 2,
        "report_to": "none",
        "ddp_find_unused_parameters": False,
    }
    known = {field.name for field in dataclasses.fields(DRPOConfig)}
    types = get_type_hints(DRPOConfig)
    for name in recipe.trainer:
        if name not in known:
            raise UserError(
                f"trainer: {unknown_name('option', name, sorted(known)).split(' Known:')[0]} (the options are those of DRPOConfig)"
            )
        if name in settings:
            raise UserError(f"trainer: {name} follows from the recipe and its run folder; leave it out")
        try:
            TypeAdapter(types[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(
                recipe.trainer[name]
            )
        except ValidationError as error:
            expected = " or ".join(
                dict.fromkeys(mistake["msg"].removeprefix("Input should be ") for mistake in error.errors())
            )
            raise UserError(f"trainer.{name}: got {recipe.trainer[name]!r}; expected {expected}") from error
    try:
        config = DRPOConfig(**{**defaults, **settings, **recipe.trainer})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"trainer: {error}") from error
    assert config.generation_batch_size == recipe.prompts_per_rollout * recipe.num_generations
    return config


def _load_model(recipe: Recipe) -> tuple[Any, Any]:
    source = str(BUILTIN_MODELS.get(recipe.model, recipe.model))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except Exception as error:  # a damaged folder fails in as many ways as there are files in it
        raise UserError(
            f"model: cannot load {recipe.model!r}: expected {', '.join(BUILTIN_MODELS)}, a folder saved by Transformers, "
            f"or a model on the Hugging Face hub ({str(error)[:200]})"
        ) from error
    return model, tokenizer


def _lora(recipe: Recipe) -> Any:
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


@dataclass
class Evaluator:
    """Evaluates the policy on held-out problems and writes what it finds."""

    trainer: DRPOTrainer
    problems: list[Problem]
    reward: Reward
    recipe: Recipe
    folder: RunFolder

    def run(self, update: int) -> Evaluation:
        """Evaluate after ``update`` optimizer steps; always the same problems and random numbers."""
        result = evaluate(self.trainer, self.problems, self.reward, self.recipe.heldout_samples, seed=self.recipe.seed)
        if self.trainer.accelerator.is_main_process:
            rollout = update // self.recipe.updates_per_rollout
            where = {"update": update, "rollout": rollout}
            append_jsonl(
                self.folder.evaluations, {**where, "accuracy": result.accuracy, "completions": len(result.samples)}
            )
            append_jsonl(self.folder.samples, *({**where, **sample} for sample in result.samples[:SAMPLES_KEPT]))
        return result


class RunWriter(TrainerCallback):
    """Writes a row of metrics after every update, evaluates on schedule, and shows progress."""

    def __init__(
        self, trainer: DRPOTrainer, evaluator: Evaluator, recipe: Recipe, folder: RunFolder, progress: Progress
    ) -> None:
        self.trainer, self.evaluator, self.recipe, self.folder, self.progress = (
            trainer,
            evaluator,
            recipe,
            folder,
            progress,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        before = [row["seconds"] for row in read_jsonl(self.folder.metrics)[-1:]]
        self.started = time.perf_counter() - sum(before)
        self.progress.begin(done=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        measured = self.trainer.trust_region
        if not logs or "loss" not in logs or measured is None or not state.is_world_process_zero:
            return
        row = {
            "update": state.global_step,
            "rollout": (state.global_step - 1) // self.recipe.updates_per_rollout + 1,
            "seconds": time.perf_counter() - self.started,
            **{name: value for name, value in logs.items() if value is not None},
            "divergence_histogram": measured.divergence_histogram,
            "weight_histogram": measured.weight_histogram,
        }
        append_jsonl(self.folder.metrics, row)
        self.progress.advance(state.global_step, logs)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self.recipe.evaluate_every * self.recipe.updates_per_rollout
        if self.evaluator.problems and (state.global_step % every == 0 or state.global_step == state.max_steps):
            self.progress.accuracy(self.evaluator.run(state.global_step).accuracy, state.global_step)
