"""Mathematical answers graded by math-verify, in processes that can be killed."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from drpo.rewards.answers import assigned, final_answer, is_percentage, is_relation, is_same_literal, number, readable
from drpo.rewards.call import text_of
from drpo.rewards.sandbox import Sandbox

logger = logging.getLogger(__name__)

Status = Literal["correct", "wrong", "no_answer", "timeout", "error"]
STATUSES: tuple[Status, ...] = get_args(Status)

_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,14}")
_CLOCK = re.compile(r"[0-9]:[0-9]")
_BOX = re.compile(r"\\boxed\{(-?[0-9]+)\}")


@dataclass(frozen=True)
class Grade:
    """What came of one completion.

    Args:
        status: ``correct``, ``wrong``, ``no_answer`` (none was found in it), ``timeout``, or ``error``
            (math-verify failed on it, or its process died under it twice).
        score: the reward; None where the completion is to be left out.
        detail: of a timeout or an error, what happened.
    """

    status: Status
    score: float | None
    detail: str = ""


@dataclass(eq=False)
class MathGrader:
    r"""Grades completions against reference answers; a reward function for TRL as it stands.

    math-verify compares them, in child processes that are killed when they overrun and replaced when they
    die; usable from any thread. By default the verdict is math-verify's own, with ``\boxed{}`` looked for before
    anything else that could be an answer. It is lenient: see docs/math.md. With ``strict`` the answer has to stand
    in the last ``\boxed{}`` or after ``Answer:``, a reference that is a number is met by a number of exactly that
    value only, a percentage by a percentage, a relation by a relation, and a decimal is no approximation.

    Only ``correct`` (1.0) and ``wrong`` (0.0) are scores. What the other three become is a setting; None leaves the
    completion out of its group's baseline, as TRL and DRPOTrainer do with a reward that is None.

    Args:
        strict: as above.
        no_answer: score of a completion without an answer.
        timeout: score of a completion that math-verify does not finish in time; the completion is what makes it slow.
        error: score of a completion that cannot be graded.
        time_limit: seconds of wall clock for one completion, all of it.
        memory_mb: address space of a child, in MiB.
        max_chars: completions are cut to their last so many characters, where the answer is.
        workers: children at most; by default one for each core, four at most, shared among the ranks of a machine.

    Raises:
        ValueError: a setting out of range.
    """

    strict: bool = False
    no_answer: float | None = 0.0
    timeout: float | None = 0.0
    error: float | None = None
    time_limit: float = 3.0
    memory_mb: int = 512
    max_chars: int = 4096
    workers: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.time_limit <= 3600:
            raise ValueError(f"time_limit: got {self.time_limit!r}; expected seconds, more than 0 and at most 3600")
        for name in ("no_answer", "timeout", "error"):
            score = getattr(self, name)
            if score is not None and (not isinstance(score, (int, float)) or not math.isfinite(score)):
                raise ValueError(f"{name}: got {score!r}; expected a finite number, or None")
        for name, least in (("memory_mb", 128), ("max_chars", 1), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: got {value!r}; expected at least {least}")
        self.__name__ = "math_strict" if self.strict else "math"
        self.counts: Counter[Status] = Counter()
        self._lock = threading.Lock()
        self._sandbox: Sandbox | None = None
        self._sandbox_pid = 0

    def __reduce__(self) -> tuple[type[MathGrader], tuple[Any, ...]]:
        # Children stay with the process that started them.
        return MathGrader, tuple(getattr(self, field.name) for field in fields(self))

    @property
    def restarts(self) -> Counter[str]:
        """Children that were replaced, by reason: ``timeout``, ``died``, ``memory``."""
        return self._sandbox.restarts.copy() if self._sandbox else Counter()

    @property
    def pids(self) -> list[int]:
        """Of the grading processes that run."""
        return self._sandbox.pids if self._sandbox else []

    def close(self) -> None:
        """End the grading processes; the next completion that needs one starts them anew."""
        with self._lock:
            sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.close()

    def grade(self, completions: Sequence[Any], answers: Sequence[str]) -> list[Grade]:
        """A grade for each completion, text or a conversation, against its own reference answer.

        Raises:
            ValueError: the numbers of answers and completions differ, or an answer that is empty or not text.
            RuntimeError: the grading processes cannot start or cannot grade.
        """
        grades: dict[int, Grade] = {}
        requests: dict[int, tuple[str, str, bool]] = {}
        for row, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            if not isinstance(answer, str) or not answer.strip():
                raise ValueError(f"answer {row} is {answer!r}; expected text")
            reference = answer.rpartition("####")[2].strip() or answer
            decided = self._decide(_end(text_of(completion), self.max_chars), reference)
            if isinstance(decided, tuple):
                requests[row] = decided
            else:
                grades[row] = self._grade(decided)
        if requests:
            answered = self._running_sandbox().ask_all(list(requests.values()))
            for row, (status, detail) in zip(requests, answered, strict=True):
                grades[row] = self._grade(status, detail)  # type: ignore[arg-type]
        self._count(list(grades.values()))
        return [grades[row] for row in range(len(completions))]

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[str] | None = None,
        solution: Sequence[str] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """The scores of completions, as TRL asks for them.

        Args:
            answer: the reference answers; ``solution``, TRL's name for them, is taken too.
            log_metric: given by TRL; the shares of the statuses go to its log.
        """
        references = answer if answer is not None else solution
        if references is None:
            raise ValueError("no reference answers: expected a column 'answer' or 'solution' in the dataset")
        grades = self.grade(completions, references)
        if log_metric is not None and grades:
            for status in STATUSES:
                log_metric(f"{self.__name__}/{status}", sum(grade.status == status for grade in grades) / len(grades))
        return [grade.score for grade in grades]

    def _decide(self, text: str, reference: str) -> Status | tuple[str, str, bool]:
        """The status of a completion where plain text tells it, else what to ask a child."""
        text, reference = readable(text), readable(reference)
        answer = final_answer(text)
        # math-verify fails on 12:00.
        if not self.strict and not (answer and _CLOCK.search(reference)):
            return _same_plain_integer(text, reference) or (reference, text, False)
        if answer is None:
            return "no_answer"
        same = is_same_literal(answer, reference)
        if same is not None:
            return "correct" if same else "wrong"
        if is_percentage(answer) != is_percentage(reference):
            return "wrong"
        if is_relation(answer) != is_relation(reference):
            answer, reference = assigned(answer), assigned(reference)
        if is_relation(answer) != is_relation(reference):
            return "wrong"
        expected = number(reference)
        if expected is not None:
            return "correct" if number(answer) == expected else "wrong"
        return reference, f"\\boxed{{{answer}}}", True

    def _grade(self, status: Status, detail: str = "") -> Grade:
        if status in ("correct", "wrong"):
            return Grade(status, float(status == "correct"))
        return Grade(status, getattr(self, status), detail)

    def _count(self, grades: Sequence[Grade]) -> None:
        with self._lock:
            self.counts.update(grade.status for grade in grades)
        failed = [grade for grade in grades if grade.status in ("timeout", "error")]
        if failed:
            reasons = Counter(f"{grade.status} ({grade.detail})" for grade in failed)
            kinds = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            logger.warning("%s: of %d completions %s", self.__name__, len(grades), kinds)

    def _running_sandbox(self) -> Sandbox:
        with self._lock:
            # A process forked from this one has neither the threads nor a claim on the children.
            if self._sandbox is None or self._sandbox_pid != os.getpid():
                self._sandbox = Sandbox(self.workers or _default_workers(), self.time_limit, self.memory_mb)
                self._sandbox_pid = os.getpid()
            return self._sandbox


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _end(text: str, size: int) -> str:
    """The last so many characters, less the rest of a word that is cut, or of a number: of −42 the 42 is another one."""
    text = text.rstrip()
    if len(text) <= size:
        return text
    end = text[-size:]
    word = re.match(r"\S*(?=\s)", end) or re.match(r"[-−+0-9.,/]*", end)
    return end[word.end() :] if word else end


def _same_plain_integer(text: str, reference: str) -> Status | None:
    r"""The verdict on a completion whose only box holds an integer, for a reference that is one; None for any other.

    It is math-verify's: with one box there is nothing to choose from and two integers are compared.
    """
    if text.count("\\boxed") != 1 or not _PLAIN_INTEGER.fullmatch(reference) or "hope" in text.lower():
        return None
    box = _BOX.search(text)
    if box is None or not _PLAIN_INTEGER.fullmatch(box[1]):
        return None
    return "correct" if box[1] == reference else "wrong"
