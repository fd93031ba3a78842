"""The data sets: where each is on the hub, and how its records become problems."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from drpo.data.files import Row, label, text_field, value_field
from drpo.data.problems import Problem
from drpo.errors import UserError
from drpo.rewards.answers import number

WRAPPER = re.compile(
    r"Solve the following math problem step by step\..*?\n\n(?P<problem>.*)\n\n"
    r'Remember to put your answer on its own line after "Answer:"\.?',
    re.DOTALL,
)
"""The text that DAPO-Math puts around every problem."""


@dataclass(frozen=True)
class Source:
    """A data set as published.

    Args:
        hub: its repository on the Hugging Face hub.
        config: of the repository; None for its only one.
        split: of the repository.
        problem: the text of the problem in a record.
        answer: the reference answer in a record.
        identifier: the field that holds an id; the number of the row stands in for one.
        rows: unique problems it is known to have.
        wrapper: of the text around its problems, which is taken off.
    """

    hub: str
    config: str | None
    split: str
    problem: Callable[[dict[str, Any]], str]
    answer: Callable[[dict[str, Any]], str]
    identifier: str
    rows: int
    wrapper: re.Pattern[str] | None = None

    def convert(self, name: str, record: dict[str, Any], position: int) -> Problem:
        """Make a problem of a record.

        Raises:
            ValueError: a record without what it takes, or with something else in its place.
        """
        text = self.problem(record).strip()
        if self.wrapper and (wrapped := self.wrapper.fullmatch(text)):
            text = wrapped["problem"].strip()
        return Problem(text, self.answer(record), name, label(record, self.identifier) or str(position))

    def hub_records(self) -> Iterator[Row]:
        """The rows on the hub.

        Raises:
            UserError: they cannot be had.
        """
        from datasets import load_dataset

        try:
            yield from enumerate(load_dataset(self.hub, self.config, split=self.split), 1)
        except Exception as error:  # the hub, the network and the cache fail in their own ways
            raise UserError(
                f"cannot load {self.hub} from the hub ({type(error).__name__}: {str(error)[:200]}); "
                "with a copy on disk: --from FILE.jsonl or FILE.parquet"
            ) from error


def _question(record: dict[str, Any]) -> str:
    return text_field(record, "problem", "question")


_answer = partial(value_field, name="answer")


def _integer(record: dict[str, Any]) -> str:
    answer = _answer(record)
    value = number(answer)
    if value is None or value.denominator != 1:
        raise ValueError(f"answer is {answer[:40]!r}; expected an integer")
    return str(value)


def _gsm8k_answer(record: dict[str, Any]) -> str:
    solution = _answer(record)
    value = number(solution.rpartition("####")[2]) if "####" in solution else None
    if value is None:
        raise ValueError(f"answer is {solution[-40:]!r}; expected a solution that ends in #### and a number")
    return str(value)


def _last_message(record: dict[str, Any]) -> str:
    messages = record.get("prompt")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        raise ValueError("prompt is not a list of chat messages")
    try:
        return text_field(messages[-1], "content")
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from error


SOURCES: dict[str, Source] = {
    "dapo-math-17k": Source(
        hub="BytedTsinghua-SIA/DAPO-Math-17k",
        config=None,
        split="train",
        problem=_last_message,
        answer=partial(value_field, name="reward_model.ground_truth"),
        identifier="extra_info.index",
        rows=17_398,
        wrapper=WRAPPER,
    ),
    "gsm8k": Source("openai/gsm8k", "main", "train", _question, _gsm8k_answer, "id", 7473),
    "gsm8k-test": Source("openai/gsm8k", "main", "test", _question, _gsm8k_answer, "id", 1319),
    "math500": Source("HuggingFaceH4/MATH-500", None, "test", _question, _answer, "unique_id", 500),
    "aime24": Source("HuggingFaceH4/aime_2024", None, "train", _question, _integer, "id", 30),
    "aime25": Source("math-ai/aime25", None, "test", _question, _integer, "id", 30),
    "amc23": Source("math-ai/amc23", None, "test", _question, _integer, "id", 40),
}
