"""Prompts with verifiable answers: the built-in arithmetic, and JSON Lines files."""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo.data.arithmetic import MODEL_PATH, Split, sample_problems
from drpo.errors import UserError
from drpo.registry import unknown_name

BUILTIN_TASKS = ("arithmetic",)
BUILTIN_MODELS: dict[str, Path] = {"arithmetic": MODEL_PATH}


@dataclass(frozen=True)
class Problem:
    """What the model is asked, and the reference its answer is scored against."""

    prompt: str
    answer: str


def as_prompt(problem: Problem, tokenizer: Any) -> Any:
    """The prompt as TRL takes it: a conversation if the tokenizer has a chat template, else text."""
    return [{"role": "user", "content": problem.prompt}] if tokenizer.chat_template else problem.prompt


def prompt_ids(problem: Problem, tokenizer: Any, **template_options: Any) -> list[int]:
    """The tokens of the prompt, with what the chat template puts around it and to begin the answer."""
    prompt = as_prompt(problem, tokenizer)
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **template_options)
    return rendered["input_ids"]


def builtin_problems(split: Split, size: int, seed: int) -> list[Problem]:
    """``size`` distinct problems of the built-in task, the same for the same seed."""
    return [Problem(p.prompt, p.answer) for p in sample_problems(split, size, seed)]


def read_problems(path: Path, *, prompt: str, answer: str, template: str) -> list[Problem]:
    """The problems of a JSON Lines file.

    Args:
        path: one JSON object a line.
        prompt: the field that holds the question.
        answer: the field that holds the reference answer, text or a number.
        template: the text the model sees, with ``{prompt}`` where the question goes.

    Raises:
        UserError: a file that cannot be read or a row without those fields, by file and row.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: expected a .jsonl file (one JSON object a line) or one of {', '.join(BUILTIN_TASKS)}")
    problems = []
    try:
        with path.open("rb") as lines:
            for row, line in enumerate(lines, 1):
                if line.strip():
                    problems.append(_read_row(line, f"{path}, row {row}", prompt, answer, template))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not problems:
        raise UserError(f"{path}: has no rows; expected one JSON object a line")
    return problems


def _read_row(line: bytes, where: str, prompt: str, answer: str, template: str) -> Problem:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON in UTF-8 ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: is a {type(record).__name__}; expected an object")
    for field in (prompt, answer):
        if field not in record:
            raise UserError(f"{where}: {unknown_name('field', field, record)}")
    question, reference = record[prompt], record[answer]
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: {prompt} is {reprlib.repr(question)}; expected text")
    is_number = isinstance(reference, (int, float)) and not isinstance(reference, bool) and math.isfinite(reference)
    if not (is_number or (isinstance(reference, str) and reference.strip())):
        raise UserError(f"{where}: {answer} is {reprlib.repr(reference)}; expected text or a finite number")
    for field, value in ((prompt, question), (answer, str(reference))):
        # A lone surrogate is valid in JSON and in nothing that is written later.
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{where}: {field} has a lone surrogate; expected valid Unicode")
    return Problem(template.replace("{prompt}", question), str(reference))
