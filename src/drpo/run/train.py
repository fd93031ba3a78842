"""From a recipe to a run folder: what the command ``drpo train`` does."""

from __future__ import annotations

import logging
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import TrainerCallback

from drpo.data.problems import Problem
from drpo.errors import UserError
from drpo.files import append_jsonl, read_jsonl, writing
from drpo.rewards import Reward
from drpo.run.build import load_problems, make_trainer, quiet_libraries, settle_precision
from drpo.run.checks import describe_load
from drpo.run.folder import RunFolder, decisive_fields
from drpo.run.progress import Progress
from drpo.run.recipe import Recipe
from drpo.trainer.checkpoint import CheckpointError
from drpo.trainer.collapse import StopOnCollapse
from drpo.trainer.fingerprint import digest_of_rows
from drpo.trainer.heldout import evaluate
from drpo.trainer.token_log import TokenLog
from drpo.trainer.trainer import DRPOTrainer

if TYPE_CHECKING:
    from trl.trainer.grpo_trainer import RolloutFunc

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    folder: RunFolder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    rollout_func: RolloutFunc | None = None,
) -> dict[str, Any]:
    """Run a recipe in a run folder and return its summary (empty on all ranks but the first).

    The folder is written to once everything else has been checked. With ``resume`` the run in it
    goes on from its last checkpoint; with ``overwrite`` it is replaced. A ``rollout_func`` samples the
    rollouts with an engine of its own, as TRL's does: from prompts and trainer to ``prompt_ids``,
    ``completion_ids`` and ``logprobs``.

    Raises:
        UserError: a recipe that cannot be run.
    """
    from accelerate.utils import parse_flag_from_env

    quiet_libraries()
    # Accelerate puts several processes on the CPU only if told to.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    updates = recipe.rollouts * recipe.updates_per_rollout
    recipe = settle_precision(recipe)
    if state.is_main_process and (load := describe_load()):
        logger.warning(load)
    with Progress(updates, recipe.updates_per_rollout, show=state.is_main_process) as progress:
        summary = _train(recipe, folder, resume, overwrite, rollout_func, state, progress)
    # A process that exits while gloo's threads still serve another one aborts now and then.
    state.wait_for_everyone()
    state.destroy_process_group()
    return summary


def _train(
    recipe: Recipe,
    folder: RunFolder,
    resume: bool,
    overwrite: bool,
    rollout_func: RolloutFunc | None,
    state: PartialState,
    progress: Progress,
) -> dict[str, Any]:
    reward = recipe.make_reward()
    problems = load_problems(recipe, "train", recipe.rollouts * recipe.prompts_per_rollout)
    heldout = load_problems(recipe, "heldout", recipe.heldout_problems)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(recipe, reward, problems, heldout, scratch, state.num_processes, rollout_func)
    trainer.args.output_dir = str(folder.checkpoints)
    trainer.run_fingerprint = {f"recipe.{name}": value for name, value in decisive_fields(recipe).items()}
    trainer.run_fingerprint["heldout problems"] = digest_of_rows(problem.as_row() for problem in heldout)

    with folder.locked() if state.is_main_process else nullcontext():
        if state.is_main_process and not resume:
            folder.create(recipe, overwrite)
        state.wait_for_everyone()
        try:
            return _run(trainer, recipe, folder, heldout, reward, resume, progress)
        except CheckpointError as error:
            raise UserError(f"--resume: {error}") from error
        except BaseException:
            if state.is_main_process and not resume:
                folder.discard()
            raise


def _run(
    trainer: DRPOTrainer,
    recipe: Recipe,
    folder: RunFolder,
    heldout: list[Problem],
    reward: Reward,
    resume: bool,
    progress: Progress,
) -> dict[str, Any]:
    is_main = trainer.accelerator.is_main_process
    writer = RunWriter(trainer, heldout, reward, recipe, folder, progress)
    trainer.token_log = TokenLog(trainer.processing_class) if recipe.record_rollouts else None
    trainer.add_callback(writer)
    if recipe.stop_on_collapse is not None:
        trainer.add_callback(StopOnCollapse(recipe.stop_on_collapse))
    trainer.announce = progress.show_phase
    if not resume:
        writer.evaluate(update=0)
    trainer.train(resume_from_checkpoint=resume)
    progress.show_phase("saving")
    with writing(folder.model):
        if recipe.lora is None:
            trainer.save_model(str(folder.model))
        if not is_main:
            return {}
        if recipe.lora is not None:
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(folder.model)
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(folder.model)
    return folder.write_summary(recipe)


@dataclass(eq=False)
class RunWriter(TrainerCallback):
    """Writes a row of metrics after every update, evaluates on schedule, and shows progress."""

    trainer: DRPOTrainer
    heldout: list[Problem]
    reward: Reward
    recipe: Recipe
    folder: RunFolder
    progress: Progress
    started: float = field(init=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.folder.rewind(state.global_step)
        before = [row["seconds"] for row in read_jsonl(self.folder.metrics)[-1:]]
        self.started = time.perf_counter() - sum(before)
        self.progress.begin(done=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        measured = self.trainer.trust_region
        if not logs or "loss" not in logs or measured is None:
            return
        # Every rank takes part in gathering them.
        trained = self.trainer.token_log.take() if self.trainer.token_log is not None else []
        if not state.is_world_process_zero:
            return
        where = {
            "update": state.global_step,
            "rollout": (state.global_step - 1) // self.recipe.updates_per_rollout + 1,
        }
        if trained:
            append_jsonl(self.folder.rollouts, *({**where, **tokens} for tokens in trained))
        row = {
            **where,
            "seconds": time.perf_counter() - self.started,
            **{name: value for name, value in logs.items() if value is not None},
            "divergence_histogram": measured.divergence_histogram,
            "weight_histogram": measured.weight_histogram,
        }
        append_jsonl(self.folder.metrics, row)
        self.progress.show_update(state.global_step, logs)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self.recipe.evaluate_every * self.recipe.updates_per_rollout
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.evaluate(state.global_step)

    def evaluate(self, update: int) -> None:
        """Measure held-out accuracy after an update; always on the same problems with the same random numbers."""
        if not self.heldout:
            return
        recipe = self.recipe
        self.progress.show_phase("evaluating")
        samples = evaluate(self.trainer, self.heldout, self.reward, recipe.heldout_samples, seed=recipe.seed)
        if self.trainer.accelerator.is_main_process:
            where = {"update": update, "rollout": update // recipe.updates_per_rollout}
            accuracy = self.folder.append_evaluation(where, samples, recipe.heldout_samples)
            self.progress.show_accuracy(accuracy, update)
