"""What a completion states as its final answer, and plain numbers; string work only, linear in the text."""

from __future__ import annotations

import re
from fractions import Fraction

_BOXED = re.compile(r"\\boxed\s*\{")
_STATED = re.compile(r"(?i)(?:\banswer\s*(?:is)?|答案是?)\s*:")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)

_CHARACTERS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {ord("−"): "-", ord("°"): r"^\circ"}
_SPELLINGS = (
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:display|text|script)style(?![A-Za-z])\s*"), ""),
    (re.compile(r"\\fbox(?![A-Za-z])"), r"\\boxed"),
    (re.compile(r"\\boxed\s+([-\\]?\w+(?:[.,/]\w+)*)"), r"\\boxed{\1}"),
    (re.compile(r"(frac\s*(?:\{[^{}]*\}|[0-9]))\s*((?:\\[A-Za-z]+|[A-Za-z])(?![A-Za-z]|\s*[{\[(]))"), r"\1{\2}"),
    (
        re.compile(r"(?<![\w.,])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]\+?(-?[0-9]{1,3})(?!\w|\.[0-9])"),
        lambda number: rf"{number[1]}\times10^{{{int(number[2])}}}",
    ),
    (
        re.compile(r"(?<![\w.,/}\\])([0-9]{1,9}) +([0-9]{1,9})/([0-9]{1,9})(?![\w/]|\.[0-9])"),
        lambda mixed: f"{int(mixed[1]) * int(mixed[3]) + int(mixed[2])}/{mixed[3]}",
    ),
)

_NO_UNIT = r"(?i:[^{}]*\b(?:hundred|[mbtr]+illion|thousand|dozen|squared|cubed|factorial|percent|or|and|to|times|over|plus|minus|not)\b)"
_UNIT = re.compile(
    r"(?<!\s)(?:\\[ ,;!]|\s)*(?:\\(?:text|mathrm|textrm|mbox)\s*\{"
    rf"(?!{_NO_UNIT})[^{{}}0-9]*\}}(?:\^\s*\{{?[0-9]\}}?)?|\^\s*\{{?\\circ\}}?)$"
)
_UNIT_WORDS = re.compile(rf"(?<=[0-9])\s+(?!{_NO_UNIT})(?:[A-Za-z]{{3,}}|[ckm]m|kg|ft)(?:[ /][A-Za-z]{{2,}})*$")
_INTEGER = r"[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+"
_DECIMAL = re.compile(
    rf"(?P<digits>(?:{_INTEGER})?\.[0-9]+|(?:{_INTEGER})\.?)(?:\\(?:times|cdot)10\^\{{?(?P<power>-?[0-9]{{1,3}})\}}?)?"
)
_FRACTION = re.compile(
    r"(?P<whole>[0-9]*)\\frac(?:\{(?P<n>-?[0-9]+)\}|(?P<n1>[0-9]))(?:\{(?P<d>-?[0-9]+)\}|(?P<d1>[0-9]))"
    r"|(?P<n2>[0-9]+)/(?P<d2>[0-9]+)"
)
_NAME = r"(?:(?:\\angle\s*)?\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([\w, ]+\))?|\|[A-Za-z]+\|)"
_NAMES = rf"{_NAME}(?:\s*[+-]\s*{_NAME})*"
_ASSIGNMENT = re.compile(rf"{_NAMES}\s*(?:=|\\in(?![A-Za-z]))\s*(?P<value>[^=]+)|(?P<first>[^=A-Za-z]+)=\s*{_NAMES}")
_DOTS = re.compile(r"\\[lc]?dots[bcmio]?(?![A-Za-z])")
_LITERAL = re.compile(r"[0-9]:[0-9]|\.\.\.|[0-9]_[0-9]")
_TEXT = re.compile(r"\\(?:text|mathrm|textrm|mbox|mathbf|textbf)\s*\{([^{}]*)\}")
_RELATION = re.compile(r"[=<>≤≥≠]|\\(?:leq?|geq?|neq?|l|g|lt|gt|approx|equiv|in)(?![A-Za-z])")

LONGEST_NUMBER = 400
"""Characters; integers beyond some thousand digits are quadratic to read."""


def readable(text: str) -> str:
    """A text in spellings that math-verify reads: ``\\frac1{\\pi}`` for ``\\frac1\\pi``, ``5/4`` for ``1 1/4``, ASCII for full-width signs."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def final_answer(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``; without one, the rest of the line of the last ``Answer:``.

    None where there is neither, or where the last box is empty or not closed.
    """
    text = readable(text)
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
    answer = _undelimited(readable(answer))
    answer = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[,;:!]", "", answer).replace("{,}", ",").replace("\\ ", " ")
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
    text = re.sub(r"\s+", "", _UNIT_WORDS.sub("", bare(answer).removesuffix(".")))
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-") if text[:1] in ("+", "-") and text[1:2] not in ("+", "-") else text
    text = text.removeprefix("\\$").removeprefix("$")
    if decimal := _DECIMAL.fullmatch(text):
        digits = Fraction(decimal["digits"].replace(",", "").removesuffix("."))
        return sign * digits * Fraction(10) ** int(decimal["power"] or 0)
    if fraction := _FRACTION.fullmatch(text):
        numerator, denominator = (
            int(next(fraction[name] for name in names if fraction[name] is not None))
            for names in (("n", "n1", "n2"), ("d", "d1", "d2"))
        )
        # A fraction that is a whole number is a computation left undone.
        if denominator and numerator % denominator and not (fraction["whole"] and numerator * denominator < 0):
            return sign * (int(fraction["whole"] or 0) + Fraction(numerator, denominator))
    return None


def assigned(answer: str) -> str:
    r"""What an answer says a single name is or is in, ``5`` of ``x = 5``; the answer itself if it says no such thing."""
    assignment = _ASSIGNMENT.fullmatch(bare(answer))
    return (assignment["value"] or assignment["first"]).strip() if assignment else answer


def is_same_literal(answer: str, reference: str) -> bool | None:
    r"""Whether answers with dots, a base or a clock time, which math-verify misreads, are spelled alike; None for others.

    ``1011`` is taken for ``1011_2``.
    """
    answer, reference = (re.sub(r"[\s{}]", "", _DOTS.sub("...", bare(text))) for text in (answer, reference))
    if not _LITERAL.search(answer + " " + reference):
        return None
    return answer in (reference, re.sub(r"_[0-9]+$", "", reference))


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
