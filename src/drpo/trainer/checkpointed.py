"""GRPOTrainer with checkpoints that are whole or absent, and exact at any update, also within a rollout."""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy
from trl.trainer.grpo_trainer import GRPOTrainer

from drpo.errors import TrainingInterruptedError, TrainingStoppedError
from drpo.trainer.checkpoint import (
    PREFIX,
    CheckpointError,
    check_same_run,
    delete_oldest,
    finish,
    newest_checkpoint,
    remove_unfinished,
    unfinished,
    verify,
)
from drpo.trainer.fingerprint import fingerprint
from drpo.trainer.interruption import Interruption
from drpo.trainer.state_file import load_state, rng_state, save_state, set_rng_state

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer.safetensors"
"""Optimizer, schedule and loss scale; under FSDP and DeepSpeed they are in those libraries' own files."""


class CheckpointedTrainer(GRPOTrainer):
    """GRPOTrainer whose checkpoints can be trusted.

    A checkpoint is written beside, flushed to disk, listed in a manifest with the SHA-256 of each file, and renamed: a
    folder named ``checkpoint-N`` is whole. It holds what decides the next update, the samples of a half-used rollout
    included, in safetensors and JSON. ``train(resume_from_checkpoint=True)`` takes the newest one that is whole and
    warns of a damaged one; it refuses a checkpoint of other data, options, model or number of processes.

    SIGTERM and SIGINT end training after the update at work, with a checkpoint and exit code 143 or 130; with
    ``save_strategy="no"`` nothing is saved then either.

    Attributes:
        stateful: by name, what else decides this rank's next update, beside weights, optimizer and rollout; its state
            is what :func:`~drpo.trainer.state_file.save_state` takes.
        run_fingerprint: what else, by name, has to be the same when a run is resumed.
    """

    args: Any
    model: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stateful: dict[str, Stateful] = {}
        self.run_fingerprint: dict[str, Any] = {}
        self._interruption = Interruption(self.accelerator)
        self._fingerprint: dict[str, Any] = {}
        self._is_saving = False
        self._last_checkpoint: Path | None = None
        self._begun = 0.0

    # Training.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' ``train``.

        Args:
            resume_from_checkpoint: a folder, or True for the newest whole checkpoint of ``output_dir``.

        Raises:
            CheckpointError: it is damaged, there is none, or it is of another run.
            TrainingStoppedError: going on would train on something wrong, or nothing can be saved.
            TrainingInterruptedError: a signal ended training; it is a SystemExit.
        """
        self._begun = time.time()
        checkpoint = self._find_checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        self._last_checkpoint = None if checkpoint is None else Path(checkpoint)
        with self._interruption.awaited():
            return super().train(checkpoint, *args, **kwargs)

    def _find_checkpoint(self, resume_from_checkpoint: str | bool) -> str:
        """The checkpoint to go on from, read and compared by the first rank. All ranks call it together."""
        answer: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                answer[0] = str(self._check_checkpoint(resume_from_checkpoint))
            except CheckpointError as error:
                answer[1] = str(error)
        path, mistake = broadcast_object_list(answer)
        if mistake is not None:
            raise CheckpointError(mistake)
        return path

    def _check_checkpoint(self, resume_from_checkpoint: str | bool) -> Path:
        if resume_from_checkpoint is True:
            checkpoint = newest_checkpoint(Path(self.args.output_dir))
            if checkpoint is None:
                raise CheckpointError(f"{self.args.output_dir}: holds no checkpoint to resume from")
        else:
            checkpoint = Path(str(resume_from_checkpoint))
        manifest = verify(checkpoint)
        check_same_run(checkpoint, manifest["fingerprint"], self._make_fingerprint())
        self._begun = manifest["begun"]
        if not (checkpoint / self._rank_file).is_file():
            raise CheckpointError(f"{checkpoint}: holds weights alone (save_only_model), from which no run can go on")
        return checkpoint

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Transformers', which makes one update too many when it goes on from a run's last checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers', which loads the best checkpoint as it is."""
        best = self._find_best(Path(self._get_output_dir(trial)))
        if best is not None and self.args.load_best_model_at_end:
            try:
                verify(best)
            except CheckpointError as error:
                raise TrainingStoppedError(
                    f"training is complete, but its best checkpoint is damaged: {error}; {self._last_saved()}"
                ) from error
        return super()._finalize_training(trial, *args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        number = self._interruption.agreed()
        if not number:
            return
        update, name = self.state.global_step, signal.Signals(number).name
        if self.args.save_strategy != SaveStrategy.NO and (
            self._last_checkpoint is None or self._last_checkpoint.name != f"{PREFIX}{update}"
        ):
            self._save_checkpoint(model, trial)
        if self.accelerator.is_main_process:
            logger.warning("%s: training ended after update %d; %s.", name, update, self._last_saved())
        raise TrainingInterruptedError(number)

    # Saving.

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """As Transformers', which saves a new best one only where it saves anyhow."""
        is_best = super()._determine_best_metric(*args, **kwargs)
        if is_best and self.args.load_best_model_at_end and self.args.save_strategy != SaveStrategy.NO:
            self.control.should_save = True
        return is_best

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(unfinished(Path(folder))) if self._is_saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Transformers', in a folder that gets its name when everything is in it."""
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"{PREFIX}{self.state.global_step}"
        if not _is_finite(model, self.accelerator):
            raise TrainingStoppedError(
                f"after update {self.state.global_step} the weights are not finite; no checkpoint was taken, and {self._last_saved()}"
            )
        try:
            if self.args.should_save:
                remove_unfinished(folder)
            self.accelerator.wait_for_everyone()
            self._is_saving = True
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._finish_checkpoint(checkpoint)
            self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError, TypeError) as error:
            remove_unfinished(folder)
            raise TrainingStoppedError(f"{checkpoint} cannot be written ({error}); {self._last_saved()}") from error
        finally:
            self._is_saving = False
        self._last_checkpoint = checkpoint
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save weights, configuration and tokenizer; Transformers saves its arguments too, pickled, with their secrets."""
        folder, tokenizer = output_dir or self.args.output_dir, self.processing_class
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(folder, state_dict=state_dict)
        tokenizer.save_pretrained(folder)

    def _finish_checkpoint(self, checkpoint: Path) -> None:
        folder = checkpoint.parent
        best = self._find_best(folder)
        self.state.save_to_json(str(unfinished(folder) / checkpoint.name / TRAINER_STATE_NAME))
        finish(checkpoint, self._make_fingerprint(), self._begun, self.args.checkpoint_checksums)
        if self.args.save_total_limit:
            delete_oldest(folder, keep=self.args.save_total_limit, but={checkpoint, best or checkpoint})

    def _find_best(self, folder: Path) -> Path | None:
        """The best checkpoint, of which Transformers remembers where it was: not yet finished, or before the run was moved."""
        # Of a run that was moved Transformers 5.24 remembers the number alone.
        numbered = folder / f"{PREFIX}{self.state.best_global_step}"
        if self.state.best_model_checkpoint is None and not numbered.is_dir():
            return None
        best = Path(self.state.best_model_checkpoint or numbered)
        if best.parent == unfinished(folder) or (folder / best.name).is_dir():
            best = folder / best.name
            self.state.best_model_checkpoint = str(best)
        return best

    def _last_saved(self) -> str:
        return "none was taken before" if self._last_checkpoint is None else f"the last one is {self._last_checkpoint}"

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Transformers calls this before the folder has its name; :meth:`_save_checkpoint` pushes afterwards."""

    def _make_fingerprint(self) -> dict[str, Any]:
        if not self._fingerprint:
            self._fingerprint = fingerprint(self)
        return self._fingerprint

    # What is in a checkpoint beside the weights. FSDP and DeepSpeed write optimizers in formats of their own.

    @property
    def _rank_file(self) -> str:
        return f"rank_{self.accelerator.process_index}.safetensors"

    @property
    def _has_own_optimizer_files(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._has_own_optimizer_files:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            scaler = self.accelerator.scaler
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            save_state(Path(output_dir) / OPTIMIZER, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self._has_own_optimizer_files:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            state = load_state(Path(checkpoint) / OPTIMIZER)
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])
            if state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        state = load_state(Path(checkpoint) / self._rank_file, self.accelerator.device)
        self._step, self._buffered_inputs = state["step"], state["rollout"]
        for name, stateful in self.stateful.items():
            stateful.load_state_dict(state["stateful"][name])

    def _save_scaler(self, output_dir: str) -> None:
        if self._has_own_optimizer_files:
            super()._save_scaler(output_dir)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._has_own_optimizer_files:
            super()._load_scaler(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        is_half_used = self._step % self.args.steps_per_generation != 0
        state = {
            "rng": rng_state(self.accelerator.device),
            "step": self._step,
            "rollout": self._buffered_inputs if is_half_used else None,
            "stateful": {name: stateful.state_dict() for name, stateful in self.stateful.items()},
        }
        save_state(Path(output_dir) / self._rank_file, state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = load_state(Path(checkpoint) / self._rank_file)
            set_rng_state(state["rng"], self.accelerator.device)


@torch.no_grad()
def _is_finite(model: torch.nn.Module, accelerator: Any) -> bool:
    """Whether all weights are, on all ranks; of sharded ones each rank looks at its own."""
    weights = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters()]
    # Extremes, which inf and NaN survive, are found ten times as fast as isfinite() of every weight.
    extremes = [
        torch.stack(torch.aminmax(weight)) for weight in weights if weight.is_floating_point() and weight.numel()
    ]
    is_finite = torch.stack([extreme.isfinite().all() for extreme in extremes]).all().unsqueeze(0)
    return bool(accelerator.gather(is_finite).all())
