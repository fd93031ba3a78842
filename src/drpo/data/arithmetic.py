"""The built-in task: chained additions and subtractions, solved one running total at a time.

A problem is a prompt such as ``17+25-8+34=``; a solution writes the running total after every
operation, ``42,34,68``, and its last number is the answer.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

MODEL_PATH = Path(__file__).parent / "arithmetic_model"
"""The model pretrained on this task (Qwen3 architecture, character tokenizer), made by ``scripts/pretrain_arithmetic.py``."""


@dataclass(frozen=True)
class Problem:
    """A prompt and the running totals that solve it; the last one is the answer."""

    prompt: str
    totals: tuple[int, ...]

    @property
    def answer(self) -> str:
        return str(self.totals[-1])

    @property
    def solution(self) -> str:
        return ",".join(map(str, self.totals))


TERMS = 5
LARGEST_TERM = 49
LARGEST_TOTAL = 99


def sample_problem(rng: random.Random) -> Problem:
    """Draw a problem of ``TERMS`` terms whose running totals all lie in [0, LARGEST_TOTAL]."""
    total = rng.randint(1, LARGEST_TERM)
    prompt, totals = str(total), []
    for _ in range(TERMS - 1):
        operand = rng.randint(1, LARGEST_TERM)
        signs = [sign for sign in (1, -1) if 0 <= total + sign * operand <= LARGEST_TOTAL]
        sign = rng.choice(signs)
        total += sign * operand
        prompt += f"{'+' if sign > 0 else '-'}{operand}"
        totals.append(total)
    return Problem(prompt + "=", tuple(totals))


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to: a hash of its text decides, so no prompt can be in both."""
    return "heldout" if hashlib.sha256(prompt.encode()).digest()[0] < 32 else "train"


def sample_problems(split: Split, size: int, seed: int) -> list[Problem]:
    """``size`` distinct problems of a split, the same for the same seed."""
    rng = random.Random(f"{split}-{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < size:
        problem = sample_problem(rng)
        if split_of(problem.prompt) == split:
            problems[problem.prompt] = problem
    return list(problems.values())
