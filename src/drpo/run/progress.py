"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress(Bar):
    """One bar over rollouts, with the last reward, held-out accuracy and |π − μ|; where there is no terminal, a line an evaluation."""

    def __init__(self, total: int, updates_per_rollout: int, show: bool) -> None:
        console = Console(quiet=not show)
        columns = _columns("training", "rollouts", TextColumn("{task.fields[status]}"))
        super().__init__(*columns, console=console, disable=not (show and console.is_terminal))
        self._updates_per_rollout = updates_per_rollout
        self._rollouts = total // updates_per_rollout
        self._shown: dict[str, float] = {}
        self._task = self.add_task("", total=self._rollouts, status="")

    def begin(self, done: int) -> None:
        """Start the clock, ``done`` updates into the run."""
        completed = done // self._updates_per_rollout
        self.reset(self._task, total=self._rollouts, completed=completed, status=self._status())

    def show_update(self, update: int, logs: dict[str, Any]) -> None:
        """Show what was logged after an update."""
        if logs.get("reward") is not None:
            self._shown["reward"] = logs["reward"]
        # At the last update of a rollout, where it is largest; at the first it is rounding.
        if update % self._updates_per_rollout == 0 and (divergence := logs.get("divergence/mean")) is not None:
            self._shown["|π−μ|"] = divergence
        self.update(self._task, completed=update // self._updates_per_rollout, status=self._status())

    def show_accuracy(self, accuracy: float, update: int) -> None:
        """Show the held-out accuracy after an update."""
        self._shown["accuracy"] = accuracy
        self.update(self._task, status=self._status())
        if not self.console.is_terminal:
            rollout = update // self._updates_per_rollout
            self.console.print(f"rollout {rollout}/{self._rollouts}  {self._status()}", highlight=False)

    def _status(self) -> str:
        return "  ".join(f"{name} {value:.3g}" for name, value in self._shown.items())


@contextmanager
def counting(verb: str, unit: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar over so many units on standard error; its function counts on. Nothing is shown where there is no terminal."""
    console = Console(stderr=True)
    with Bar(*_columns(verb, unit), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _columns(verb: str, unit: str, *more: ProgressColumn) -> list[ProgressColumn]:
    return [
        TextColumn(verb),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        *more,
        TimeRemainingColumn(),
    ]
