"""A pool of grading children: each can be killed at any moment, and is replaced."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("worker.py")

START_LIMIT = 60.0
"""Seconds that a child may take to import what it needs; a second on an idle machine."""


GRACE = 1.0
"""Seconds beyond a request's limit after which a child that has not ended it by itself is killed."""


class Child:
    """One grading process and the socket to it.

    The child exits when the socket closes, so also when this process is killed. It is started by
    exec, never by a bare fork: the threads and CUDA state of a training process stay out of it.
    """

    def __init__(self, memory_mb: int) -> None:
        self._channel, theirs = socket.socketpair()
        self._replies = self._channel.makefile("rb")
        self._is_ready = False
        path = os.pathsep.join(entry for entry in sys.path if entry)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(memory_mb)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                process_group=0,
            )

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def wait_until_ready(self) -> bool:
        """Whether the child has graded a known answer right; False where it died, as if somebody had killed it.

        Raises:
            RuntimeError: it did not, so no verdict of it would mean anything.
        """
        if not self._is_ready:
            status, detail, _ = self._exchange(b"", START_LIMIT)
            self._is_ready = status == "ready"
            if status == "timeout":
                raise RuntimeError(f"a grading process did not start within {START_LIMIT:.0f} s")
            if status == "broken":
                self.kill()
                raise RuntimeError(f"a grading process cannot grade: {detail or 'it does not know that 42 is 42'}")
        return self._is_ready

    def ask(self, request: Sequence[Any], seconds: float) -> tuple[str, str, bool]:
        """Status and detail of a request, ``timeout`` and ``died`` among the statuses, and whether it left much memory behind."""
        # ASCII: a lone surrogate in a completion has no bytes of its own.
        return self._exchange(json.dumps([*request, seconds]).encode("ascii") + b"\n", seconds + GRACE)

    def _exchange(self, line: bytes, seconds: float) -> tuple[str, str, bool]:
        self._channel.settimeout(seconds)
        status = "died"
        try:
            self._channel.sendall(line)
            if reply := self._replies.readline():
                return tuple(json.loads(reply))
        except TimeoutError:
            status = "timeout"
        except (OSError, ValueError):  # ValueError: another thread closed the socket
            pass
        self.kill()
        return status, "", False

    def kill(self) -> None:
        """End the child and what it has forked."""
        self._channel.close()
        # In a process forked from its owner the child is nobody's to wait for, and poll takes it for ended.
        if self.is_alive:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Sandbox:
    """Children that answer requests, usable from any thread.

    Args:
        workers: children at most; each is started when it is first needed.
        time_limit: seconds of wall clock that a request may take.
        memory_mb: address space of a child, in MiB.

    ``restarts`` counts the children that were replaced, by reason: ``timeout``, ``died``, ``memory``.
    """

    def __init__(self, workers: int, time_limit: float, memory_mb: int) -> None:
        self._time_limit, self._memory_mb = time_limit, memory_mb
        self.restarts: Counter[str] = Counter()
        self._children: list[Child | None] = [None] * workers
        # Last in, first out: little work keeps few children busy.
        self._free: queue.LifoQueue[int] = queue.LifoQueue()
        for slot in reversed(range(workers)):
            self._free.put(slot)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grading")
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _kill_all, self._children)

    @property
    def pids(self) -> list[int]:
        """Of the children that run."""
        return [child.process.pid for child in self._children if child is not None and child.is_alive]

    def close(self) -> None:
        """End all children; requests under way end as if their child had died."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._finalizer()

    def ask_all(self, requests: Sequence[Sequence[Any]]) -> list[tuple[str, str]]:
        """Status and detail of each request, ``timeout`` and ``error`` among the statuses."""
        if len(requests) == 1:
            return [self.ask(requests[0])]
        return list(self._threads.map(self.ask, requests))

    def ask(self, request: Sequence[Any]) -> tuple[str, str]:
        """Status and detail of a request.

        A request whose child dies is tried once more, with the time it has left: somebody else may have killed it.
        """
        slot = self._free.get()
        try:
            remaining = self._time_limit
            for _ in range(2):
                child = self._living_child(slot)
                started = time.monotonic()
                status, detail, retire = child.ask(request, remaining)
                if retire or status in ("timeout", "died"):
                    self._count("memory" if retire else status)
                if not child.is_alive:
                    self._children[slot] = None
                remaining -= time.monotonic() - started
                if status == "timeout" or (status == "died" and remaining <= 0):
                    return "timeout", f"no verdict within {self._time_limit:g} s"
                if status != "died":
                    return status, detail
            return "error", "its grading process died twice"
        finally:
            self._free.put(slot)

    def _living_child(self, slot: int) -> Child:
        """The living, ready child of a slot."""
        for _ in range(5):
            child = self._children[slot] or Child(self._memory_mb)
            self._children[slot] = child
            if child.is_alive and child.wait_until_ready():
                return child
            self._count("died")
            child.kill()
            self._children[slot] = None
        raise RuntimeError("grading processes die as they start: out of memory, or somebody kills them")

    def _count(self, reason: str) -> None:
        with self._lock:
            self.restarts[reason] += 1


def _kill_all(children: list[Child | None]) -> None:
    for child in children:
        if child is not None:
            child.kill()
