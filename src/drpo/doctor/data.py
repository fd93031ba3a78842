"""Whether problems can be asked and their reference answers met."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

from drpo.data.problems import Problem, as_prompt, builtin_problems
from drpo.doctor.findings import Finding
from drpo.doctor.model import Blank
from drpo.rewards import Reward, scores_of
from drpo.run.recipe import Recipe

TOKENISED = 200
"""Prompts, the longest by characters, whose tokens are counted."""

GRADED = 50
"""Problems whose reference answers are graded."""

Spelt = list[list[tuple[str, float]]]
"""Of each problem, the spellings of an answer and their scores."""

_SPELLINGS = ("{answer}", "\\boxed{{{answer}}}", "Answer: {answer}", "#### {answer}")


def stand_ins() -> list[Problem]:
    """Problems to go on with where the recipe's cannot be read."""
    return builtin_problems("train", GRADED, seed=0)


def prompt_lengths(problems: Sequence[Problem], blank: Blank) -> list[int]:
    """Tokens of the longest prompts, as the trainer sees them."""
    longest = sorted(problems, key=lambda problem: len(problem.prompt))[-TOKENISED:]
    return [len(_token_ids(problem, blank)) for problem in longest]


def _token_ids(problem: Problem, blank: Blank) -> list[int]:
    tokenizer, options = blank.tokenizer, blank.template_options
    prompt = as_prompt(problem, tokenizer)
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **options)["input_ids"]


def check_problems(recipe: Recipe, train: Sequence[Problem], heldout: Sequence[Problem]) -> Iterator[Finding]:
    """How many problems there are, and whether they are distinct and held out."""
    distinct, held = {p.prompt for p in train}, {p.prompt for p in heldout}
    found = False
    if len(distinct) < 0.9 * len(train):
        found = True
        yield Finding(
            "warning",
            f"task.train: {len(train):,} rows hold {len(distinct):,} distinct prompts",
            "drpo data, which de-duplicates",
        )
    if both := len(distinct & held):
        found = True
        yield Finding(
            "warning",
            f"task.heldout: {both:,} of {len(held):,} prompts are in task.train too",
            f"drpo data NAME --against {recipe.task.heldout}, which leaves them out",
        )
    if not found:
        yield Finding("ok", f"task: {len(train):,} problems, {len(heldout):,} held out")


def check_prompts(problems: Sequence[Problem], blank: Blank) -> Iterator[Finding]:
    """Whether a prompt has the marks of a conversation once."""
    problem, tokenizer = problems[0], blank.tokenizer
    special = [t for t in tokenizer.all_special_tokens if len(t) > 2 and t in problem.prompt]
    if tokenizer.chat_template and special:
        yield Finding(
            "stop",
            f"prompt: has {special[0]!r} in its text, and the chat template is put around it",
            "task.template and data without the marks of a chat template",
        )
        return
    ids, bos = _token_ids(problem, blank), tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        yield Finding(
            "stop", f"prompt: begins with {tokenizer.bos_token!r} twice", f"task.template without {tokenizer.bos_token}"
        )
        return
    unknown = tokenizer.unk_token_id
    if unknown is not None and (met := [p for p in problems[:TOKENISED] if unknown in _token_ids(p, blank)]):
        yield Finding(
            "warning",
            f"prompt: {len(met)} of {len(problems[:TOKENISED])} have characters that the tokenizer does not know, the first "
            f"{met[0].prompt[:60]!r}",
            f"data and task.template without what becomes {tokenizer.unk_token}, or another model",
        )
        return
    shown = tokenizer.decode(ids)
    yield Finding("ok", f"prompt: {shown if len(shown) <= 100 else f'{shown[:50]} ... {shown[-50:]}'!r}")


def check_grader(reward: Reward, problems: Sequence[Problem], tokenizer: Any) -> Iterator[Finding]:
    """Whether the reward tells a right answer from a wrong one, by the reference answers of the data."""
    judge: Reward = getattr(reward, "correctness", reward)
    name = getattr(judge, "__name__", type(judge).__name__)
    asked = list(problems[:GRADED])
    own = [problem.answer for problem in asked]
    others = wrong_answers(own)
    try:
        right, wrong = (_scores(judge, answers, asked, tokenizer) for answers in (own, others))
    except (Exception, SystemExit) as error:  # a reward of the user's can raise anything
        yield Finding(
            "stop",
            f"grader: {name} fails on {own[0]!r} ({type(error).__name__}: {str(error)[:200]})",
            "a reward that takes completions, answer and **others, and returns a number or None for each completion",
        )
        return
    unfit = [(text, score) for scored in (right, wrong) for row in scored for text, score in row if not isfinite(score)]
    if unfit:
        text, score = unfit[0]
        yield Finding(
            "stop",
            f"grader: {name} gives {score} to {text[:60]!r}",
            f"a finite number from {name}, or None for a completion that cannot be scored",
        )
        return
    pairs = _best(right, wrong)
    # Where not even the reference answer is right, its score says nothing of the others.
    fooled = [n for n, (mine, other) in enumerate(pairs) if other >= mine >= 1]
    unmet = [problem for problem, (mine, _) in zip(asked, pairs, strict=True) if mine < 1]
    if not any(mine > other for mine, other in pairs) or len(fooled) > (len(asked) - len(unmet)) / 2:
        n = fooled[0] if fooled else 0
        yield Finding(
            "stop",
            f"grader: {name} gives {pairs[n][0]:g} to {own[n][:60]!r}, the reference answer of a problem, and "
            f"{pairs[n][1]:g} to {others[n][:60]!r}",
            "task.answer, the field with the reference answers, or a reward that reads them",
        )
    elif len(unmet) == len(asked):
        yield Finding(
            "warning",
            f"grader: {name} gives {max(mine for mine, _ in pairs):g} at most to a reference answer, and held-out accuracy "
            "counts rewards of at least 1",
            f"1 for a right answer from {name}",
        )
    elif unmet:
        yield Finding(
            "warning",
            f"grader: {name} does not recognise {len(unmet)} of {len(asked)} reference answers as right, the first "
            f"{unmet[0].answer[:60]!r}",
            "task.answer, or rows without such answers",
        )
    elif judge is not reward and (sums := _compared(reward, own, others, asked, tokenizer)):
        yield sums
    else:
        yield Finding("ok", f"grader: {name} tells the reference answers of {len(asked)} problems from others")


def _compared(
    reward: Reward, own: Sequence[str], others: Sequence[str], asked: Sequence[Problem], tokenizer: Any
) -> Finding | None:
    """What is wrong with a sum of rewards of which one says whether an answer is right."""
    pairs = _best(*(_scores(reward, answers, asked, tokenizer) for answers in (own, others)))
    if any(mine > other for mine, other in pairs):
        return None
    mine, other = pairs[0]
    return Finding(
        "stop",
        f"reward: the sum gives {mine:g} to {own[0][:60]!r}, a right answer, and {other:g} to {others[0][:60]!r}",
        "reward: a weight > 0 for the one that says whether an answer is right",
    )


def wrong_answers(answers: Sequence[str]) -> list[str]:
    """To each answer one that is not, and looks like one: the next of the data, or the same with another number."""
    return [
        next(
            (other for other in (*answers[n + 1 :], *answers[:n]) if _is_another(answer, other)),
            re.sub(r"\d(?=\D*$)", lambda last: str((int(last[0]) + 1) % 10), answer) if _has_digits(answer) else "7",
        )
        for n, answer in enumerate(answers)
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


def _best(right: Spelt, wrong: Spelt) -> list[tuple[float, float]]:
    """The score of each problem's own answer and of the wrong one, each in the spelling that is liked best."""
    return [(max(s for _, s in mine), max(s for _, s in other)) for mine, other in zip(right, wrong, strict=True)]


def _scores(judge: Reward, answers: Sequence[str], problems: Sequence[Problem], tokenizer: Any) -> Spelt:
    """To each answer its spellings and their scores."""
    texts = [[spelling.format(answer=answer) for answer in answers] for spelling in _SPELLINGS]
    scores = [_grade(judge, completions, problems, tokenizer) for completions in texts]
    return [
        list(zip(*row, strict=True)) for row in zip(zip(*texts, strict=True), zip(*scores, strict=True), strict=True)
    ]


def _grade(judge: Reward, completions: list[str], problems: Sequence[Problem], tokenizer: Any) -> list[float]:
    scores = scores_of(
        judge,
        [as_prompt(problem, tokenizer) for problem in problems],
        completions,
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions],
        [problem.answer for problem in problems],
    )
    if len(scores) != len(problems):
        raise ValueError(f"returned {len(scores)} scores for {len(problems)} completions")
    return [0.0 if score is None else float(score) for score in scores]
