"""Runs of the grid on all cores, each by :func:`drpo.run.train.train`; what is there already is not run again."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import platform
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from drpo.data.split import Split
from drpo.files import append_jsonl, iterate_jsonl, replace_jsonl, versions
from drpo.lab.grid import SETTINGS, Run
from drpo.lab.models import MADE, SMOLLM2, copy_smollm2, make_base_model
from drpo.lab.tasks import TASKS, TaughtTask

TRIES = 2
"""Of a run whose worker dies, before it is recorded as failed."""

PROBLEMS: dict[Split, int] = {"train": 4000, "heldout": 400}
"""How many there are of each split."""

_OF_ROLLOUTS = ("reward", "divergence/mean", "divergence/p99", "entropy", "ratio/max", "grad_norm")


class Lab:
    """A folder of results: ``models/`` the base models, ``runs.jsonl`` a row a run.

    Args:
        path: the folder; made if need be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = path / "runs.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """The results so far."""
        return list(iterate_jsonl(self.results))

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """The runs of which there is no result."""
        done = set(map(run_of, self.rows()))
        return [run for run in runs if run not in done]

    def run(self, runs: Sequence[Run], jobs: int) -> None:
        """Make base models and runs that are missing, ``jobs`` at a time, and append a row for each that ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        todo = self.missing(runs)
        for setting in dict.fromkeys(run.setting for run in todo):
            make_base(self.path, setting)
        where = _provenance()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        workers: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(jobs):
            workers.put(_Worker(self.path))
        with Progress(*columns, TimeRemainingColumn()) as progress, ThreadPoolExecutor(jobs) as pool:
            bar = progress.add_task("runs", total=len(runs), completed=len(runs) - len(todo))
            try:
                for finished in as_completed([pool.submit(_one, workers, run) for run in todo]):
                    append_jsonl(self.results, {**finished.result(), **where})
                    progress.advance(bar)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                while not workers.empty():
                    workers.get().stop()


def run_of(row: dict[str, Any]) -> Run:
    """The run that a row of results is of."""
    return Run(**{field.name: row[field.name] for field in dataclasses.fields(Run)})


def make_base(folder: Path, setting_name: str) -> None:
    """The base model of a setting and its problems, unless they are there.

    Raises:
        UserError: a real model that cannot be loaded.
    """
    setting = SETTINGS[setting_name]
    base, task = folder / "models" / setting.base, TASKS[setting.task]
    if (base / "model" / MADE).is_file():
        return
    base.mkdir(parents=True, exist_ok=True)
    for split, size in PROBLEMS.items():
        problems = task.problems(split, size, seed=0)
        replace_jsonl(base / f"{split}.jsonl", ({"prompt": p.prompt, "answer": p.answer} for p in problems))
    if setting.architecture == "smollm2":
        here = folder / "models" / "smollm2"
        copy_smollm2(base / "model", task, source=str(here) if here.is_dir() else SMOLLM2)
    else:
        assert isinstance(task, TaughtTask)
        make_base_model(base / "model", task, setting.architecture, steps=task.batches, error_rate=0.25)


class _Worker:
    """A process with one thread that makes runs one after another; another one takes its place if it dies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._folder), daemon=True)
        self._process.start()
        theirs.close()

    def make(self, run: Run) -> dict[str, Any]:
        """The row of a run."""
        for _ in range(TRIES):
            try:
                self._connection.send(run)
                return self._connection.recv()
            except (EOFError, OSError):
                self.stop()
                self._start()
        return {**dataclasses.asdict(run), "status": "failed", "error": f"its worker died {TRIES} times"}

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()
        self._connection.close()


def _one(workers: SimpleQueue[_Worker], run: Run) -> dict[str, Any]:
    worker = workers.get()
    try:
        return worker.make(run)
    finally:
        workers.put(worker)


def _serve(connection: Connection, folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    while True:
        try:
            run = connection.recv()
        except EOFError:
            return
        try:
            row = _train(run, folder)
        except Exception as error:  # a run that diverges may fail anywhere
            row = {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        connection.send({**dataclasses.asdict(run), **row})


def _end_with_parent() -> None:
    """Leave a run unfinished that nobody waits for any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(run: Run, folder: Path) -> dict[str, Any]:
    from drpo.run.folder import RunFolder
    from drpo.run.recipe import dump_recipe
    from drpo.run.train import train

    recipe = run.recipe(folder)
    with tempfile.TemporaryDirectory() as scratch:
        output = RunFolder(Path(scratch) / "run")
        summary = train(recipe, output)
        updates = list(iterate_jsonl(output.metrics))
        evaluations = list(iterate_jsonl(output.evaluations))
    return {
        "status": "finished",
        "accuracy": [row["accuracy"] for row in evaluations],
        "at_rollout": [row["rollout"] for row in evaluations],
        **{name: _by_rollout(updates, name) for name in _OF_ROLLOUTS},
        "weight_histogram": [sum(counts) for counts in zip(*(row["weight_histogram"] for row in updates), strict=True)],
        "seconds": summary["train_seconds"],
        # Without the place of the folder on this machine, which the row may leave.
        "recipe": dump_recipe(recipe).replace(f"{folder}/", ""),
    }


def _by_rollout(updates: Sequence[dict[str, Any]], name: str) -> list[float | None]:
    """The last value of each rollout: of the update where π is furthest from what sampled."""
    last: dict[int, float | None] = {}
    for row in updates:
        last[row["rollout"]] = row.get(name, last.get(row["rollout"]))
    return [last[rollout] for rollout in sorted(last)]


def _provenance() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "commit": commit or None,
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
