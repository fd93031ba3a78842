"""The options under ``trainer`` in a recipe: those of DRPOConfig, but for what a recipe says with a field of its own."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from pydantic import ConfigDict, Json, TypeAdapter, ValidationError

from drpo.errors import UserError
from drpo.registry import unknown_name
from drpo.run.mistakes import expectation

_FIELDS = {
    "batch_size": "prompts_per_rollout",
    "bf16": "train_precision: bf16",
    "correction_kwargs": "correction",
    "fp16": "train_precision: bf16",
    "gradient_accumulation_steps": "micro_batch_size",
    "lr": "learning_rate",
    "max_new_tokens": "max_completion_length",
    "max_response_length": "max_completion_length",
    "max_steps": "rollouts",
    "max_tokens": "max_completion_length",
    "num_return_sequences": "num_generations",
    "num_train_epochs": "rollouts",
    "objective_kwargs": "objective",
    "per_device_train_batch_size": "micro_batch_size",
    "reward_weights": "reward: [{name: ..., weight: 1.0}, ...]",
    "save_steps": "checkpoint_every",
}
_OF_THE_RUN = "it follows from the recipe and its run folder; leave it out"

REFUSED: dict[str, str] = {
    **{option: f"expected {field} at the top of the recipe" for option, field in _FIELDS.items()},
    "disable_tqdm": _OF_THE_RUN,
    "eval_strategy": _OF_THE_RUN,
    "log_completions": _OF_THE_RUN,
    "logging_steps": _OF_THE_RUN,
    "model_init_kwargs": "the model of a recipe is loaded in fp32 and as it is; leave it out",
    "output_dir": _OF_THE_RUN,
    "push_to_hub": _OF_THE_RUN,
    "remove_unused_columns": "it takes the reference answers away from the reward; leave it out",
    "resume_from_checkpoint": "drpo train --resume goes on with a run; leave it out",
    "save_strategy": _OF_THE_RUN,
}
"""Options of DRPOConfig that a recipe does without, and other frameworks' names for its fields: what is there instead."""


def check_option(name: str, value: Any) -> Any:
    """An option of ``trainer`` as DRPOConfig has it: numbers in text are numbers, mappings in JSON are mappings.

    Raises:
        UserError: an option that DRPOConfig does not have, or a value of another type than its own.
    """
    # Importing TRL takes seconds, which a mistake elsewhere in the recipe need not wait for.
    from drpo.trainer.config import DRPOConfig

    known = sorted(field.name for field in dataclasses.fields(DRPOConfig))
    if name not in known:
        nearest = unknown_name("option", name, known).split(" Known:")[0]
        raise UserError(f"trainer: {nearest} (the options are those of DRPOConfig)")
    expected: Any = get_type_hints(DRPOConfig)[name]
    if name == "fsdp":  # typed as text, for the sake of command lines
        expected = bool | expected
    elif name in DRPOConfig._VALID_DICT_FIELDS and name not in ("accelerator_config", "deepspeed", "fsdp_config"):
        # The text in their type is JSON; that of the other three may be a file's name.
        expected = dict[str, Any] | Json[dict[str, Any]] | None
    try:
        return TypeAdapter(expected, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        expectations = dict.fromkeys(expectation(mistake["msg"]) for mistake in error.errors())
        raise UserError(f"trainer.{name}: got {value!r}; expected {' or '.join(expectations)}") from error
