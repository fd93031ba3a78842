"""Standard output for the findings alone."""

from __future__ import annotations

import atexit
import ctypes
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress

_STDOUT = 1


@contextmanager
def nothing_on_stdout() -> Iterator[None]:
    """What anything else says on standard output goes nowhere: Python, C libraries, and subprocesses that inherit it."""
    _flush()
    try:
        kept = os.dup(_STDOUT)
    except OSError:  # there is none, as after `>&-`
        kept = None
    else:
        _discard()
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        # Before it is given back: what waits in a buffer would come out there.
        _flush()
        if kept is not None:
            os.dup2(kept, _STDOUT)
            os.close(kept)


def nothing_more_on_stdout() -> None:
    """The same for what is said at exit. Call it last: functions that were registered later run earlier."""

    def end() -> None:
        _flush()
        _discard()

    atexit.register(end)


def _discard() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDOUT)
    os.close(nowhere)


def _flush() -> None:
    """Python's buffers and C's."""
    for stream in (sys.stdout, sys.__stdout__):
        # One that was closed, or whose reader has gone.
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
    with suppress(OSError, AttributeError):  # not where a process does not export its C library
        ctypes.CDLL(None).fflush(None)
