"""Time as a ratio and memory as a peak, of functions that do the same work."""

from __future__ import annotations

import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

Work = Callable[[], object]
MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of glibc's ``mallopt``."""


def seconds(work: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    """Times of each function, in rounds that call all of them in turn: what slows the machine slows them alike."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for function in work.values():
        _timed(function)
    names = list(work)
    for round_ in range(rounds):
        # Each is the first of a round as often as the others.
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_timed(work[name]))
    return times


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Within this context so many processes keep a core busy each, if the machine has it."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ratio(times: list[float], reference: list[float]) -> float:
    """The median over rounds of one function's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def peak_bytes(work: Work) -> int:
    """Memory that a call takes at its peak beyond what is there before it, what it leaves behind included.

    Of the GPU if there is one, else of the process: Linux alone resets and reports its peak. From then on the
    process takes all large memory anew, so times are to be measured before.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Freed memory that malloc keeps would be taken again unseen: what is large is to come from the system and go back.
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 2**16)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def synchronize() -> None:
    """Wait for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(function: Work) -> float:
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began
