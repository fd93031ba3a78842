"""Rewards: each takes completions and reference answers and returns one score a completion, as TRL expects."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, cast

from drpo.errors import UserError
from drpo.names import make, unknown_name
from drpo.rewards.exact import exact_answer, gsm8k, integer
from drpo.rewards.math import MathGrader
from drpo.rewards.shaping import Format, Overlong, Weighted
from drpo.rewards.text import text_of

__all__ = [
    "REWARDS",
    "Format",
    "MathGrader",
    "Overlong",
    "Reward",
    "Weighted",
    "exact_answer",
    "gsm8k",
    "integer",
    "load_reward",
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


def load_reward(name: str, **options: Any) -> Reward:
    """A built-in reward by name, with its options, or a function by ``module:function``.

    Raises:
        UserError: an unknown name or option, or a function that cannot be loaded.
    """
    found = REWARDS.get(name)
    if isinstance(found, type):
        try:
            return make("reward", {name: found}, name, options)
        except (ValueError, TypeError) as error:
            raise UserError(f"reward: {name}: {error}") from error
    if options:
        raise UserError(f"reward: {name} has no options, and got {', '.join(options)}")
    return found or _load_function(name)


def _load_function(name: str) -> Reward:
    module, separator, function = name.partition(":")
    if not separator:
        raise UserError(f"reward: {unknown_name('reward', name, REWARDS)} Your own: module:function")
    # As `python -m` does, look in the current folder too; a console script does not by itself.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), function)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise UserError(f"reward: cannot load {name!r}: {type(error).__name__}: {error}") from error
    if callable(found):
        return cast(Reward, found)
    raise UserError(f"reward: {name!r} is a {type(found).__name__}; expected a function")
