"""Tasks: those that a small model is taught, with filler tokens that are mostly rare, and one that a real model half knows."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from string import ascii_lowercase

from drpo.data import addition
from drpo.data.arithmetic import noisy_totals, sample_prompt
from drpo.data.problems import Problem
from drpo.data.split import Split, draw

FILLERS = [
    f"<{first}{second}{third}>" for first in ascii_lowercase for second in ascii_lowercase for third in ascii_lowercase
][:1000]
"""Tokens without a meaning. The one of rank k is drawn with a probability proportional to 1/k (Zipf's law)."""

_CUMULATIVE = list(accumulate(1 / rank for rank in range(1, len(FILLERS) + 1)))


@dataclass(frozen=True)
class Exercise:
    """A problem and what a solution of it is made from.

    Args:
        prompt: the text that the model sees.
        answer: what follows the last comma of a right solution.
        steps: for :meth:`drpo.lab.tasks.TaughtTask.solution`.
    """

    prompt: str
    answer: str
    steps: Sequence[int] = ()


class Task(ABC):
    """A family of problems.

    The reward is :func:`drpo.rewards.exact_answer`: what follows a completion's last comma has to be the answer.

    Attributes:
        name: in settings.
        longest: tokens that a solution has at most.
    """

    name: str
    longest: int

    @abstractmethod
    def sample(self, rng: random.Random) -> Exercise:
        """Draw an exercise."""

    def problems(self, split: Split, size: int, seed: int) -> list[Problem]:
        """Draw distinct problems, whose questions are of one split; the same for the same seed."""

        def sample(rng: random.Random) -> tuple[str, str]:
            exercise = self.sample(rng)
            return exercise.prompt, exercise.answer

        drawn = draw(sample, split, size, f"{self.name}-{split}-{seed}")
        return [Problem(prompt, answer) for prompt, answer in drawn.items()]


class TaughtTask(Task):
    """A task that a model can be taught to solve unreliably.

    Attributes:
        batches: that a base model is taught for.
    """

    batches: int

    @abstractmethod
    def solution(self, exercise: Exercise, rng: random.Random, error_rate: float) -> list[str]:
        """The steps of a solution as text, each wrong with probability ``error_rate`` and carried on from."""

    def write(self, exercise: Exercise, rng: random.Random, error_rate: float) -> str:
        """A solution with a filler before every other step."""
        steps = self.solution(exercise, rng, error_rate)
        return ",".join(
            step if number % 2 else rng.choices(FILLERS, cum_weights=_CUMULATIVE)[0] + step
            for number, step in enumerate(steps)
        )


class Arithmetic(TaughtTask):
    """Chained additions and subtractions: ``17+25-8+34=`` solved as ``<aab>42,34,68``."""

    name = "arithmetic"
    longest = 20
    batches = 600

    def sample(self, rng: random.Random) -> Exercise:
        prompt, totals = sample_prompt(rng)
        return Exercise(prompt, str(totals[-1]), totals)

    def solution(self, exercise: Exercise, rng: random.Random, error_rate: float) -> list[str]:
        return [str(total) for total in noisy_totals(list(exercise.steps), rng, error_rate)]


class Sorting(TaughtTask):
    """Insertion sort written out: ``52 17 83 4=`` solved as ``<aab>17 52,17 52 83,<aaq>4 17 52 83``."""

    name = "sorting"
    longest = 60
    batches = 2000
    numbers = 5

    def sample(self, rng: random.Random) -> Exercise:
        numbers = [rng.randint(0, 99) for _ in range(self.numbers)]
        return Exercise(_joined(numbers) + "=", _joined(sorted(numbers)), numbers)

    def solution(self, exercise: Exercise, rng: random.Random, error_rate: float) -> list[str]:
        first, *others = exercise.steps
        ordered, written = [first], []
        for number in others:
            place = next((index for index, other in enumerate(ordered) if other > number), len(ordered))
            if rng.random() < error_rate:
                place = rng.choice([index for index in range(len(ordered) + 1) if index != place])
            ordered = [*ordered[:place], number, *ordered[place:]]
            written.append(_joined(ordered))
        return written


class Addition(Task):
    """Sums of two numbers after four examples, a line each: ``7+12=`` solved as ``19``."""

    name = "addition"
    longest = 4

    def sample(self, rng: random.Random) -> Exercise:
        return Exercise(*addition.sample_prompt(rng))


def _joined(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


TASKS: dict[str, Task] = {task.name: task for task in (Arithmetic(), Sorting(), Addition())}
