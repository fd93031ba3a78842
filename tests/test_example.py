"""The loop on one page learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

LOOP = Path(__file__).parents[1] / "examples" / "loop.py"


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
