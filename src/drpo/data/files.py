"""Problems and other records in JSON Lines and Parquet files."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from drpo.data.problems import Message, Problem
from drpo.errors import UserError
from drpo.files import replace_jsonl, versions, write_json
from drpo.registry import unknown_name

LONGEST_TEXT = 100_000
"""Characters of a prompt or an answer, some 25,000 tokens of English; more is a mistake in the file."""

LONGEST_LINE = 16_000_000
"""Bytes of a line of JSON: a sequence of 128,000 tokens with five numbers for each. In memory it may be thirty times as large."""

LONGEST_PROBLEM = 4_000_000
"""Bytes of a line that is a problem, whose numbers take more memory: prompt and answer with every character escaped."""

LARGEST_EXPONENT = 308
"""Of ten, in a number: what has a larger one is infinite or 0 as a float, and has no end of digits."""

MOST_MISTAKES = 100
"""Malformed rows that are named one by one."""

T = TypeVar("T")
Row = tuple[int, Any]
"""The number of a row, from 1, and its record; a ValueError in place of one that cannot be read."""


class Number(Decimal):
    """A number of a JSON file with all of its digits, of which a float loses some."""

    __slots__ = ()
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
        prompt: the field that holds the question: text, or the messages of a conversation, the last of which is the user's.
        answer: the field that holds the reference answer, text or a number.
        template: the text of the question that the model sees, with ``{prompt}`` where the question goes.

    Raises:
        UserError: a file that cannot be read.
        MalformedRowsError: the rows without these fields, by file and row.
    """

    def convert(record: dict[str, Any], _: int) -> Problem:
        *context, question = conversation_field(record, prompt)
        labels = (label(record, name) for name in ("source", "id"))
        text = template.replace("{prompt}", question["content"])
        return Problem(text, value_field(record, answer), *labels, context=tuple(context))

    return list(converted(path, problem_records(path), convert))


def write_with_report(path: Path, problems: Iterable[Problem], report: dict[str, Any]) -> None:
    """Write problems as JSON Lines, and a report of the same name in .json beside them.

    Raises:
        UserError: they cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_jsonl(path, (problem.as_row() for problem in problems))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        write_json(path.with_suffix(".json"), {**report, "sha256": digest, "versions": versions()})
    except (OSError, ValueError) as error:
        raise UserError(f"--out {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


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


def problem_records(path: Path) -> Iterator[Row]:
    """The rows of a file of problems, with every digit of their numbers; as :func:`records`."""
    return records(path, LONGEST_PROBLEM, parse_float=Number, parse_int=Number)


def records(path: Path, longest: int = LONGEST_LINE, **decoding: Any) -> Iterator[Row]:
    """The rows of a .jsonl or .parquet file, in order. A blank line counts and is left out.

    Args:
        path: the file.
        longest: bytes of a line.
        decoding: how JSON is decoded, as ``json.loads`` has it.

    Raises:
        UserError: a file that cannot be read.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path}: expected a file that ends in .jsonl or .parquet")
    try:
        yield from _json_rows(path, longest, decoding) if path.suffix == ".jsonl" else _parquet_rows(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # a damaged Parquet file fails in many ways
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _json_rows(path: Path, longest: int, decoding: dict[str, Any]) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, (line, is_whole) in enumerate(_lines(file, longest), 1):
            if not line.strip():
                continue
            if not is_whole:
                yield number, ValueError(f"has more than {longest:,} bytes; expected one JSON object")
                continue
            try:
                record = json.loads(line.decode("utf-8"), object_pairs_hook=_object, **decoding)
            except (ValueError, ArithmeticError, RecursionError) as error:
                record = ValueError(f"is not JSON in UTF-8 ({error})")
            yield number, record


def _lines(file: BinaryIO, longest: int) -> Iterator[tuple[bytes, bool]]:
    """Each line, cut after ``longest`` bytes, and whether that is all of it."""
    while line := file.readline(longest + 1):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(longest)
        yield line, len(line) <= longest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {reprlib.repr(repeated)} is there twice")
    return record


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    # Pages have checksums where their writer was told to make them. Few rows at a time: any of them may be large.
    with ParquetFile(path, page_checksum_verification=True) as file:
        batches = file.iter_batches(batch_size=16)
        number = 0
        for number, record in enumerate((record for batch in batches for record in _decoded(batch)), 1):
            yield number, record
        # A damaged footer may leave rows out without a word.
        groups = (file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups))
        if not number == sum(groups) == file.metadata.num_rows:
            raise ValueError(f"{number:,} rows, where its footer says {file.metadata.num_rows:,}")


def _decoded(batch: Any) -> list[Any]:
    try:
        return batch.to_pylist()
    except Exception as error:  # text that is no UTF-8, a time that Python has no word for
        if batch.num_rows == 1:
            return [ValueError(f"cannot be decoded ({error})")]
        return [record for index in range(batch.num_rows) for record in _decoded(batch.slice(index, 1))]


def text_field(record: dict[str, Any], *names: str) -> str:
    """The text of the first of these fields that a record has; dots reach inside.

    Raises:
        ValueError: none of them is there, or it is not text that can be used.
    """
    name, value = _first(record, names)
    return _checked(name, value, value, "text")


def conversation_field(record: dict[str, Any], name: str) -> list[Message]:
    """The messages of a field; text is a conversation of one.

    Raises:
        ValueError: it is not there, or holds something else.
    """
    name, value = _first(record, (name,))
    if not isinstance(value, list) or not value:
        return [{"role": "user", "content": _checked(name, value, value, "text, or a list of messages")}]
    messages = []
    for place, message in enumerate(value):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(f"{name}[{place}] is {reprlib.repr(message)}; expected an object with role and content")
        texts = {key: _checked(f"{name}[{place}].{key}", text, text, "text") for key, text in message.items()}
        messages.append(texts)
    if messages[-1]["role"] != "user":
        raise ValueError(f"{name} ends with a message of {messages[-1]['role']!r}; expected one of 'user'")
    return messages


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
        # A name that is not there would be looked up among the others, of each row.
        return value_field(record, name) if name.partition(".")[0] in record else ""
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
    # Both are valid in JSON, the former in nothing that is written later.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} has a lone surrogate; expected valid Unicode")
    if "\0" in text:
        raise ValueError(f"{name} has a NUL character; expected text")
    return text
