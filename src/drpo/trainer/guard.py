"""Updates whose gradient is not finite are not made."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor

from drpo.errors import TrainingStoppedError
from drpo.files import writing
from drpo.trainer.batch import RolloutBatch
from drpo.trainer.config import DRPOConfig
from drpo.trainer.scoring import Scored

logger = logging.getLogger(__name__)

FOLDER = "skipped_updates"
"""Within the trainer's output folder: the batches of updates that were not made, one file an update and rank."""


class UpdateGuard:
    """Decides after each backward pass whether the optimizer may step. All ranks see the same gradient norm.

    Args:
        args: the trainer's, for its output folder and ``max_skipped_updates``.

    Attributes:
        skipped: updates skipped so far.
    """

    def __init__(self, args: DRPOConfig) -> None:
        self.skipped = 0
        self._args = args
        self._in_a_row = 0
        self._first_cause = ""
        self._parts: list[tuple[RolloutBatch, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "first_cause": self._first_cause}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._first_cause = state_dict["first_cause"]

    def add(self, batch: RolloutBatch, scored: Scored) -> None:
        """Keep a micro-batch of the update, to look at if its gradient is not finite."""
        self._parts.append((batch, scored.loss.detach()))

    def end_update(self, update: int, is_finite: bool) -> None:
        """Count the update, which is skipped unless its gradient is finite, and write its batch.

        Raises:
            TrainingStoppedError: it is the last of so many in a row; the message names the first one's cause.
        """
        parts, self._parts = self._parts, []
        if is_finite:
            self._in_a_row = 0
            return
        losses = [loss.item() for _, loss in parts if not loss.isfinite()]
        symptom = f"the loss is {losses[0]}" if losses else "the gradient is not finite, although the loss is"
        cause = f"update {update}: {symptom}"
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row == 1:
            self._first_cause = cause
        folder = Path(str(self._args.output_dir)) / FOLDER
        file = folder / f"update-{update:06d}-rank-{PartialState().process_index}.safetensors"
        # Parts of an update share some tensors, which the format does not take.
        batches = {
            f"{number}.{name}": tensor.clone(memory_format=torch.contiguous_format)
            for number, (batch, _) in enumerate(parts)
            for name, tensor in batch.items()
            if isinstance(tensor, Tensor)
        }
        with writing(file):
            folder.mkdir(parents=True, exist_ok=True)
            save_file(batches, file)
        logger.warning("Skipped %s; its batch is in %s.", cause, file)
        if self._in_a_row == self._args.max_skipped_updates:
            raise TrainingStoppedError(
                f"{self._in_a_row} updates in a row had a gradient that is not finite and were skipped; the first was "
                f"{self._first_cause}; their batches are in {folder}"
            )
