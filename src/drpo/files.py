"""JSON and JSON Lines as this library writes them, lock files, and the versions that decide a run's numbers."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from drpo.errors import UserError, WriteError

_PACKAGES = (
    "drpo",
    "torch",
    "torchao",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "math-verify",
    "sympy",
)


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a run's numbers."""
    installed = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def _clean(value: Any) -> Any:
    """The value with every number that JSON has no word for, inf and NaN, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    return value


def _line(row: dict[str, Any]) -> str:
    # ASCII, so that a lone surrogate in a completion cannot break the file.
    return json.dumps(_clean(row), allow_nan=False) + "\n"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within this context a file, or what is in a folder, is written.

    Raises:
        WriteError: it cannot be.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def append_jsonl(path: Path, *rows: dict[str, Any]) -> None:
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, rows))


@contextmanager
def locked(path: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file, which is gone afterwards.

    Raises:
        UserError: another process holds it; the message is ``otherwise``.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(otherwise) from error
    try:
        yield
    finally:
        # While it is held: who opened it meanwhile finds it without a name, and makes another.
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def replacing(path: Path, option: str) -> Iterator[Path]:
    """A name beside ``path``, of the same ending, for a file that takes its place at the end: a link is not followed.

    Raises:
        UserError: it cannot be written; ``option`` is where the path was given.
    """
    try:
        with _beside(path) as partial:
            yield partial
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def iterate_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file this library wrote; none if there is no file. A last line cut short by a crash is dropped.

    Raises:
        UserError: another line is damaged.
    """
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"a {type(row).__name__}")
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: is damaged ({error}); expected a row of JSON") from error
                yield row


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of :func:`iterate_jsonl` at once."""
    return list(iterate_jsonl(path))


def replace_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file anew, as :func:`replace_text`; ``rows`` may come from the file itself."""
    _replace(path, map(_line, rows))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one value, as :func:`replace_text`."""
    replace_text(path, json.dumps(_clean(value), indent=2, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file, which appears whole or stays as it was, whatever ends the process."""
    _replace(path, [text])


def _replace(path: Path, lines: Iterable[str]) -> None:
    with writing(path), _beside(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def flush(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
