"""The folder of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from drpo.errors import UserError
from drpo.files import locked, read_jsonl, replace_jsonl, write_json
from drpo.run.folder import RunFolder


class EvaluationFolder:
    """A folder that holds one evaluation: ``settings.json``, ``samples.jsonl`` and, at its end, ``evaluation.json``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.samples = path / "samples.jsonl"
        self.result = path / "evaluation.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here, of which one at a time may; the lock lies beside the folder."""
        where = f"--out {self.path}"
        with ExitStack() as held:
            try:
                path = self.path.absolute()
                path.parent.mkdir(parents=True, exist_ok=True)
                beside = path.with_name(path.name + ".lock")
                held.enter_context(locked(beside, f"{where}: another process is writing this evaluation"))
            except (OSError, ValueError) as error:
                raise UserError(f"{where}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
            yield

    def open(
        self, fixed: dict[str, Any], order: Sequence[tuple[int, int]], *, resume: bool, overwrite: bool
    ) -> list[dict[str, Any]]:
        """Begin, or go on with, an evaluation that is made of this; the samples that are there already.

        Args:
            fixed: the settings.
            order: the problem and number of each sample, in the order of the file.
            resume: go on.
            overwrite: begin, in place of the evaluation that is there.

        Raises:
            UserError: a folder that holds something else.
        """
        where = f"--out {self.path}"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{where}: is a file; expected a folder")
        is_there = self.path.is_dir() and any(self.path.iterdir())
        if is_there and not self.settings.is_file():
            raise UserError(f"{where}: is not an evaluation (it has no settings.json)")
        if is_there and resume:
            before, rows = self._read(order)
            for field in fixed:
                if before.get(field) != fixed[field]:
                    raise UserError(f"--resume: {field} is {fixed[field]!r}, but {self.path} has {before.get(field)!r}")
            return rows
        if resume:
            raise UserError(f"{where}: holds no evaluation to resume")
        if is_there and not overwrite:
            raise UserError(f"{where}: already exists; choose another, or give --resume or --overwrite")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for old in (self.samples, self.result):
                old.unlink(missing_ok=True)
            write_json(self.settings, fixed)
        except OSError as error:
            raise UserError(f"{where}: cannot be written ({error.strerror})") from error
        return []

    def _read(self, order: Sequence[tuple[int, int]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        try:
            before = json.loads(self.settings.read_text(encoding="utf-8"))
            rows = read_jsonl(self.samples)
            for number, (row, expected) in enumerate(zip(rows, order, strict=False), 1):
                if (row["problem"], row["sample"]) != expected:
                    raise ValueError(f"row {number} of samples.jsonl is of another sample than the {number}th")
            if not isinstance(before, dict):
                raise ValueError("settings.json holds no object")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--resume: {self.path} is damaged ({type(error).__name__}: {error})") from error
        return before, rows

    def rewrite(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep these samples alone."""
        replace_jsonl(self.samples, rows)


def read_result(path: Path) -> dict[str, Any]:
    """An evaluation by its folder or its evaluation.json.

    Raises:
        UserError: there is none, or it is not one.
    """
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        rates = [row["correct"] / row["samples"] for row in result["problems_table"] if (row["prompt"], row["answer"])]
        if not all(0 <= rate <= 1 for rate in (*rates, result["average"]["mean"])):
            raise ValueError("a share of correct samples is not between 0 and 1")
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{file}: is not an evaluation ({type(error).__name__}: {error})") from error
    return result


def default_folder(model: str, data: Sequence[str]) -> Path:
    """In the run folder, if the model is one's, else in evals/."""
    name = "+".join(Path(source).stem for source in data)
    run = RunFolder(Path(model))
    return run.evaluated / name if run.is_run else Path("evals") / f"{Path(model).name}-{name}"
