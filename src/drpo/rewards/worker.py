"""The grading child: reads requests, one JSON line each, from the socket at its standard input, and answers each.

It runs as a script of its own, so that it imports neither torch nor this library. What it forks grades, and is to be
killed without regret: it takes milliseconds to fork another, and a second to import math-verify.
A request is ``[reference, completion, strict, seconds]``, an answer ``[status, detail, retire]``; the first line it
sends says whether it can grade at all. ``retire`` says that a grade left more memory behind than a fresh process needs.

python -P worker.py MEGABYTES
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from functools import lru_cache
from io import BufferedRWPair
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


def line(status: str, detail: str = "", retire: bool = False) -> bytes:
    return json.dumps([status, detail, retire]).encode() + b"\n"


def serve(channel: socket.socket) -> None:
    """Answer requests until one has left much memory behind."""
    for request in channel.makefile("rb"):
        *arguments, seconds = json.loads(request)
        # The signal keeps its default action, by which the kernel ends one long multiplication too.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        status, detail = answer(arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        retire = resident_bytes() > RETIRE_ABOVE_BYTES
        channel.sendall(line(status, detail, retire))
        if retire:
            return


def fork_grader() -> tuple[int, BufferedRWPair]:
    """A process that serves, and the file to talk to it."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        with ours:
            return pid, ours.makefile("rwb")
    try:
        ours.close()
        # With this process alone at its socket, the library sees at once when it dies.
        os.close(0)
        serve(theirs)
    finally:
        os._exit(0)


def ask(grader: BufferedRWPair, request: bytes) -> bytes:
    """The answer to a request; empty where the grader died."""
    try:
        grader.write(request)
        grader.flush()
        return grader.readline()
    except OSError:
        return b""


def main(megabytes: int) -> None:
    channel = socket.socket(fileno=0)
    resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()
    # The terminal's Ctrl-C is for the parent, whose end closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status, detail = answer(["42", "\\boxed{42}", False])
    # Nothing it is given to read should leave a trace on the disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # What a collection in a fork does not look at stays shared.
    gc.freeze()
    channel.sendall(line("ready" if status == "correct" else "broken", detail))
    pid, grader = fork_grader()
    for request in channel.makefile("rb"):
        reply = ask(grader, request)
        if not reply or json.loads(reply)[2]:
            _, ended = os.waitpid(pid, 0)
            overran = os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGALRM
            reply = reply or line("timeout" if overran else "died")
            pid, grader = fork_grader()
        channel.sendall(reply)


if __name__ == "__main__":
    main(int(sys.argv[1]))
