"""``scripts/gpu.py`` runs from end to end where there is no GPU."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu.py"


@pytest.mark.long
def test_small_sizes_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout
    for part in ("fused_loss", "low_precision", "training_phase"):
        with (tmp_path / f"{part}.csv").open(newline="") as table:
            rows = list(csv.DictReader(table))
        assert float(rows[0]["seconds"]) > 0
    assert not list(tmp_path.glob("*.log"))


def test_an_unknown_part_is_named() -> None:
    finished = subprocess.run([sys.executable, str(SCRIPT), "kernel"], capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "unknown part 'kernel'" in finished.stderr
