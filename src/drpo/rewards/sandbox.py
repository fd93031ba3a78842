"""A pool of grading children: each can be killed at any moment, and is replaced."""

from __future__ import annotations

import json
import os
import queue
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


class Child:
    """One grading process and the socket to it.

    The child exits when the socket closes, so also when this process is killed. It is started by
    exec, never by a bare fork: the threads and CUDA state of a training process stay out of it.
    """

    def __init__(self, time_limit: float, memory_mb: int) -> None:
        self._channel, theirs = socket.socketpair()
        self._ready = False
        self._received = b""
        path = os.pathsep.join(entry for entry in sys.path if entry)
        command = [sys.executable, "-P", str(_SCRIPT), str(time_limit), str(memory_mb)]
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def wait_until_ready(self) -> None:
        """Return once the child has graded a known answer right.

        Raises:
            RuntimeError: it did not, so no verdict of it would mean anything.
            EOFError: it died, as if somebody had killed it.
        """
        if self._ready:
            return
        try:
            status, detail, _ = self._receive(time.monotonic() + START_LIMIT)
        except TimeoutError as error:
            raise RuntimeError(f"a grading process did not start within {START_LIMIT:.0f} s") from error
        if status != "ready":
            raise RuntimeError(f"a grading process cannot grade: {detail or 'it does not know that 42 is 42'}")
        self._ready = True

    def ask(self, request: Sequence[Any], seconds: float) -> list[Any]:
        """The answer to a request, within so many seconds.

        Raises:
            TimeoutError: none in time.
            EOFError: the child died.
        """
        deadline = time.monotonic() + seconds
        self._channel.settimeout(seconds)
        try:
            # ASCII: a lone surrogate in a completion has no bytes of its own.
            self._channel.sendall(json.dumps(request).encode("ascii") + b"\n")
        except TimeoutError:
            raise
        except OSError as error:
            raise EOFError from error
        return self._receive(deadline)

    def _receive(self, deadline: float) -> list[Any]:
        while b"\n" not in self._received:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._channel.settimeout(remaining)
            try:
                chunk = self._channel.recv(4096)
            except TimeoutError:
                raise
            except OSError as error:
                raise EOFError from error
            if not chunk:
                raise EOFError
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        self._channel.close()
        self.process.kill()
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
                child = self._child(slot)
                started = time.monotonic()
                try:
                    status, detail, retire = child.ask(request, remaining)
                except TimeoutError:
                    self._replace(slot, "timeout")
                    return "timeout", f"no verdict within {self._time_limit:g} s"
                except EOFError:
                    self._replace(slot, "died")
                    remaining -= time.monotonic() - started
                    if remaining <= 0:
                        return "timeout", f"no verdict within {self._time_limit:g} s"
                else:
                    if retire:
                        self._replace(slot, "memory")
                    return status, detail
            return "error", "its grading process died twice"
        finally:
            self._free.put(slot)

    def _child(self, slot: int) -> Child:
        """The living, ready child of a slot."""
        for _ in range(5):
            child = self._children[slot] or self._start(slot)
            if not child.is_alive:
                child = self._replace(slot, "died")
            try:
                child.wait_until_ready()
            except EOFError:
                self._replace(slot, "died")
                continue
            except RuntimeError:
                child.kill()
                raise
            return child
        raise RuntimeError("grading processes die as they start: out of memory, or somebody kills them")

    def _replace(self, slot: int, reason: str) -> Child:
        with self._lock:
            self.restarts[reason] += 1
        child = self._children[slot]
        if child is not None:
            child.kill()
        return self._start(slot)

    def _start(self, slot: int) -> Child:
        child = self._children[slot] = Child(self._time_limit, self._memory_mb)
        return child


def _kill_all(children: list[Child | None]) -> None:
    # In a process forked from their owner this lets go of them: Popen signals nothing that is not its child.
    for child in children:
        if child is not None:
            child.kill()
