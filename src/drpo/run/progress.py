"""Progress bars."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text


class Progress(Bar):
    """One bar over rollouts: what is being done, the last reward, held-out accuracy and |π − μ|, the time since training
    began and, from the first rollout on, the time that is left. Where there is no terminal, a line a rollout says this.

    Args:
        total: updates of the run.
        updates_per_rollout: of them.
        show: whether this process speaks.
        clock: seconds, for tests.
    """

    def __init__(
        self, total: int, updates_per_rollout: int, show: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        console = Console(quiet=not show)
        columns = [
            TextColumn("{task.description:10}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("rollouts"),
            TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            _Times(self),
        ]
        super().__init__(*columns, console=console, disable=not (show and console.is_terminal), get_time=clock)
        self._updates_per_rollout = updates_per_rollout
        self._rollouts = total // updates_per_rollout
        self._shown: dict[str, float] = {}
        self._clock, self._began, self._done_before, self._said = clock, math.nan, 0, -1
        self._counted, self._counted_at = 0, math.nan
        self._task = self.add_task("loading", total=self._rollouts, status="")

    def begin(self, done: int) -> None:
        """Start the clock, ``done`` updates into the run."""
        self._began, self._done_before = self._clock(), done // self._updates_per_rollout
        self.reset(self._task, total=self._rollouts, completed=self._done_before, status=self._status())

    def show_phase(self, phase: str) -> None:
        """Show what is being done."""
        self.update(self._task, description=phase)

    def show_update(self, update: int, logs: dict[str, Any]) -> None:
        """Show what was logged after an update."""
        if logs.get("reward") is not None:
            self._shown["reward"] = logs["reward"]
        rollout, is_within = divmod(update, self._updates_per_rollout)
        # At the last update of a rollout, where it is largest; at the first it is rounding.
        if not is_within:
            self._shown.pop("|π−μ|", None)
            if (divergence := logs.get("divergence/mean")) is not None:
                self._shown["|π−μ|"] = divergence
            self._counted, self._counted_at = rollout - self._done_before, self._clock()
        self.update(self._task, completed=rollout, status=self._status())
        if not is_within:
            self._say(rollout)

    def show_accuracy(self, accuracy: float, update: int) -> None:
        """Show the held-out accuracy after an update."""
        self._shown["accuracy"] = accuracy
        self.update(self._task, status=self._status())
        rollout = update // self._updates_per_rollout
        # A rollout that is not over yet has its line still to come.
        if rollout in (0, self._said):
            self._say(rollout)

    def times(self, completed: float) -> str:
        """The time since training began and what is left of it, after so many rollouts; "" before."""
        if math.isnan(self._began):
            return ""
        now = self._clock()
        if not self._counted:
            return _duration(now - self._began)
        # By the pace of the rollouts that are over: what one that is not has taken so far says nothing of the pace.
        pace = (self._counted_at - self._began) / self._counted
        left = max(0.0, pace * (self._rollouts - completed) - (now - self._counted_at))
        return f"{_duration(now - self._began)}, {_duration(left)} left"

    def _say(self, rollout: int) -> None:
        self._said = rollout
        if not self.console.is_terminal:
            parts = (f"rollout {rollout}/{self._rollouts}", self.times(rollout), self._status())
            self.console.print("  ".join(filter(None, parts)), highlight=False, soft_wrap=True)

    def _status(self) -> str:
        return "  ".join(f"{name} {value:.3g}" for name, value in self._shown.items())


class _Times(ProgressColumn):
    """:meth:`Progress.times`."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(self._progress.times(task.completed), no_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


@contextmanager
def counting(verb: str, unit: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar over so many units on standard error; its function counts on. Nothing is shown where there is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(verb), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda count: bar.advance(task, count)
