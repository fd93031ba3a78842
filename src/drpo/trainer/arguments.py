"""What a trainer is given, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from drpo.pretrained import is_repo_id
from drpo.registry import unknown_name


def check_model(model: Any) -> Any:
    """A model, or where it is, as TRL takes it.

    Raises:
        ValueError: a path at which nothing is.
    """
    if not isinstance(model, (str, Path)):
        return model
    name = str(model)
    if not (Path(name).expanduser().is_dir() or is_repo_id(name)):
        raise ValueError(f"model: {name!r} is no folder; expected one, or a name on the hub")
    return name


def check_rewards(reward_funcs: Any) -> None:
    """Check that each reward is a function, or a model or its name.

    Raises:
        TypeError: one is neither.
    """
    for reward in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if not isinstance(reward, (str, nn.Module, Callable)):
            raise TypeError(f"reward_funcs has {reward!r}; expected functions, or reward models or their names")


def check_prompts(dataset: Any) -> None:
    """Check that each row of a data set of known length asks something.

    Raises:
        ValueError: no column for prompts, or a prompt that is empty or neither text nor a conversation.
    """
    columns: Sequence[str] | None = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or not hasattr(dataset, "__len__"):
        return
    if "prompt" not in columns:
        raise ValueError(f"train_dataset has no column 'prompt': {unknown_name('column', 'prompt', columns)}")
    for number, prompt in enumerate(dataset["prompt"]):
        if not (isinstance(prompt, (str, list)) and prompt):
            raise ValueError(
                f"train_dataset, row {number}: prompt is {prompt!r}; expected text, or a list of messages, that is not empty"
            )
