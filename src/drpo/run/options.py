"""The options under ``trainer`` in a recipe: those of DRPOConfig, as it has them."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from drpo.errors import UserError
from drpo.registry import unknown_name
from drpo.run.recipe import Recipe
from drpo.trainer.config import DRPOConfig

AT_THE_TOP = {
    "batch_size": "prompts_per_rollout",
    "bf16": "train_precision: bf16",
    "correction": "correction",
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
    "save_steps": "checkpoint_every",
}
"""Options by other names, of Transformers and of other frameworks, for what has a field of the recipe."""

_MAYBE_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
"""Options that are a mapping, one in JSON, or a file with one."""


def check_option(name: str, value: Any) -> Any:
    """An option of ``trainer`` as DRPOConfig has it: numbers in text are numbers, mappings in JSON are mappings.

    Raises:
        UserError: an option that DRPOConfig does not have, or a value of another type than its own.
    """
    types = get_type_hints(DRPOConfig)
    known = sorted(field.name for field in dataclasses.fields(DRPOConfig))
    if name not in known:
        nearest = unknown_name("option", name, known).split(" Known:")[0]
        if name in AT_THE_TOP:
            field = AT_THE_TOP[name]
            raise UserError(
                f"trainer: unknown option {name!r}; {field} at the top of the recipe is for that",
                fix=f"{field} at the top of the recipe, and no trainer.{name}",
            )
        raise UserError(f"trainer: {nearest} (the options are those of DRPOConfig)")
    if name == "fsdp" and isinstance(value, bool):  # typed as text, for the sake of command lines
        return value
    if name in DRPOConfig._VALID_DICT_FIELDS and isinstance(value, str) and name not in _MAYBE_FILES:
        value = _from_json(name, value)
    try:
        return TypeAdapter(types[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        expected = " or ".join(dict.fromkeys(_expected(mistake["msg"]) for mistake in error.errors()))
        raise UserError(f"trainer.{name}: got {value!r}; expected {expected}") from error


def _expected(message: str) -> str:
    kind = message.removeprefix("Input should be ").partition(", unable")[0]
    return kind.replace("a valid integer", "an integer").replace("a valid ", "a ")


def _from_json(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"trainer.{name}: got {text!r} ({error}); expected a mapping") from error
    if not isinstance(value, dict):
        raise UserError(f"trainer.{name}: got {text!r}; expected a mapping")
    return value


_USELESS = {
    "model_init_kwargs": "the model of a recipe is loaded in fp32 and as it is",
    "resume_from_checkpoint": "drpo train --resume goes on with a run",
}


def refuse_together(recipe: Recipe, options: dict[str, Any]) -> None:
    """What a recipe cannot have beside its other fields, although DRPOConfig has it."""
    if options.get("fp16"):
        raise UserError(
            "trainer: fp16 is none of the precisions that a recipe trains in (fp32, bf16 and fp8)",
            fix="train_precision: bf16 at the top of the recipe, and no trainer.fp16",
        )
    if options.get("remove_unused_columns"):
        raise UserError(
            "trainer: remove_unused_columns=True takes the reference answers away from the reward",
            fix="no trainer.remove_unused_columns",
        )
    for name, why in _USELESS.items():
        if options.get(name):
            raise UserError(f"trainer: {name}={options[name]!r} would have no effect: {why}", fix=f"no trainer.{name}")
    if len(options.get("reward_weights") or [1.0]) != 1:
        raise UserError(
            "trainer: reward_weights is for several reward functions, and a recipe's are one by then",
            fix="reward: [{name: ..., weight: 1.0}, ...] at the top of the recipe, and no trainer.reward_weights",
        )
    if (settings := options.get("deepspeed")) and find_spec("deepspeed") is None:
        raise UserError("trainer.deepspeed: deepspeed is not installed", fix="pip install deepspeed")
    if isinstance(settings, str) and not Path(settings).is_file():
        raise UserError(
            f"trainer.deepspeed: {settings}: no such file; expected a JSON file or a mapping of its settings"
        )
    is_exact = recipe.rollout_precision == recipe.train_precision == "fp32"
    asked = (("rollout_precision", recipe.rollout_precision and not is_exact), ("rollout_lag", recipe.rollout_lag))
    copied = [name for name, is_asked in asked if is_asked]
    shared = (
        ("lora", recipe.lora is not None, "adapters"),
        ("trainer.fsdp", options.get("fsdp"), "weights that are sharded over processes"),
    )
    for field, is_used, what in shared:
        if copied and is_used:
            raise UserError(
                f"{field}: {' and '.join(copied)} would sample from a copy of the policy, which does not work with {what}",
                fix=f"no {' and no '.join(copied)}, or no {field}",
            )
