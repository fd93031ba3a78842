"""Problems and other records in JSON Lines and Parquet files."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from decimal import Decimal
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

from drpo.data.problems import Problem
from drpo.errors import UserError
from drpo.files import replace_jsonl, versions, write_json
from drpo.registry import unknown_name

LONGEST_TEXT = 100_000
"""Characters of a prompt or an answer; more is a mistake in the file."""

LARGEST_EXPONENT = 308
"""Of ten, in a number: what has a larger one is infinite or 0 as a float, and has no end of digits."""

MOST_MISTAKES = 100
"""Malformed rows that are named one by one."""

T = TypeVar("T")
Row = tuple[int, Any]
"""The number of a row, from 1, and its record; a ValueError in place of one that cannot be read."""


class Number(Decimal):
    """A number of a JSON file with all of its digits, of which a float loses some."""

    __repr__ = Decimal.__str__


class MalformedRowsError(UserError):
    """Rows that are not what they should be; each has a line."""

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__(mistakes[0])
        self.mistakes = mistakes

    @property
    def lines(self) -> list[str]:
        named, more = self.mistakes[:MOST_MISTAKES], len(self.mistakes) - MOST_MISTAKES
        return [str(UserError(mistake)) for mistake in named] + ([f"and {more:,} more rows"] if more > 0 else [])


def read_problems(
    path: Path, *, prompt: str = "prompt", answer: str = "answer", template: str = "{prompt}"
) -> list[Problem]:
    """The problems of a .jsonl or .parquet file.

    Args:
        path: the file.
        prompt: the field that holds the question.
        answer: the field that holds the reference answer, text or a number.
        template: the text that the model sees, with ``{prompt}`` where the question goes.

    Raises:
        UserError: a file that cannot be read.
        MalformedRowsError: the rows without these fields, by file and row.
    """

    def convert(record: dict[str, Any], _: int) -> Problem:
        question = text_field(record, prompt)
        labels = (label(record, name) for name in ("source", "id"))
        return Problem(template.replace("{prompt}", question), value_field(record, answer), *labels)

    return list(converted(path, records(path, decode_exactly), convert))


def write_with_report(path: Path, problems: Iterable[Problem], report: dict[str, Any]) -> None:
    """Write problems as JSON Lines, and a report of the same name in .json beside them.

    Raises:
        UserError: they cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_jsonl(path, map(asdict, problems))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        write_json(path.with_suffix(".json"), {**report, "sha256": digest, "versions": versions()})
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error


def converted(path: Path | str, rows: Iterable[Row], convert: Callable[[dict[str, Any], int], T]) -> Iterator[T]:
    """Convert each record, given its number; ``convert`` raises ValueError on a record that it cannot take.

    Raises:
        MalformedRowsError: after the last record, if any were malformed.
        UserError: there are no rows.
    """
    mistakes, number = [], 0
    for number, record in rows:
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError(f"is a {type(record).__name__}; expected an object")
            yield convert(record, number)
        except ValueError as error:
            mistakes.append(f"{path}, row {number}: {error}")
    if mistakes:
        raise MalformedRowsError(mistakes)
    if not number:
        raise UserError(f"{path}: has no rows; expected one JSON object a line, or one row of parquet for each")


def decode_exactly(line: str) -> Any:
    """Decode JSON with every digit of its numbers."""
    return json.loads(line, parse_float=Number, parse_int=Number)


def records(path: Path, decode: Callable[[str], Any] = json.loads) -> Iterator[Row]:
    """The rows of a .jsonl or .parquet file, in order. A blank line counts and is left out.

    Args:
        path: the file.
        decode: what reads a line of JSON.

    Raises:
        UserError: a file that cannot be read.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path}: expected a file that ends in .jsonl or .parquet")
    try:
        yield from _json_rows(path, decode) if path.suffix == ".jsonl" else _parquet_rows(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    # What pyarrow raises is one of these too.
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _json_rows(path: Path, decode: Callable[[str], Any]) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = decode(line.decode("utf-8"))
            except (ValueError, ArithmeticError, RecursionError) as error:
                record = ValueError(f"is not JSON in UTF-8 ({error})")
            yield number, record


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=256)
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)


def text_field(record: dict[str, Any], *names: str) -> str:
    """The text of the first of these fields that a record has; dots reach inside.

    Raises:
        ValueError: none of them is there, or it is not text that can be used.
    """
    name, value = _first(record, names)
    return _checked(name, value, value, "text")


def value_field(record: dict[str, Any], name: str) -> str:
    """The text of a field, or the digits of its number without an exponent; a whole number has no decimal point.

    Raises:
        ValueError: it is not there, or holds something else.
    """
    name, value = _first(record, (name,))
    text = value.strip() if isinstance(value, str) else value
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        number = Decimal(str(value))
        if number.is_finite() and abs(number.adjusted()) <= LARGEST_EXPONENT:
            text = str(int(number)) if number == number.to_integral_value() else format(number, "f")
    return _checked(name, value, text, "text or a finite number")


def label(record: dict[str, Any], name: str) -> str:
    """The text of a field, or ""; a label is for people, and a file of one's own may have another use for the field."""
    try:
        return value_field(record, name)
    except ValueError:
        return ""


def _first(record: dict[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    for name in names:
        try:
            return name, reduce(getitem, name.split("."), record)
        except (KeyError, TypeError):
            continue
    raise ValueError(unknown_name("field", names[0], record).replace("unknown", "has no", 1))


def _checked(name: str, value: Any, text: Any, expected: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected {expected}")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{name} has {len(text):,} characters; expected at most {LONGEST_TEXT:,}")
    # Valid in JSON and in nothing that is written later.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} has a lone surrogate; expected valid Unicode")
    return text
