"""A pydantic error as one line of this library's: field, value, and what was expected."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from drpo.registry import unknown_name

_WORDS = {
    "Value error, ": "",
    "Input should be ": "",
    "String should have at least 1 character": "text that is not empty",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid dictionary": "a mapping",
    "a valid boolean": "true or false",
    "a valid list": "a list",
}
"""Pydantic's words, by ours for the same."""

_BRANCH = re.compile(r"function-.*|constrained-.*|list\[.*|dict|list|str|int|float|bool")
"""Pydantic puts the branch of a union that it tried among the keys."""


def first_mistake(error: ValidationError, known: Mapping[str, Iterable[str]]) -> str:
    """The mistake to mend first.

    Args:
        error: of a whole document.
        known: the fields of each mapping in the document, by its dotted key; those of the document itself by "".
    """
    # A misspelt field is missing under its right name too; what was written says more than what was not.
    mistake = min(error.errors(include_url=False), key=lambda mistake: mistake["type"] != "extra_forbidden")
    keys = [str(key) for key in mistake["loc"] if not _BRANCH.fullmatch(str(key))]
    field, value = ".".join(keys), mistake["input"]
    if mistake["type"] == "extra_forbidden":
        parent = ".".join(keys[:-1])
        return unknown_name("field", field, [f"{parent}.{name}" if parent else name for name in known[parent]])
    if mistake["type"] == "missing":
        return f"{field}: is missing; it has no default"
    if mistake["type"] == "value_error":
        return f"{field}: {expectation(mistake['msg'])}".removeprefix(": ")
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return f"{field}: got {shown}; expected {expectation(mistake['msg'])}"


def expectation(message: str) -> str:
    """What a message of pydantic's says that it expects."""
    message = message.partition(", unable to")[0]
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message
