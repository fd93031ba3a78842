"""Rewards that compare final numbers; nothing is computed or simplified."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from drpo.rewards.answers import final_answer, number
from drpo.rewards.call import text_of

_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def exact_answer(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where what follows the completion's last comma is the answer, else 0.0 (the built-in task)."""
    items = (last_item(text_of(completion)) for completion in completions)
    return [float(item == reference) for item, reference in zip(items, answer, strict=True)]


def last_item(text: str) -> str:
    """What follows the last comma of a text."""
    return text.rpartition(",")[2].strip()


def gsm8k_answer(text: str) -> str | None:
    """The final number of a text in one spelling, as :func:`gsm8k` finds it."""
    value = _gsm8k_number(text)
    return None if value is None else str(value.normalize())


def _gsm8k_number(text: str) -> Decimal | None:
    """The first number after the last ``####``, else in the last box, or the last number of a text without either."""
    text = text.replace("−", "-").replace("{,}", ",")
    _, mark, after_mark = text.rpartition("####")
    boxed = final_answer(text) if not mark and "\\boxed" in text else None
    numbers = _NUMBER.findall(after_mark if boxed is None else boxed)
    if not numbers:
        return None
    try:
        return Decimal(numbers[0 if mark or boxed else -1].replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def gsm8k(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the completion's final number equals that of the GSM8K answer, else 0.0.

    The final number stands after the last ``####``, else in the last box; without either it is the last number.
    """
    scores = []
    for completion, reference in zip(completions, answer, strict=True):
        value = _gsm8k_number(text_of(completion))
        scores.append(float(value is not None and value == _gsm8k_number(reference)))
    return scores


def integer(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    r"""1.0 where the completion's stated answer is the reference integer, else 0.0 (AIME, DAPO-Math).

    It is stated in the last ``\\boxed{}`` or, without one, after the last ``Answer:``; ``073`` is 73.

    Raises:
        ValueError: a reference that is not an integer.
    """
    scores = []
    for row, (completion, reference) in enumerate(zip(completions, answer, strict=True)):
        expected = _integer(reference)
        if expected is None:
            raise ValueError(f"integer: answer {row} is {reference!r}; expected an integer")
        stated = final_answer(text_of(completion))
        scores.append(float(stated is not None and _integer(stated) == expected))
    return scores


def _integer(text: str) -> Fraction | None:
    value = number(text)
    return value if value is not None and value.denominator == 1 else None
