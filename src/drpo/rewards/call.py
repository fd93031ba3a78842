"""Calls of reward functions, as TRL's trainer calls them: the text of what they get, and a check of what they return."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import reprlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from drpo.errors import RewardError, UserError
from drpo.rewards.limit import TimeLimitReached, alarm, end_at_exit, watchdog, within

if TYPE_CHECKING:
    from transformers import TrainerState


def text_of(completion: str | Sequence[dict[str, Any]] | None) -> str:
    """The text of a completion, plain or conversational (that of its last message); empty where there is none, as in a tool call."""
    if completion is None or isinstance(completion, str):
        return completion or ""
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""


def scores_of(
    reward: Any,
    prompts: Sequence[Any],
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    answers: Sequence[str],
    state: TrainerState | None = None,
) -> Any:
    """What a reward returns for completions, whatever it is; one that is asynchronous is awaited.

    Args:
        reward: takes columns by name, as TRL's trainer gives them: ``prompts``, ``completions``, ``completion_ids``,
            ``answer``, ``trainer_state``, ``log_extra`` and ``log_metric``.
        prompts: text, or conversations; the completion of a conversation is one too, of one message.
        texts: the completions.
        completion_ids: their tokens.
        answers: the references.
        state: of the trainer, if one is there.
    """
    # Importing Transformers' trainer takes a second, which reading a recipe need not.
    from transformers import TrainerState

    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return awaited(
        reward(
            prompts=list(prompts),
            completions=completions,
            completion_ids=list(completion_ids),
            answer=list(answers),
            trainer_state=state or TrainerState(),
            log_extra=_log_nothing,
            log_metric=_log_nothing,
        )
    )


REWARD_TIMEOUT = 300.0
"""Seconds that a call of a reward function takes in training at most, unless a configuration says otherwise."""

LARGEST_REWARD = 1e9
"""In magnitude. Beyond it fp32 no longer tells rewards apart that differ by less than 64."""


def checked_scores(reward: Any, timeout: float | None = None) -> Callable[..., Any]:
    """A reward function, under its own name and asynchronous if it is, that fails in one line.

    The function returned gives a float or None for each completion. It raises RewardError where the reward raises,
    whatever that is but Ctrl-C, takes longer than ``timeout`` seconds, or returns something else than a list with a
    number of magnitude ``LARGEST_REWARD`` at most, or None, for each. The reward gets lists of its own to change.
    """
    name = _name_of(reward)

    def call(*, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        with _Call(name, completions) as this, watchdog(timeout, this.failure):
            with alarm(timeout):
                scores = awaited(reward(completions=list(completions), **_copies(columns)))
            return this.checked(scores)

    async def call_asynchronous(*, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        with _Call(name, completions) as this, watchdog(timeout, this.failure):
            scores = await within(timeout, reward(completions=list(completions), **_copies(columns)))
            return this.checked(scores)

    function = call_asynchronous if _is_asynchronous(reward) else call
    function.__name__ = name
    return function


class _Call:
    """A context in which a reward function is called: what is raised in it becomes a RewardError, but for Ctrl-C."""

    def __init__(self, name: str, completions: Sequence[Any]) -> None:
        rank = f" on rank {os.environ.get('RANK', '?')}" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        self._prefix = f"reward {name}{rank}"
        self._completions = completions

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: Any, error: BaseException | None, *__: Any) -> None:
        if error is None or isinstance(error, (RewardError, KeyboardInterrupt)):
            return
        line = self.failure(_describe(error))
        end_at_exit(line)
        raise RewardError(line) from error

    def failure(self, problem: str) -> str:
        """A line on what went wrong where no row is known."""
        return f"{self._prefix}: {problem}, in its call for completions 0 to {len(self._completions) - 1}"

    def checked(self, scores: Any) -> list[float | None]:
        """The scores as numbers.

        Raises:
            RewardError: they are not one for each completion, or one is no number, or too large.
        """
        count = len(self._completions)
        scores = _plain(scores)
        if not isinstance(scores, (list, tuple)) or len(scores) != count:
            kind = f"{len(scores)} scores" if isinstance(scores, (list, tuple)) else f"a {type(scores).__name__}"
            raise RewardError(f"{self._prefix}: returned {kind}; expected a list of {count}, one a completion")
        numbers = [None if score is None else _number(score) for score in scores]
        for row, number in enumerate(numbers):
            if number is not None and not abs(number) <= LARGEST_REWARD:
                raise RewardError(
                    f"{self._prefix}: returned {_shown(scores[row])} for completion {row}, "
                    f"{_shown(self._completions[row])}; expected a number of magnitude {LARGEST_REWARD:g} at most, or None"
                )
        return numbers


def awaited(scores: Any) -> Any:
    """The scores, also where the reward is asynchronous."""
    if not inspect.iscoroutine(scores):
        return scores
    # In a thread of its own: a notebook's has a loop already.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, scores).result()


def _log_nothing(name: str, value: Any) -> None:
    """In place of the trainer's ``log_extra`` and ``log_metric``."""


def _name_of(reward: Any) -> str:
    """As TRL names it in its metrics."""
    while isinstance(reward, partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def _is_asynchronous(reward: Any) -> bool:
    """As TRL has it, which awaits these in an event loop of its own."""
    while isinstance(reward, partial):
        reward = reward.func
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(reward.__call__)


def _copies(columns: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in columns.items()}


def _plain(scores: Any) -> Any:
    """Arrays and tensors as lists, their scalars as Python's numbers."""
    return scores.tolist() if hasattr(scores, "tolist") else scores


def _number(score: Any) -> float:
    """A score as a number; NaN where it is none, such as text, or none that a float can hold."""
    score = _plain(score)
    try:
        return float(score) if hasattr(score, "__float__") else math.nan
    except Exception:
        return math.nan


def _shown(value: Any) -> str:
    """A value in few characters, also where it has no text, as integers of more than 4300 digits."""
    try:
        return reprlib.repr(_plain(value))
    except Exception:
        return f"a {type(value).__name__}"


def _describe(error: BaseException) -> str:
    """An error by its type and the beginning of its text, if it has one that can be had."""
    try:
        text = str(error)[:500]
    except BaseException:
        text = ""
    own = isinstance(error, (TimeLimitReached, UserError))
    return text if own else f"{type(error).__name__}: {text}" if text else type(error).__name__
