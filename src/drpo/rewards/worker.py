"""The grading child: reads requests, one JSON line each, from the socket at its standard input, and answers each.

It runs as a script of its own, so that it imports neither torch nor this library, and is to be killed without regret.
A request is ``[reference, completion, strict]``, an answer ``[status, detail, retire]``; the first line it sends says
whether it can grade at all. ``retire`` asks to be replaced: a grade left more memory behind than a fresh child needs.

python -P worker.py SECONDS MEGABYTES
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import socket
import sys
from functools import lru_cache
from typing import Any

# Half of the address space a child is given by default; from there on a fresh one is the safer one.
RETIRE_ABOVE_BYTES = 256 << 20


@lru_cache(maxsize=1024)
def parse_reference(reference: str) -> list[Any]:
    """The expressions of a reference answer, with its text last; a group of completions shares one."""
    from math_verify import parse

    delimited = "\\boxed" in reference or "$" in reference.replace("\\$", "")
    text = reference if delimited else f"\\boxed{{{reference}}}"
    return parse(text, parsing_timeout=None) or [reference.strip()]  # type: ignore[arg-type]


def grade(reference: str, completion: str, strict: bool) -> tuple[str, str]:
    """math-verify's verdict on a completion, the last ``\\boxed{}`` before anything else it would take for an answer."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    expressions = parse(
        completion,
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()],
        parsing_timeout=None,  # type: ignore[arg-type]
        raise_on_error=True,
    )
    if not expressions:
        return "no_answer", ""
    same = verify(
        parse_reference(reference),
        expressions,
        # Its tolerances are absolute: with fewer digits 1/30! is 1/31!.
        float_rounding=1000 if strict else 6,
        numeric_precision=1000 if strict else 15,
        timeout_seconds=None,
        raise_on_error=True,
    )
    return ("correct" if same else "wrong"), ""


def answer(request: Any) -> tuple[str, str]:
    try:
        return grade(*request)
    except Exception as error:
        return "error", type(error).__name__


def resident_bytes() -> int:
    """What this process holds in memory; 0 where the system does not say.

    Not getrusage's ru_maxrss: started by exec, a child inherits the maximum of the process that started it.
    """
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def main(seconds: float, megabytes: int) -> None:
    channel = socket.socket(fileno=0)
    resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()
    # The terminal's Ctrl-C is for the parent, whose end closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status, detail = answer(["42", "\\boxed{42}", False])
    # Nothing it is given to read should leave a trace on the disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    channel.sendall(json.dumps(["ready" if status == "correct" else "broken", detail, False]).encode() + b"\n")
    for line in channel.makefile("rb"):
        # The parent kills a child that overruns; should the parent be gone, the kernel does, inside one long
        # multiplication too: the signal keeps its default action.
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        status, detail = answer(json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        retire = resident_bytes() > RETIRE_ABOVE_BYTES
        channel.sendall(json.dumps([status, detail, retire]).encode() + b"\n")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
