"""The examples learn: the loop on one page, and a real model in a notebook."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LOOP, NOTEBOOK = EXAMPLES / "loop.py", EXAMPLES / "real_model.ipynb"


@pytest.fixture
def loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loop", LOOP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_accuracy_rises(loop: ModuleType) -> None:
    before, after = loop.main(rollouts=6)
    assert after > before + 0.15


def test_it_is_a_page() -> None:
    assert len(LOOP.read_text(encoding="utf-8").splitlines()) <= 105


@pytest.fixture
def code() -> list[dict[str, Any]]:
    """The notebook's cells of code."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) <= 10
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_committed_without_outputs(code: list[dict[str, Any]]) -> None:
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)


@pytest.mark.long
@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="SMOLLM2 names no folder that scripts/smollm2.py made")
def test_the_notebook_runs_and_its_model_gets_better(
    code: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, cell in enumerate(code, 1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["after"]["accuracy"]["low"] > names["before"]["accuracy"]["high"]
    for figure in (names["divergence"]([names["run"]]), names["effects"]([names["run"]])):
        assert figure.data
