"""A reward outside the trainer, asked as TRL's trainer asks it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerState


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


def awaited(scores: Any) -> Any:
    """The scores, also where the reward is asynchronous."""
    if not inspect.iscoroutine(scores):
        return scores
    # In a thread of its own: a notebook's has a loop already.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, scores).result()


def _log_nothing(name: str, value: Any) -> None:
    """In place of the trainer's ``log_extra`` and ``log_metric``."""
