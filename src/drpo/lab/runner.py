"""Runs of the grid on all cores, each by :func:`drpo.run.train.train`; what is there already is not run again."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import platform
import signal
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from drpo.data.files import read_problems
from drpo.data.problems import Problem
from drpo.data.split import Split
from drpo.files import append_jsonl, iterate_jsonl, replace_jsonl, versions
from drpo.lab.grid import SETTINGS, Plan, Run, Setting
from drpo.lab.models import MADE, SMOLLM2, ProblemSet, copy_smollm2, make_base_model, solvable
from drpo.lab.statistics import area_under
from drpo.lab.tasks import TASKS, TaughtTask
from drpo.pretrained import load_pretrained

TRIES = 2
"""Of a run whose worker dies, before it is recorded as failed."""

PROBLEMS: dict[Split, int] = {"train": 4000, "heldout": 400}
"""How many there are of each split."""

SOLVABLE_OF = 400
"""Training problems among which those are looked for that the base model solves now and then."""

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

    def areas(self) -> dict[Run, float]:
        """The mean accuracy over each run so far; 0 of one that failed."""
        return {run_of(row): area_under(row["accuracy"]) if row["status"] == "finished" else 0.0 for row in self.rows()}

    def run(self, plan: Plan, jobs: int) -> None:
        """Make base models and runs that are missing, ``jobs`` at a time, and append a row for each that ends.

        A plan is asked again when its runs have ended: it may choose others by their results.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn()) as progress, _Workers(self.path, jobs) as workers:
            while todo := self.missing(runs := plan(self.areas())):
                for setting in dict.fromkeys(run.setting for run in todo):
                    make_base(self.path, setting)
                provenance = _provenance()
                bar = progress.add_task("runs", total=len(runs), completed=len(runs) - len(todo))
                for row in workers.make(todo):
                    append_jsonl(self.results, {**row, **provenance})
                    progress.advance(bar)


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
    if not (base / "model" / MADE).is_file():
        _make_base(base, setting, folder / "models" / "smollm2")
    if "solvable" in (setting.train, setting.heldout) and not (base / "solvable.jsonl").is_file():
        model, tokenizer = load_pretrained(str(base / "model"), torch.float32, field="", expected="")
        problems = read_problems(base / "train.jsonl")
        _write_problems(base, "solvable", solvable(model, tokenizer, task, problems[:SOLVABLE_OF]))


def _make_base(base: Path, setting: Setting, smollm2: Path) -> None:
    base.mkdir(parents=True, exist_ok=True)
    task = TASKS[setting.task]
    for split, size in PROBLEMS.items():
        _write_problems(base, split, task.problems(split, size, seed=0))
    if setting.architecture == "smollm2":
        copy_smollm2(base / "model", task, source=str(smollm2) if smollm2.is_dir() else SMOLLM2)
    else:
        assert isinstance(task, TaughtTask)
        make_base_model(base / "model", task, setting.architecture, steps=task.batches, error_rate=0.25)


def _write_problems(base: Path, name: ProblemSet, problems: Iterable[Problem]) -> None:
    replace_jsonl(base / f"{name}.jsonl", ({"prompt": p.prompt, "answer": p.answer} for p in problems))


class _Workers:
    """Processes that make runs; on leaving they are stopped, whatever they are at."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self._workers = [_Worker(folder) for _ in range(jobs)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._pool = ThreadPoolExecutor(jobs)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def make(self, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
        """The row of each run, as they end."""
        for finished in as_completed([self._pool.submit(self._make, run) for run in runs]):
            yield finished.result()

    def _make(self, run: Run) -> dict[str, Any]:
        worker = self._idle.get()
        try:
            return worker.make(run)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process with one thread that makes runs one after another; another one takes its place if it dies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stopped = False
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
                if self._stopped:
                    raise
                self._end()
                self._start()
        return {**dataclasses.asdict(run), "status": "failed", "error": f"its worker died {TRIES} times"}

    def stop(self) -> None:
        self._stopped = True
        self._end()

    def _end(self) -> None:
        self._process.terminate()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, folder: Path) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of the terminal; the parent decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
