"""The schema of a problem, and the rows of JSON Lines and Parquet files."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from drpo.errors import UserError
from drpo.registry import unknown_name

LONGEST_TEXT = 100_000
"""Characters of a prompt or an answer; more is a mistake in the file."""

BLANK = object()
"""In place of a line with nothing in it, which is counted and skipped."""

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A problem.

    Args:
        prompt: what is asked, as the model sees it.
        answer: the reference answer, as text.
        source: the data set it is from.
        id: of the problem within its source.
    """

    prompt: str
    answer: str
    source: str
    id: str


class MalformedRowsError(UserError):
    """Rows that are not what they should be, a line each."""

    MOST = 100

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__(mistakes[0])
        self._lines = [str(UserError(mistake)) for mistake in mistakes[: self.MOST]]
        if len(mistakes) > self.MOST:
            self._lines.append(f"and {len(mistakes) - self.MOST:,} more rows")

    @property
    def lines(self) -> list[str]:
        return self._lines


def read_rows(path: Path) -> list[Row]:
    """The rows of a file in the schema, as :func:`write_rows` writes it.

    Raises:
        UserError: a file that cannot be read.
        MalformedRowsError: all rows that are not in the schema, by file and row.
    """
    return list(converted(path, records(path), row_of))


def row_of(record: dict[str, Any], number: int) -> Row:
    """A record that is in the schema already."""
    del number
    return Row(*(text_field(record, name) for name in ("prompt", "answer", "source", "id")))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON Lines; the file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


def converted(path: Path | str, found: Iterable[Any], convert: Callable[[dict[str, Any], int], T]) -> Iterator[T]:
    """What ``convert`` makes of each record and its number; it raises ValueError on one that it cannot take.

    Raises:
        MalformedRowsError: after the last record, if any were malformed.
    """
    mistakes, empty = [], True
    for number, record in enumerate(found, 1):
        if record is BLANK:
            continue
        empty = False
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
    if empty:
        raise UserError(f"{path}: has no rows")


def records(path: Path) -> Iterator[Any]:
    """The records of a .jsonl or .parquet file, in order; a ValueError in place of one that cannot be read.

    Raises:
        UserError: a file that cannot be read.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path}: expected a file that ends in .jsonl or .parquet")
    try:
        yield from _json_records(path) if path.suffix == ".jsonl" else _parquet_records(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _json_records(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
        for line in lines:
            try:
                yield json.loads(line.decode("utf-8")) if line.strip() else BLANK
            except (ValueError, RecursionError) as error:
                yield ValueError(f"is not JSON in UTF-8 ({error})")


def _parquet_records(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def text_field(record: dict[str, Any], *names: str) -> str:
    """The text of the first of these fields that a record has; dots reach inside, and a whole number is its digits.

    Raises:
        ValueError: none of them is there, or it is not text that can be used.
    """
    name, value = _first(record, names)
    if isinstance(value, float) and math.isfinite(value):
        value = str(int(value)) if value.is_integer() else str(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected text or a finite number")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    if len(value) > LONGEST_TEXT:
        raise ValueError(f"{name} has {len(value):,} characters; expected at most {LONGEST_TEXT:,}")
    # Valid in JSON and in nothing that is written later.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name} has a lone surrogate; expected valid Unicode")
    return value.strip()


def has_field(record: dict[str, Any], name: str) -> bool:
    """Whether a record has a field; dots reach inside."""
    return _at(record, name) is not _MISSING


def _first(record: dict[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    for name in names:
        if (value := _at(record, name)) is not _MISSING:
            return name, value
    raise ValueError(unknown_name("field", names[0], record).replace("unknown", "has no", 1))


def _at(record: dict[str, Any], name: str) -> Any:
    value: Any = record
    for part in name.split("."):
        value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
    return value


_MISSING: Any = object()
