"""What is shown while a run goes on: what is being done, how long it has taken and how long it will."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drpo.run import progress
from drpo.run.progress import Progress
from test_train import SMALL, drpo, sets  # noqa: F401


def shown(is_terminal: bool, monkeypatch: pytest.MonkeyPatch, clock: Any) -> tuple[Progress, io.StringIO]:
    """A run of four rollouts of two updates, and what is printed."""
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=is_terminal, width=160)
    monkeypatch.setattr(progress, "Console", lambda quiet: console)
    return Progress(8, 2, show=True, clock=clock), printed


def test_without_a_terminal_there_is_a_line_a_rollout_with_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    bar, printed = shown(False, monkeypatch, lambda: now[0])
    with bar:
        bar.show_accuracy(0.25, 0)
        now[0] = 100.0  # of the evaluation before training
        bar.begin(done=0)
        for update in range(1, 9):
            now[0] += 45.0
            if update == 8:
                bar.show_accuracy(0.75, update)
            bar.show_update(update, {"reward": update / 10, "divergence/mean": 0.01})
    # A rollout takes 90 s: three of them are left after the first, 270 s.
    assert printed.getvalue().splitlines() == [
        "rollout 0/4  accuracy 0.25",
        "rollout 1/4  1 min 30 s, 4 min 30 s left  accuracy 0.25  reward 0.2  |π−μ| 0.01",
        "rollout 2/4  3 min 00 s, 3 min 00 s left  accuracy 0.25  reward 0.4  |π−μ| 0.01",
        "rollout 3/4  4 min 30 s, 1 min 30 s left  accuracy 0.25  reward 0.6  |π−μ| 0.01",
        "rollout 4/4  6 min 00 s, 0 s left  accuracy 0.75  reward 0.8  |π−μ| 0.01",
    ]


def test_an_accuracy_that_comes_after_its_rollout_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bar, printed = shown(False, monkeypatch, lambda: 0.0)
    with bar:
        bar.show_update(2, {})
        bar.show_accuracy(0.5, 2)
    assert [line.split("  ")[0] for line in printed.getvalue().splitlines()] == ["rollout 1/4", "rollout 1/4"]
    assert printed.getvalue().endswith("accuracy 0.5\n")


def test_what_was_done_before_a_run_was_resumed_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    bar, printed = shown(False, monkeypatch, lambda: now[0])
    with bar:
        bar.begin(done=4)
        now[0] = 4000.0
        bar.show_update(6, {})
    assert printed.getvalue().startswith("rollout 3/4  1 h 06 min, 1 h 06 min left")


def test_the_time_left_counts_down_within_a_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    bar, _ = shown(True, monkeypatch, lambda: now[0])
    with bar:
        bar.begin(done=0)
        now[0] = 60.0
        assert bar.times(0) == "1 min 00 s"
        bar.show_update(2, {"divergence/mean": 0.01})
        # A rollout takes 60 s, and three are left.
        for seconds, left in ((60.0, "3 min 00 s"), (80.0, "2 min 40 s"), (400.0, "0 s")):
            now[0] = seconds
            assert bar.times(1).endswith(f", {left} left")


def test_a_rollout_that_measured_no_distance_does_not_show_the_last_one_s(monkeypatch: pytest.MonkeyPatch) -> None:
    bar, printed = shown(False, monkeypatch, lambda: 0.0)
    with bar:
        bar.show_update(2, {"divergence/mean": 0.01})
        bar.show_update(4, {})
    assert ["|π−μ|" in line for line in printed.getvalue().splitlines()] == [True, False]


def test_a_terminal_shows_the_phase_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    bar, printed = shown(True, monkeypatch, lambda: 0.0)
    with bar:
        bar.show_phase("sampling")
        bar.refresh()
        bar.show_update(2, {"reward": 0.5})
    assert "loading" in printed.getvalue()
    assert "sampling" in printed.getvalue()
    assert "rollout 1/4" not in printed.getvalue()


def test_a_run_goes_through_its_phases(tmp_path: Path, drpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    phases: list[str] = []
    monkeypatch.setattr(Progress, "show_phase", lambda self, phase: phases.append(phase))
    drpo("train", "--output", tmp_path / "run", *sets(**{**SMALL, "rollouts": 2}, updates_per_rollout=2))
    once = ["sampling", "scoring", "updating", "updating"]
    assert phases == ["evaluating", *once, *once, "evaluating", "saving"]


def test_a_run_without_a_terminal_prints_a_line_a_rollout(
    tmp_path: Path,
    drpo: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    drpo("train", "--output", tmp_path / "run", *sets(**SMALL))
    rollouts = re.findall(r"^rollout (\d)/4  ", capsys.readouterr().out, re.MULTILINE)
    assert rollouts == ["0", "1", "2", "3", "4"]
