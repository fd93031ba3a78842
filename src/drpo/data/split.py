"""Problems that are made on the spot: distinct ones of a split, the same for the same seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Literal, TypeVar

Split = Literal["train", "heldout"]

T = TypeVar("T")


def split_of(question: str) -> Split:
    """The split a question belongs to: a hash of its text decides, so that none can be in both."""
    return "heldout" if hashlib.sha256(question.encode()).digest()[0] < 32 else "train"


def draw(sample: Callable[[random.Random], tuple[str, T]], split: Split, size: int, seed: str) -> dict[str, T]:
    """Draw distinct prompts whose questions, their last lines, are of one split.

    Args:
        sample: draws a prompt, with what belongs to it.
        size: how many prompts; not more than there are.
        seed: of the draw.
    """
    rng = random.Random(seed)
    drawn: dict[str, T] = {}
    while len(drawn) < size:
        prompt, value = sample(rng)
        if split_of(prompt.rpartition("\n")[2]) == split:
            drawn[prompt] = value
    return drawn
