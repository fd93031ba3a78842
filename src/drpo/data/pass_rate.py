"""The problems that a model solves sometimes: a policy gradient learns nothing from always and from never."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drpo.data.files import Row, write_rows
from drpo.errors import UserError
from drpo.files import write_json


def keep(rows: Sequence[Row], table: Sequence[dict[str, Any]], least: float, most: float) -> list[Row]:
    """The rows whose share of correct samples is at least ``least`` and at most ``most``."""
    rates = [found["correct"] / found["samples"] for found in table]
    return [row for row, rate in zip(rows, rates, strict=True) if least <= rate <= most]


def write_kept(path: Path, kept: Sequence[Row], report: dict[str, Any]) -> None:
    """Write the rows, and what was done to them beside, as a .json of the same name.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, kept)
        write_json(path.with_suffix(".json"), report)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error
