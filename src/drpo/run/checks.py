"""What is known of a run before it begins: whether anything ends a completion, whether held-out problems are absent from the training data, and whether the machine is idle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from drpo.data.problems import Problem
from drpo.errors import UserError


def end_tokens(tokenizer: Any, generation_config: Any) -> list[int]:
    """What ends a completion, as TRL takes it: the tokenizer's token and the model's."""
    ends: Any = generation_config.eos_token_id
    ids = dict.fromkeys([tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])])
    return [token for token in ids if token is not None]


def refuse_without_end(model: str, tokenizer: Any, ends: Sequence[int]) -> None:
    """Refuse a model whose completions nothing ends, or that has nothing to pad them with.

    Args:
        model: its name, for messages.
        tokenizer: of the model.
        ends: :func:`end_tokens`.

    Raises:
        UserError: it lacks one of them.
    """
    if not ends:
        raise UserError(
            "tokenizer: neither it nor the model has an end-of-sequence token, so every completion runs to its limit; "
            f"expected eos_token in {model}/tokenizer_config.json, or task.stop"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            "tokenizer: has neither pad_token nor eos_token, and completions of different lengths are padded with one; "
            f"expected pad_token in {model}/tokenizer_config.json"
        )


def describe_overlap(train: Sequence[Problem], heldout: Sequence[Problem]) -> str:
    """How many held-out prompts are trained on, as a phrase; "" where none is."""
    held = {problem.prompt for problem in heldout}
    overlap = len(held & {problem.prompt for problem in train})
    return f"task.heldout: {overlap:,} of {len(held):,} prompts are in task.train too" if overlap else ""


BUSY = 0.75
"""Processes a core, over the last minute, from which a machine counts as busy."""


def describe_load() -> str:
    """What a run on the CPU loses to the other processes of the machine, as a sentence; "" where it is idle."""
    if torch.accelerator.is_available() or torch.get_num_threads() == 1 or not hasattr(os, "getloadavg"):
        return ""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < BUSY * cores:
        return ""
    return (
        f"Other processes are at work here ({load:.1f} on {cores} cores), and PyTorch's threads wait for one another: "
        "OMP_NUM_THREADS=1 before the command may make the run faster."
    )
