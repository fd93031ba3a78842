"""What K samples of each problem say about a model; every interval is over problems, which are what differs most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import TypedDict

import torch

RESAMPLES = 10_000
LEVEL = 0.95


class Estimate(TypedDict):
    """A mean over problems and its interval at 95 %."""

    mean: float
    low: float
    high: float


def estimate(per_problem: Sequence[float], seed: int = 0) -> Estimate:
    """The mean over problems with a percentile bootstrap over problems, the same for the same seed.

    Raises:
        ValueError: no problems.
    """
    if not per_problem:
        raise ValueError("expected at least one problem")
    values = torch.tensor(per_problem, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(RESAMPLES, dtype=torch.float64)
    # In pieces: the indices of all resamples at once are gigabytes for a large set.
    for start in range(0, RESAMPLES, 500):
        drawn = torch.randint(len(values), (500, len(values)), generator=generator)
        means[start : start + 500] = values[drawn].mean(dim=1)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = means.quantile(tails).tolist()
    return {"mean": math.fsum(per_problem) / len(per_problem), "low": low, "high": high}


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k samples drawn without replacement is right, 1 − C(n − c, k) / C(n, k) (arXiv 2107.03374)."""
    return float(1 - Fraction(math.comb(samples - correct, k), math.comb(samples, k)))


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Whether the answer most samples give is right; the mean over answers that are tied, 0 where none gives any."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    right = {answer: sum(c for a, c in zip(answers, correct, strict=True) if a == answer) / most for answer in winners}
    return sum(right.values()) / len(winners)


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Estimate:
    """How much better the second is on the same problems: the mean difference, its interval over problems."""
    return estimate([b - a for a, b in zip(first, second, strict=True)], seed)
