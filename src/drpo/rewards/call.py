"""Calls of reward functions, as TRL's trainer calls them: the text of what they get, and a check of what they return."""

from __future__ import annotations

import asyncio
import inspect
import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

from drpo.errors import UserError

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


def checked_scores(reward: Any) -> Callable[..., Any]:
    """A reward function, under its own name and asynchronous if it is, that fails in one line.

    The function raises UserError where the reward raises, or gives something else than a finite number or None for
    each completion, or None for all.
    """
    name = getattr(reward, "__name__", type(reward).__name__)

    @contextmanager
    def failing_in_one_line() -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"reward {name}: {type(error).__name__}: {error}") from error

    def checked(completions: Sequence[Any], scores: Any) -> list[float | None]:
        scores = scores.tolist() if hasattr(scores, "tolist") else scores
        if not isinstance(scores, (list, tuple)) or len(scores) != len(completions):
            kind = f"{len(scores)} scores" if isinstance(scores, (list, tuple)) else f"a {type(scores).__name__}"
            raise UserError(f"reward {name}: returned {kind}; expected a list of {len(completions)}, one a completion")
        for row, (completion, score) in enumerate(zip(completions, scores, strict=True)):
            if score is not None and not (isinstance(score, Real) and math.isfinite(score)):
                raise UserError(
                    f"reward {name}: returned {score!r} for completion {row}, {reprlib.repr(completion)}; "
                    "expected a finite number or None"
                )
        if scores and all(score is None for score in scores):
            raise UserError(f"reward {name}: returned None for all {len(scores)} completions; expected some numbers")
        return list(scores)

    def call(*, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        with failing_in_one_line():
            return checked(completions, reward(completions=completions, **columns))

    async def call_asynchronous(*, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        with failing_in_one_line():
            return checked(completions, await reward(completions=completions, **columns))

    function = call_asynchronous if inspect.iscoroutinefunction(reward) else call
    function.__name__ = name
    return function


def awaited(scores: Any) -> Any:
    """The scores, also where the reward is asynchronous."""
    if not inspect.iscoroutine(scores):
        return scores
    # In a thread of its own: a notebook's has a loop already.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, scores).result()


def _log_nothing(name: str, value: Any) -> None:
    """In place of the trainer's ``log_extra`` and ``log_metric``."""
