"""Whether the reward tells right answers from wrong ones, by the reference answers of the data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from drpo.data.problems import Problem, as_prompt
from drpo.doctor.findings import Finding
from drpo.rewards import REWARD_TIMEOUT, Reward, checked_scores, scores_of

_GRADED = 50
"""Problems whose reference answers are graded."""

_SPELLINGS = ("{answer}", "\\boxed{{{answer}}}", "Answer: {answer}", "#### {answer}")


def check_grader(reward: Reward, problems: Sequence[Problem], tokenizer: Any) -> Iterator[Finding]:
    """Score each reference answer and a wrong one that looks like it, each in the spelling that is liked best."""
    judge: Reward = getattr(reward, "correctness", reward)
    name = getattr(judge, "__name__", type(judge).__name__)
    problems = problems[:_GRADED]
    right = [problem.answer for problem in problems]
    wrong = wrong_answers(right)
    of_right, of_wrong = (_best_scores(judge, answers, problems, tokenizer) for answers in (right, wrong))
    scores = list(zip(of_right, of_wrong, strict=True))
    # Where not even the reference answer is right, its score says nothing of the others.
    fooled = [row for row, (own, other) in enumerate(scores) if other >= own >= 1]
    unrecognized = [problem for problem, own in zip(problems, of_right, strict=True) if own < 1]
    if not any(own > other for own, other in scores) or len(fooled) > (len(problems) - len(unrecognized)) / 2:
        row = fooled[0] if fooled else 0
        yield Finding(
            "stop",
            f"grader: {name} gives {of_right[row]:g} to {right[row][:60]!r}, the reference answer of a problem, and "
            f"{of_wrong[row]:g} to {wrong[row][:60]!r}",
            "task.answer, the field with the reference answers, or a reward that reads them",
        )
    elif len(unrecognized) == len(problems):
        yield Finding(
            "warning",
            f"grader: {name} gives {max(of_right):g} at most to a reference answer, and held-out accuracy counts rewards of "
            "at least 1",
            f"1 for a right answer from {name}",
        )
    elif unrecognized:
        yield Finding(
            "warning",
            f"grader: {name} does not recognize {len(unrecognized)} of {len(problems)} reference answers as right, the first "
            f"{unrecognized[0].answer[:60]!r}",
            "task.answer, or rows without such answers",
        )
    else:
        yield Finding("ok", f"grader: {name} tells the reference answers of {len(problems)} problems from others")
    if judge is not reward:
        of_right, of_wrong = (_best_scores(reward, answers, problems, tokenizer) for answers in (right, wrong))
        if not any(own > other for own, other in zip(of_right, of_wrong, strict=True)):
            yield Finding(
                "stop",
                f"reward: the sum gives {of_right[0]:g} to {right[0][:60]!r}, a right answer, and {of_wrong[0]:g} to "
                f"{wrong[0][:60]!r}",
                "reward: a weight > 0 for the one that says whether an answer is right",
            )


def wrong_answers(answers: Sequence[str]) -> list[str]:
    """To each answer one that is not, and looks like one: the next of the data, or the same with another number."""
    return [
        next(
            (other for other in (*answers[row + 1 :], *answers[:row]) if _is_another(answer, other)),
            re.sub(r"\d(?=\D*$)", lambda last: str((int(last[0]) + 1) % 10), answer) if _has_digits(answer) else "7",
        )
        for row, answer in enumerate(answers)
    ]


def _is_another(answer: str, other: str) -> bool:
    """Whether the other answer means something else, and is in numbers or in words alike."""
    try:
        return float(answer) != float(other)
    except ValueError:
        is_same = answer.strip().casefold() == other.strip().casefold()
        return not is_same and _has_digits(answer) == _has_digits(other)


def _has_digits(answer: str) -> bool:
    return re.search(r"\d", answer) is not None


def _best_scores(reward: Reward, answers: Sequence[str], problems: Sequence[Problem], tokenizer: Any) -> list[float]:
    prompts = [as_prompt(problem, tokenizer) for problem in problems]
    references = [problem.answer for problem in problems]
    scores = []
    checked = checked_scores(reward, REWARD_TIMEOUT)
    for spelling in _SPELLINGS:
        texts = [spelling.format(answer=answer) for answer in answers]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        scores.append([float(score or 0) for score in scores_of(checked, prompts, texts, ids, references)])
    return [max(row) for row in zip(*scores, strict=True)]
