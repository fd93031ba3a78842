"""What a completion states as its final answer, and plain numbers; string work only, linear in the text."""

from __future__ import annotations

import re
from fractions import Fraction

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_STATED = re.compile(r"(?i)\banswer\s*(?:is)?\s*[:：]")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)

_UNIT = re.compile(r"(?:\\[ ,;!]|\s)*(?:\\(?:text|mathrm|textrm|mbox)\s*\{[^{}0-9]*\}|\^\s*\{?\\circ\}?)$")
_INTEGER = r"[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+"
_DECIMAL = rf"(?:{_INTEGER})?\.[0-9]+|(?:{_INTEGER})\.?"
_FRACTION = re.compile(
    r"(?P<whole>[0-9]*)\\frac(?:\{(?P<n>-?[0-9]+)\}|(?P<n1>[0-9]))(?:\{(?P<d>[0-9]+)\}|(?P<d1>[0-9]))"
    r"|(?P<n2>[0-9]+)/(?P<d2>[0-9]+)"
)
_NAME = r"(?:\\?[A-Za-z]+|[A-Za-z]_\{?\w+\}?|[A-Za-z]\([A-Za-z, ]+\))"
_ASSIGNMENT = re.compile(rf"{_NAME}\s*(?:=|\\in(?![A-Za-z]))\s*(?P<value>[^=]+)")
_TEXT = re.compile(r"\\(?:text|mathrm|textrm|mbox|mathbf|textbf)\s*\{([^{}]*)\}")
_RELATION = re.compile(r"[=<>≤≥≠]|\\(?:leq?|geq?|neq?|l|g|lt|gt|approx|equiv|in)(?![A-Za-z])")

LONGEST_NUMBER = 400
"""Characters; integers beyond some thousand digits are quadratic to read."""


def final_answer(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``; without one, the rest of the line of the last ``Answer:``.

    None where there is neither, or where the last box is empty or not closed.
    """
    boxes = list(_BOXED.finditer(text))
    if boxes:
        return _until_closed(text, boxes[-1].end())
    stated = list(_STATED.finditer(text))
    if not stated:
        return None
    line = text[stated[-1].end() :].strip().partition("\n")[0]
    return _undelimited(line.strip().strip("*").strip().removesuffix(".")) or None


def _until_closed(text: str, start: int) -> str | None:
    depth = 1
    for brace in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return _undelimited(text[start : brace.start()]) or None
    return None


def _undelimited(answer: str) -> str:
    answer = answer.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = answer[len(opening) : -len(closing)]
        if inner and answer == opening + inner + closing and "$" not in inner:
            return inner.strip()
    return answer


def bare(answer: str) -> str:
    r"""An answer without its delimiters, spacing commands, size commands and trailing unit: ``$\dfrac12\text{ cm}$`` is ``\frac12``."""
    answer = _undelimited(answer)
    answer = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[,;:! ]", "", answer).replace("{,}", ",").replace("−", "-")
    answer = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", answer)
    if text := _TEXT.fullmatch(answer):
        return text[1].strip()
    return _UNIT.sub("", answer).strip()


def number(answer: str) -> Fraction | None:
    r"""The value of an answer that is a number as one writes it down: an integer, a decimal, a fraction, a mixed number.

    Nothing is computed: ``6\cdot7`` and ``\sqrt{4}`` are not numbers, nor is ``42\%``.
    """
    if len(answer) > LONGEST_NUMBER:
        return None
    text = re.sub(r"\s+", "", bare(answer).removesuffix("."))
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-") if text[:1] in ("+", "-") and text[1:2] not in ("+", "-") else text
    text = text.removeprefix("\\$").removeprefix("$")
    if re.fullmatch(_DECIMAL, text):
        return sign * Fraction(text.replace(",", "").removesuffix("."))
    if fraction := _FRACTION.fullmatch(text):
        numerator, denominator = (
            int(next(fraction[name] for name in names if fraction[name] is not None))
            for names in (("n", "n1", "n2"), ("d", "d1", "d2"))
        )
        # A fraction that is a whole number is a computation left undone.
        if denominator and numerator % denominator and not (fraction["whole"] and numerator < 0):
            return sign * (int(fraction["whole"] or 0) + Fraction(numerator, denominator))
    return None


def assigned(answer: str) -> str:
    r"""What an answer says a single name is or is in, ``5`` of ``x = 5``; the answer itself if it says no such thing."""
    assignment = _ASSIGNMENT.fullmatch(bare(answer))
    return assignment["value"].strip() if assignment else answer


def is_relation(answer: str) -> bool:
    """Whether an answer says that something equals, exceeds or belongs to something else."""
    return _RELATION.search(answer) is not None


def is_percentage(answer: str) -> bool:
    return "%" in answer or "percent" in answer.lower()


def canonical(text: str) -> str | None:
    """The stated answer of a completion in one spelling, for counting votes; None without one."""
    answer = final_answer(text)
    if answer is None:
        return None
    value = number(assigned(answer))
    return str(value) if value is not None else re.sub(r"\s+", "", bare(assigned(answer)))
