"""The options under ``trainer`` in a recipe: those of DRPOConfig, but for what a recipe says with a field of its own."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ConfigDict, Json, TypeAdapter, ValidationError

from drpo.errors import UserError
from drpo.registry import unknown_name
from drpo.run.mistakes import expectation

if TYPE_CHECKING:
    from drpo.trainer.config import DRPOConfig

_FIELDS = {
    "batch_size": "prompts_per_rollout",
    "bf16": "train_precision: bf16",
    "correction_kwargs": "correction",
    "fp16": "train_precision: fp16",
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


_BELOW_ONE = {"adam_beta1", "adam_beta2", "label_smoothing_factor", "warmup_ratio"}


def check_option(name: str, value: Any) -> Any:
    """An option of ``trainer`` as DRPOConfig has it: numbers in text are numbers, mappings in JSON are mappings.

    Raises:
        UserError: an option that DRPOConfig does not have, or a value that it cannot mean anything with.
    """
    # Importing TRL takes seconds, which a mistake elsewhere in the recipe need not wait for.
    from drpo.trainer.config import DRPOConfig

    fields = {field.name: field for field in dataclasses.fields(DRPOConfig)}
    if name not in fields:
        nearest = unknown_name("option", name, sorted(fields)).split(" Known:")[0]
        raise UserError(f"trainer: {nearest} (the options are those of DRPOConfig)")
    expected: Any = get_type_hints(DRPOConfig)[name]
    if name == "fsdp":  # typed as text, for the sake of command lines
        expected = bool | expected
    elif name in DRPOConfig._VALID_DICT_FIELDS and name not in ("accelerator_config", "deepspeed", "fsdp_config"):
        # The text in their type is JSON; that of the other three may be a file's name.
        expected = dict[str, Any] | Json[dict[str, Any]] | None
    adapter = TypeAdapter(expected, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        # What is not text has its type already: true is no number, and 0 is not false.
        checked = adapter.validate_python(value, strict=not isinstance(value, str))
    except ValidationError as error:
        expectations = dict.fromkeys(expectation(mistake["msg"]) for mistake in error.errors())
        raise _refusal(name, value, " or ".join(expectations)) from error
    choices = fields[name].metadata.get("choices")
    if choices is not None and checked not in (*choices, fields[name].default):
        raise _refusal(name, value, " or ".join(map(repr, choices)))
    if isinstance(checked, (int, float)) and not isinstance(checked, bool):
        _check_number(name, checked, fields[name].default)
    return checked


def _check_number(name: str, number: float, default: Any) -> None:
    """Refuse what no option of this default means: a number below 0, or 0 where the default is a count from 1."""
    is_count = isinstance(number, int) and isinstance(default, int) and default > 0
    least = min(int(is_count), default) if isinstance(default, (int, float)) else 0
    if number < least or (isinstance(number, int) and number >= 2**32):
        raise _refusal(name, number, f"a number of at least {least}, below 2^32")
    if name in _BELOW_ONE and number >= 1:
        raise _refusal(name, number, "a number of at least 0, below 1")


def _refusal(name: str, value: Any, expected: str) -> UserError:
    return UserError(f"trainer.{name}: got {reprlib.repr(value)}; expected {expected}")


def build_config(settings: dict[str, Any], defaults: dict[str, Any], chosen: dict[str, Any]) -> DRPOConfig:
    """DRPOConfig with the options of a recipe.

    Args:
        settings: what follows from the rest of the recipe.
        defaults: what else to set, unless it is chosen otherwise.
        chosen: the options under ``trainer``.

    Raises:
        UserError: naming the option that cannot be.
    """
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    from drpo.trainer.config import DRPOConfig

    options = {name: check_option(name, value) for name, value in chosen.items()}

    def build(options: dict[str, Any]) -> DRPOConfig:
        config = DRPOConfig(**settings, **(defaults | options))
        _check_schedule(config)
        get_reporting_integration_callbacks(config.report_to)
        return config

    def is_refused(options: dict[str, Any]) -> bool:
        try:
            build(options)
        except Exception:  # as below
            return True
        return False

    try:
        return build(options)
    except Exception as error:  # each option fails in its own way, in a library
        # The message need not say which option it is about: the first one that fails alone.
        alone = next((name for name, value in options.items() if is_refused({name: value})), None)
        message = str(error).removeprefix(f"{alone} ") or type(error).__name__
        raise UserError(f"trainer{'.' + alone if alone else ''}: {message}") from error


def _check_schedule(config: DRPOConfig) -> None:
    """Make the learning rate's schedule once: Transformers does when training begins, in a run folder."""
    import torch
    from transformers import get_scheduler

    arguments: Any = config.lr_scheduler_kwargs  # parsed from JSON by now, if it was text
    get_scheduler(
        config.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate),
        num_warmup_steps=config.get_warmup_steps(config.max_steps),
        num_training_steps=config.max_steps,
        scheduler_specific_kwargs=arguments,
    )
