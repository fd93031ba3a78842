"""A problem, the tokens that a model is asked it in, and the problems of the built-in task."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo.data import addition
from drpo.data.arithmetic import MODEL_PATH, sample_prompts
from drpo.data.split import Split, draw
from drpo.errors import UserError

BUILTIN_MODELS: dict[str, Path] = {"arithmetic": MODEL_PATH}


Message = dict[str, str]
"""What a ``role``, such as system, user or assistant, says: its ``content``."""


@dataclass(frozen=True)
class Problem:
    """A problem with a verifiable answer.

    Args:
        prompt: the text that the model sees; of a conversation, its last message, which is the user's.
        answer: the reference that its answer is scored against, as text.
        source: the data set that the problem is from.
        id: its name within the data set.
        context: the messages of a conversation before the prompt, such as a system prompt and examples.
    """

    prompt: str
    answer: str
    source: str = ""
    id: str = ""
    context: tuple[Message, ...] = ()

    @property
    def messages(self) -> list[Message]:
        """The conversation that asks for the answer."""
        return [*self.context, {"role": "user", "content": self.prompt}]

    def as_row(self) -> dict[str, Any]:
        """As a row of a file of problems."""
        prompt = self.messages if self.context else self.prompt
        return {"prompt": prompt, "answer": self.answer, "source": self.source, "id": self.id}


def as_prompt(problem: Problem, tokenizer: Any) -> Any:
    """The prompt as TRL takes it: a conversation if the tokenizer has a chat template, else text.

    Raises:
        UserError: the problem is a conversation and the tokenizer has none.
    """
    if tokenizer.chat_template:
        return problem.messages
    if problem.context:
        raise UserError(
            f"the prompt {reprlib.repr(problem.prompt)} is the end of a conversation, for which the model has no chat template; "
            "expected a model with one, or prompts that are text"
        )
    return problem.prompt


def tokenize_prompt(problem: Problem, tokenizer: Any, **chat_template_kwargs: Any) -> list[int]:
    """The tokens of the prompt, with what the chat template puts around it and what it begins the answer with."""
    prompt = as_prompt(problem, tokenizer)
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **chat_template_kwargs)[
        "input_ids"
    ]


def refuse_longer_prompts(
    problems: Sequence[Problem],
    tokenizer: Any,
    positions: int | None,
    completion: int,
    field: str,
    chat_template_kwargs: Mapping[str, Any],
) -> None:
    """Refuse a prompt that leaves a model less positions than a completion may take; training would go on beyond them, quietly.

    Args:
        positions: of the model; None for any number.
        completion: tokens of the longest completion.
        field: where the problems are from, for messages.
        chat_template_kwargs: what the chat template is told.

    Raises:
        UserError: naming the first such problem.
    """
    if positions is None:
        return
    around = len(tokenize_prompt(Problem("0", ""), tokenizer, **chat_template_kwargs))
    for number, problem in enumerate(problems, 1):
        # A token is a byte at least: most prompts need no tokens to be short enough, with what a chat template adds.
        size = sum(len(message["content"].encode()) for message in problem.messages)
        if 2 * size + around * len(problem.messages) + completion < positions:
            continue
        tokens = len(tokenize_prompt(problem, tokenizer, **chat_template_kwargs))
        if tokens + completion > positions:
            raise UserError(
                f"{field}: the prompt of problem {number}, {reprlib.repr(problem.prompt)}, has {tokens:,} tokens, which with "
                f"max_completion_length {completion:,} are more than the model's {positions:,} positions; expected "
                f"prompts of at most {max(1, positions - completion):,} tokens, or a smaller max_completion_length"
            )


def _arithmetic(split: Split, size: int, seed: int) -> dict[str, str]:
    return {prompt: str(totals[-1]) for prompt, totals in sample_prompts(split, size, seed).items()}


def _addition(split: Split, size: int, seed: int) -> dict[str, str]:
    return draw(addition.sample_prompt, split, size, f"addition-{split}-{seed}")


BUILTIN_TASKS: dict[str, Callable[[Split, int, int], dict[str, str]]] = {
    "arithmetic": _arithmetic,
    "addition": _addition,
}
"""Tasks whose problems are made on the spot: prompts and answers, from split, number and seed."""


def builtin_problems(split: Split, size: int, seed: int, task: str = "arithmetic") -> list[Problem]:
    """``size`` distinct problems of a built-in task, the same for the same seed."""
    return [Problem(prompt, answer) for prompt, answer in BUILTIN_TASKS[task](split, size, seed).items()]
