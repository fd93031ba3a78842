"""Rewards: each takes completions and reference answers and returns one score a completion, as TRL expects."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any, cast, get_type_hints

from drpo.errors import UserError
from drpo.registry import unknown_name
from drpo.rewards.call import LARGEST_REWARD, REWARD_TIMEOUT, checked_scores, scores_of, text_of
from drpo.rewards.exact import exact_answer, gsm8k, integer
from drpo.rewards.math import MathGrader
from drpo.rewards.shaping import Format, Overlong, Weighted

__all__ = [
    "LARGEST_REWARD",
    "REWARDS",
    "REWARD_TIMEOUT",
    "Format",
    "MathGrader",
    "Overlong",
    "Reward",
    "Weighted",
    "checked_scores",
    "exact_answer",
    "gsm8k",
    "integer",
    "load_reward",
    "make_reward",
    "scores_of",
    "text_of",
]

Reward = Callable[..., Sequence[float | None]]
"""Completions, and columns of the data set by name, to a score each; None leaves a completion out."""

REWARDS: dict[str, Reward | type] = {
    "exact_answer": exact_answer,
    "format": Format,
    "gsm8k": gsm8k,
    "integer": integer,
    "math": MathGrader,
    "overlong": Overlong,
}
"""Functions, and classes whose arguments a recipe gives beside the name."""


def make_reward(name: str, **options: Any) -> Reward:
    """A built-in reward with its options.

    Raises:
        ValueError: an unknown name or option, or a value that the option does not take.
    """
    if name not in REWARDS:
        raise ValueError(unknown_name("reward", name, REWARDS))
    entry = REWARDS[name]
    if not isinstance(entry, type):
        if options:
            raise ValueError(f"{next(iter(options))}: {name} has no options")
        return entry
    known = {field.name: field for field in fields(entry)}
    types = get_type_hints(entry)
    for option, value in options.items():
        if option not in known:
            raise ValueError(unknown_name(f"option of {name}", option, known))
        _check_type(option, value, types[option])
    for option, field in known.items():
        if option not in options and field.default is MISSING:
            raise ValueError(f"{option}: is missing; {name} has no default for it")
    return entry(**options)


def _check_type(option: str, value: Any, expected: Any) -> None:
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(expected).validate_python(value, strict=True)
    except ValidationError as error:
        expectations = dict.fromkeys(mistake["msg"].removeprefix("Input should be ") for mistake in error.errors())
        raise ValueError(f"{option}: got {value!r}; expected {' or '.join(expectations)}") from error


def load_reward(name: str, **options: Any) -> Reward:
    """A built-in reward by name, with its options, or a function by ``module:function``.

    Raises:
        UserError: an unknown name or option, or a function that cannot be loaded.
    """
    if name not in REWARDS:
        if options and ":" in name:
            raise UserError(f"reward: {name} is a function, which takes no options; got {', '.join(options)}")
        return _load_function(name)
    try:
        return make_reward(name, **options)
    except ValueError as error:
        raise UserError(f"reward: {error}") from error


def _load_function(name: str) -> Reward:
    module, separator, function = name.partition(":")
    if not separator:
        raise UserError(f"reward: {unknown_name('reward', name, REWARDS)} Your own: module:function")
    # As `python -m` does, look in the current folder too; a console script does not by itself.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        reward = getattr(import_module(module), function)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise UserError(f"reward: cannot load {name!r}: {type(error).__name__}: {error}") from error
    if callable(reward) and not isinstance(reward, type):
        return cast(Reward, reward)
    kind = "class" if isinstance(reward, type) else type(reward).__name__
    raise UserError(f"reward: {name!r} is a {kind}; expected a function")
