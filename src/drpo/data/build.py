"""From a published data set to a file of problems, with a report of its repetitions."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from drpo.data.files import converted, problem_records, read_problems, write_with_report
from drpo.data.problems import Problem
from drpo.data.sources import SOURCES
from drpo.errors import UserError
from drpo.registry import unknown_name

OVERLAP = 20
"""Words in a row that two problems share before one counts as containing a part of the other."""


@dataclass(frozen=True)
class Collected:
    """The problems of a data set, and what there is to say of them.

    Args:
        problems: each problem with each of its answers once.
        report: ``read``, ``kept``, ``duplicates``, ``conflicts`` (problems with several answers),
            ``expected`` and, where compared, ``contamination``.
    """

    problems: list[Problem]
    report: dict[str, Any]


def collect(name: str, path: Path | None = None, *, wrapper: bool = False, against: Sequence[Path] = ()) -> Collected:
    """Read a data set from the hub or from a file of the same columns, and look for repetitions.

    Args:
        name: of :data:`SOURCES`.
        path: a copy of it, .jsonl or .parquet.
        wrapper: whether to keep the text that DAPO-Math puts around its problems.
        against: files of problems that should not be in it.

    Raises:
        UserError: an unknown name, a file that cannot be read, malformed rows by file and number.
    """
    if name not in SOURCES:
        raise UserError(unknown_name("data set", name, SOURCES))
    source = SOURCES[name]
    if wrapper and source.wrapper is None:
        raise UserError(f"--wrapper: {name} has none; expected with dapo-math-17k")
    if wrapper:
        source = replace(source, wrapper=None)
    others = {str(other): read_problems(other) for other in against}
    published = problem_records(path) if path is not None else source.hub_records()
    distinct: dict[tuple[str, str], Problem] = {}
    read = 0
    for problem in converted(path or source.hub, published, partial(source.convert, name)):
        read += 1
        distinct.setdefault((normalised(problem.prompt), problem.answer), problem)
    answers = Counter(prompt for prompt, _ in distinct)
    problems = list(distinct.values())
    report: dict[str, Any] = {
        "data": name,
        "from": str(path) if path is not None else source.hub,
        "read": read,
        "kept": len(problems),
        "duplicates": read - len(problems),
        "conflicts": sum(count > 1 for count in answers.values()),
        "expected": source.rows,
        "contamination": {other: contamination(problems, theirs) for other, theirs in others.items()},
    }
    return Collected(problems, report)


def contamination(problems: Iterable[Problem], others: Iterable[Problem]) -> dict[str, list[str]]:
    """Ids of the problems that are among the others: ``same`` text, or ``overlap``, a run of 20 words in common."""
    theirs = [normalised(problem.prompt) for problem in others]
    same, runs = set(theirs), {run for text in theirs for run in _runs(text)}
    ids: dict[str, list[str]] = {"same": [], "overlap": []}
    for problem in problems:
        text = normalised(problem.prompt)
        if text in same:
            ids["same"].append(problem.id)
        elif any(run in runs for run in _runs(text)):
            ids["overlap"].append(problem.id)
    return ids


def normalised(text: str) -> str:
    """A text's words and signs in lower case, one space apart, so that layout does not tell two problems apart."""
    return " ".join(re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFKC", text).casefold()))


def _runs(text: str) -> Iterable[int]:
    words = text.split(" ")
    return (hash(tuple(words[start : start + OVERLAP])) for start in range(len(words) - OVERLAP + 1))


def write(collected: Collected, folder: Path, *, overwrite: bool = False) -> Path:
    """Write ``NAME.jsonl`` and its report ``NAME.json``; the path of the former.

    Raises:
        UserError: files that are there already, a folder that cannot be written to.
    """
    path = folder / f"{collected.report['data']}.jsonl"
    if not overwrite and os.path.exists(path):  # False for a name that the system does not take
        raise UserError(f"{path}: already exists; choose another folder with --out, or give --overwrite")
    write_with_report(path, collected.problems, collected.report)
    return path


def within_pass_rates(
    problems: Sequence[Problem], table: Sequence[dict[str, Any]], least: float, most: float
) -> list[Problem]:
    """The problems whose share of correct samples, by the table of an evaluation, is at least ``least`` and at most ``most``.

    A policy gradient learns nothing from problems that are solved always or never.
    """
    rates = [row["correct"] / row["samples"] for row in table]
    return [problem for problem, rate in zip(problems, rates, strict=True) if least <= rate <= most]


def summary(report: dict[str, Any]) -> list[str]:
    """The report as lines for the terminal."""
    note = "" if report["kept"] == report["expected"] else f" (published: {report['expected']:,})"
    lines = [f"{report['kept']:,} problems{note} from {report['read']:,} rows, {report['duplicates']:,} duplicates"]
    if report["conflicts"]:
        lines.append(f"{report['conflicts']:,} problems have several answers; all are kept")
    for other, ids in report["contamination"].items():
        lines.append(
            f"{len(ids['same'])} of them are in {other}, {len(ids['overlap'])} more share {OVERLAP} words with one there"
        )
    return lines
