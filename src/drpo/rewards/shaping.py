"""Rewards for form rather than truth, and several rewards as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from drpo.rewards.call import awaited, checked_scores, text_of


@dataclass(frozen=True)
class Format:
    r"""1.0 where a regular expression is found in the completion, else 0.0.

    Args:
        pattern: in Python's syntax; ``.`` is any character but a line break unless it says ``(?s)``. It runs in the
            training process: nested repetitions, as in ``(a+)+``, can take for ever on some completions, which ``reward_timeout``
            ends.

    Raises:
        ValueError: a pattern that is none.
    """

    __name__: ClassVar[str] = "format"  # type: ignore[misc]

    pattern: str = r"\\boxed\{[^{}]"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"pattern: got {self.pattern!r}; expected a regular expression ({error})") from error

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(re.search(self.pattern, text_of(completion)) is not None) for completion in completions]


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft penalty on length n: 0 up to limit − buffer, (limit − buffer − n) / buffer from there, −1 beyond the limit.

    arXiv 2503.14476, Eq. 13.

    Args:
        limit: tokens; the cap on completions.
        buffer: tokens before the limit in which the penalty grows.

    Raises:
        ValueError: a limit or a buffer out of range.
    """

    __name__: ClassVar[str] = "overlong"  # type: ignore[misc]

    limit: int
    buffer: int

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.limit:
            raise ValueError(
                f"buffer: got {self.buffer!r}, limit {self.limit!r}; expected 0 < buffer <= limit, in tokens"
            )

    def __call__(self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        free = self.limit - self.buffer
        return [max(min((free - len(ids)) / self.buffer, 0.0), -1.0) for ids in completion_ids]


class Weighted:
    """The weighted sum of several rewards; a completion that one of them leaves out (None) is left out.

    Args:
        parts: rewards and their weights, the one that says whether an answer is right first.
    """

    def __init__(self, parts: Sequence[tuple[Callable[..., Sequence[float | None]], float]]) -> None:
        if not parts:
            raise ValueError("expected at least one reward")
        self.parts = list(parts)
        self.__name__ = "+".join(getattr(reward, "__name__", type(reward).__name__) for reward, _ in self.parts)

    @property
    def correctness(self) -> Callable[..., Sequence[float | None]]:
        """The first part: accuracy is measured by it alone."""
        return self.parts[0][0]

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        scores = [awaited(checked_scores(reward)(completions=completions, **columns)) for reward, _ in self.parts]
        weights = [weight for _, weight in self.parts]
        return [_weighted_sum(row, weights) for row in zip(*scores, strict=True)]


def _weighted_sum(scores: Sequence[float | None], weights: Sequence[float]) -> float | None:
    scored = [score for score in scores if score is not None]
    return sum(w * s for w, s in zip(weights, scored, strict=True)) if len(scored) == len(scores) else None
