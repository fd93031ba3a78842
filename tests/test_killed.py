"""Runs that are killed at random moments, saves among them, and resumed end with the bytes of the uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.long
@pytest.mark.parametrize(
    ("kills", "settings"),
    [
        (20, {}),
        (5, {"lora": True}),
        (5, {"rollout_lag": 4}),
        (5, {"rollout_precision": "fp8"}),
        (5, {"rollout_precision": "int8"}),
        (5, {"ranks": 2, "per_device_train_batch_size": 2}),
        (5, {"ranks": 2, "per_device_train_batch_size": 2, "signal": signal.SIGTERM}),
    ],
    ids=lambda value: "-".join(value) or "one process" if isinstance(value, dict) else f"{value} kills",
)
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, kills: int, settings: dict[str, object]) -> None:
    finished = subprocess.run(
        [sys.executable, "support/killed.py", str(tmp_path), str(kills), json.dumps(settings)],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert sum("killed" in row for row in rows) >= kills
    assert all(row["same"] for row in rows if "same" in row)
