"""Time limits on calls of functions that are somebody else's."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")

GRACE = 10.0
"""Seconds that a call gets to end after its limit, and a process to end after its last line."""

_AGAIN = 1.0
"""Seconds between alarms: ``with ThreadPoolExecutor()`` answers the first by waiting for its threads once more."""


class TimeLimitReached(BaseException):
    """Raised within the call. It is not an Exception, which functions catch to go on with their next row."""


# A call stays in the thread it is made from. One in a thread of its own could be left behind, but functions that set
# alarms themselves, as math-verify's do, work in the main thread alone.
@contextmanager
def alarm(seconds: float | None) -> Iterator[None]:
    """Raise TimeLimitReached in what takes longer, whether it computes, sleeps or waits; in the main thread alone.

    Elsewhere nothing can be interrupted: :func:`watchdog` is for that, and for what goes on all the same.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    is_running = True

    def interrupt(*_: Any) -> None:
        if is_running:
            raise TimeLimitReached(_late(seconds))

    handler = signal.signal(signal.SIGALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        is_running = False
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


@contextmanager
def watchdog(seconds: float | None, line: Callable[[str], str]) -> Iterator[None]:
    """End the process, with a line on standard error and exit code 1, ``GRACE`` seconds after the limit of what takes longer.

    Args:
        seconds: None for no limit.
        line: makes the line from what is wrong.
    """
    if seconds is None:
        yield
        return
    timer = _end_of_process(seconds + GRACE, line(_late(seconds)))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


async def within(seconds: float | None, coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns. It is cancelled, and TimeLimitReached raised, where it takes longer."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await coroutine
    except TimeoutError as error:
        if seconds is None or not limit.expired():
            raise
        raise TimeLimitReached(_late(seconds)) from error


def end_at_exit(line: str) -> None:
    """End the process ``GRACE`` seconds after its last statement: Python waits for threads that a failed call left behind."""
    # What is registered with atexit is called when these threads have ended. Executors wait for theirs where this does.
    register: Any = threading._register_atexit  # type: ignore[attr-defined]
    with suppress(RuntimeError):  # the process is ending by now
        register(_end_of_process(GRACE, f"{line}; its threads still run").start)


def _late(seconds: float) -> str:
    return f"took longer than reward_timeout, {seconds:g} s"


def _end_of_process(seconds: float, line: str) -> threading.Timer:
    timer = threading.Timer(seconds, _end_process, [line])
    timer.daemon = True
    return timer


def _end_process(line: str) -> None:
    # What hangs may hold the lock of sys.stderr.
    with suppress(OSError):
        os.write(2, f"error: {line}\n".encode(errors="replace"))
    os._exit(1)
