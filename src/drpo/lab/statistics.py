"""What the seeds of an arm say together: interquartile means with intervals, and which arm is likelier to be better.

After "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
COLLAPSED_BELOW = 0.5
"""A run has collapsed where its accuracy ends below this share of its best."""


class Estimate(NamedTuple):
    """A value and its percentile bootstrap interval at 95 % over seeds; with one seed the interval is the value."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interquartile_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of the middle half of the last axis; a quarter of the values, in parts where it is none whole, is left out on each side."""
    ordered = np.sort(values, axis=-1)
    size = values.shape[-1]
    ends = np.arange(size + 1) / size
    # The share of each value's place that lies between the quartiles.
    weights = np.clip(np.minimum(ends[1:], 0.75) - np.maximum(ends[:-1], 0.25), 0, None)
    return (ordered * weights).sum(axis=-1) / weights.sum()


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """The interquartile mean over seeds.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("expected the value of at least one seed")
    array = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(interquartile_mean(array[drawn]), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(interquartile_mean(array)), float(low), float(high))


def probability_of_improvement(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Estimate:
    """The probability that a seed of the second arm is better than one of the first; ties count half."""
    ours, theirs = np.asarray(second, dtype=np.float64), np.asarray(first, dtype=np.float64)
    wins = (ours[:, None] > theirs[None, :]) + 0.5 * (ours[:, None] == theirs[None, :])
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(ours), size=(RESAMPLES, len(ours)))
    columns = rng.integers(len(theirs), size=(RESAMPLES, len(theirs)))
    resampled = np.array([wins[np.ix_(r, c)].mean() for r, c in zip(rows, columns, strict=True)])
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(wins.mean()), float(low), float(high))


def area_under(accuracy: Sequence[float]) -> float:
    """The mean accuracy over a run, of its evaluations after the first."""
    return float(np.mean(accuracy[1:]))


def has_collapsed(accuracy: Sequence[float]) -> bool:
    """Whether a run ends below half of its best accuracy."""
    return accuracy[-1] < COLLAPSED_BELOW * max(accuracy)
