"""Exact rewards: each takes completions and reference answers and returns one score a completion, as TRL expects."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from importlib import import_module
from typing import Any, cast

from drpo.errors import UserError
from drpo.names import unknown_name

Reward = Callable[..., list[float]]

_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def text_of(completion: str | Sequence[dict[str, str]]) -> str:
    """The text of a completion, plain or conversational (the content of its last message)."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact_answer(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where what follows the completion's last comma is the answer, else 0.0 (the built-in task)."""
    given = (text_of(completion).rpartition(",")[2].strip() for completion in completions)
    return [float(number == reference) for number, reference in zip(given, answer, strict=True)]


def _gsm8k_number(text: str) -> Decimal | None:
    """The first number after the last ``####``, or the last number of a text without one."""
    marked = text.replace("−", "-").rpartition("####")
    found = _NUMBER.findall(marked[2])
    if not found:
        return None
    try:
        return Decimal(found[0 if marked[1] else -1].replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def gsm8k(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the completion's final number equals that of the GSM8K answer, else 0.0.

    The final number stands after the last ``####``; without one it is the last number.
    """
    scores = []
    for completion, reference in zip(completions, answer, strict=True):
        given = _gsm8k_number(text_of(completion))
        scores.append(float(given is not None and given == _gsm8k_number(reference)))
    return scores


REWARDS: dict[str, Reward] = {"exact_answer": exact_answer, "gsm8k": gsm8k}


def load_reward(name: str) -> Reward:
    """A built-in reward by name, or a function by ``module:function``."""
    if name in REWARDS:
        return REWARDS[name]
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
