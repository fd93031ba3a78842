"""A folder in which a user has a model and problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drpo.data.problems import MODEL_PATH, builtin_problems


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a user, with a model and problems in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for file in MODEL_PATH.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    write_problems(tmp_path / "train.jsonl", builtin_problems("train", 32, seed=0))
    write_problems(tmp_path / "heldout.jsonl", builtin_problems("heldout", 8, seed=0))
    return tmp_path


def write_problems(path: Path, problems: Any) -> None:
    path.write_text("".join(json.dumps(vars(problem)) + "\n" for problem in problems))
