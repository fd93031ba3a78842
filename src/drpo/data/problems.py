"""A problem, the tokens that a model is asked it in, and the problems of the built-in task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo.data.arithmetic import MODEL_PATH, Split, sample_prompts

BUILTIN_TASKS = ("arithmetic",)
BUILTIN_MODELS: dict[str, Path] = {"arithmetic": MODEL_PATH}


@dataclass(frozen=True)
class Problem:
    """A problem with a verifiable answer.

    Args:
        prompt: the text that the model sees.
        answer: the reference that its answer is scored against, as text.
        source: the data set that the problem is from.
        id: its name within the data set.
    """

    prompt: str
    answer: str
    source: str = ""
    id: str = ""


def as_prompt(problem: Problem, tokenizer: Any) -> Any:
    """The prompt as TRL takes it: a conversation if the tokenizer has a chat template, else text."""
    return [{"role": "user", "content": problem.prompt}] if tokenizer.chat_template else problem.prompt


def tokenize_prompt(problem: Problem, tokenizer: Any, **chat_template_kwargs: Any) -> list[int]:
    """The tokens of the prompt, with what the chat template puts around it and what it begins the answer with."""
    prompt = as_prompt(problem, tokenizer)
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **chat_template_kwargs)[
        "input_ids"
    ]


def builtin_problems(split: Split, size: int, seed: int) -> list[Problem]:
    """``size`` distinct problems of the built-in task, the same for the same seed."""
    return [Problem(prompt, str(totals[-1])) for prompt, totals in sample_prompts(split, size, seed).items()]
