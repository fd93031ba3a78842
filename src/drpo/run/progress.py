"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """One bar over rollouts, with the last reward, held-out accuracy and |π − μ|; where there is no terminal, a line an evaluation."""

    def __init__(self, total: int, updates_per_rollout: int, show: bool) -> None:
        self._console = Console(quiet=not show)
        self._updates_per_rollout = updates_per_rollout
        self._shown: dict[str, float] = {}
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("rollouts"),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (show and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=total / updates_per_rollout, status="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, done: int) -> None:
        """Start the clock, ``done`` updates into the run."""
        self._bar.reset(
            self._task,
            total=self._bar.tasks[0].total,
            completed=done // self._updates_per_rollout,
            status=self._status(),
        )

    def advance(self, update: int, logs: dict[str, Any]) -> None:
        """Show what was logged after an update."""
        if logs.get("reward") is not None:
            self._shown["reward"] = logs["reward"]
        # At the last update of a rollout, where it is largest; at the first it is rounding.
        if update % self._updates_per_rollout == 0 and (divergence := logs.get("divergence/mean")) is not None:
            self._shown["|π−μ|"] = divergence
        self._bar.update(self._task, completed=update // self._updates_per_rollout, status=self._status())

    def accuracy(self, value: float, update: int) -> None:
        """Show the held-out accuracy after an update."""
        self._shown["accuracy"] = value
        self._bar.update(self._task, status=self._status())
        if not self._console.is_terminal:
            rollout, rollouts = update // self._updates_per_rollout, self._bar.tasks[0].total
            self._console.print(f"rollout {rollout}/{rollouts:.0f}  {self._status()}", highlight=False)

    def _status(self) -> str:
        return "  ".join(f"{name} {value:.3g}" for name, value in self._shown.items())


@contextmanager
def counting(verb: str, unit: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar over so many units on standard error; its function counts on. Nothing is shown where there is no terminal."""
    console = Console(stderr=True)
    bar = Bar(
        TextColumn(verb),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=total, completed=done)
    with bar:
        yield lambda count: bar.advance(task, count)
