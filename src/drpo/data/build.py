"""From a published data set to a file in the schema, with a report of what was found in it."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drpo.data.files import Row, converted, read_rows, records, write_rows
from drpo.data.sources import SOURCES, dapo_prompt
from drpo.errors import UserError
from drpo.files import versions, write_json
from drpo.registry import unknown_name

OVERLAP = 20
"""Words in a row that two problems share before one counts as containing a part of the other."""


@dataclass(frozen=True)
class Collected:
    """Rows of a data set, and what there is to say of them.

    Args:
        rows: each problem with each of its answers once.
        report: ``read``, ``kept``, ``duplicates``, ``conflicts`` (problems with several answers),
            ``expected`` and, where compared, ``contamination``.
    """

    rows: list[Row]
    report: dict[str, Any]


def collect(name: str, path: Path | None = None, *, wrapper: bool = False, against: Sequence[Path] = ()) -> Collected:
    """Read a data set from the hub or from a file of the same columns, and look for repetitions.

    Args:
        name: of :data:`SOURCES`.
        path: a copy of it, .jsonl or .parquet.
        wrapper: keep the text that DAPO-Math puts around its problems.
        against: files in the schema whose problems should not be in it.

    Raises:
        UserError: an unknown name, a file that cannot be read, malformed rows by file and number.
    """
    if name not in SOURCES:
        raise UserError(unknown_name("data set", name, SOURCES))
    if wrapper and name != "dapo-math-17k":
        raise UserError(f"--wrapper: {name} has none; expected with dapo-math-17k")
    others = {str(other): read_rows(other) for other in against}
    source = SOURCES[name]
    if wrapper:
        source = replace(source, problem=dapo_prompt)
    found = records(path) if path is not None else source.hub_records()
    kept: dict[tuple[str, str], Row] = {}
    read = 0
    for row in converted(path or source.hub, found, lambda record, number: source.row(name, record, number)):
        read += 1
        kept.setdefault((normalised(row.prompt), row.answer), row)
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for prompt, answer in kept:
        answers[prompt].add(answer)
    rows = list(kept.values())
    report: dict[str, Any] = {
        "data": name,
        "from": str(path) if path is not None else source.hub,
        "read": read,
        "kept": len(rows),
        "duplicates": read - len(rows),
        "conflicts": sum(len(given) > 1 for given in answers.values()),
        "expected": source.rows,
        "contamination": {other: contamination(rows, theirs) for other, theirs in others.items()},
    }
    return Collected(rows, report)


def contamination(rows: Iterable[Row], others: Iterable[Row]) -> dict[str, list[str]]:
    """Ids of the rows whose problem is among the others: ``same`` text, or ``overlap``, a run of 20 words in common."""
    theirs = [normalised(row.prompt) for row in others]
    same, runs = set(theirs), {run for text in theirs for run in _runs(text)}
    found: dict[str, list[str]] = {"same": [], "overlap": []}
    for row in rows:
        text = normalised(row.prompt)
        if text in same:
            found["same"].append(row.id)
        elif any(run in runs for run in _runs(text)):
            found["overlap"].append(row.id)
    return found


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
    if not overwrite and path.exists():
        raise UserError(f"{path}: already exists; choose another folder with --out, or give --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(path, collected.rows)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        write_json(path.with_suffix(".json"), {**collected.report, "sha256": digest, "versions": versions()})
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from error
    return path


def summary(report: dict[str, Any]) -> list[str]:
    """The report as lines for the terminal."""
    note = "" if report["kept"] == report["expected"] else f" (published: {report['expected']:,})"
    lines = [f"{report['kept']:,} problems{note} from {report['read']:,} rows, {report['duplicates']:,} duplicates"]
    if report["conflicts"]:
        lines.append(f"{report['conflicts']:,} problems have several answers; all are kept")
    for other, found in report["contamination"].items():
        lines.append(
            f"{len(found['same'])} of them are in {other}, {len(found['overlap'])} more share {OVERLAP} words with one there"
        )
    return lines
