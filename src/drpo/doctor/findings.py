"""What a check found, and how it is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.text import Text

Verdict = Literal["ok", "warning", "stop"]

_STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "stop": "bold red"}


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        verdict: ``ok``; ``warning``, the run works and is perhaps not what was meant; ``stop``, it
            does not work or computes something else than was asked for.
        what: one line.
        fix: what to write, where there is something to mend.
    """

    verdict: Verdict
    what: str
    fix: str | None = None


# Where an error message of this library says what to write, and how it is said as a fix; the likeliest first.
_FIXES = (
    (r"(pip install .+?)(?:\)|;|$)", "{}"),
    (r"generation_kwargs has '(\w+)'", "no trainer.generation_kwargs.{}"),
    (r"has (\d+) rows; prompts_per_rollout", "prompts_per_rollout: {}"),
    (r"(task\.\w+): .*no such file", "{}: a .jsonl file, such as drpo data makes"),
    (r"reward: cannot load '([^':]+):", "a module {} that imports, in the current folder or installed"),
    (r"did you mean (.+?)\?", "{}"),
    (r"has '(\w+)', which belongs (.+)$", "{} {}"),
    (r"trainer: (\w+) follows from", "no trainer.{}"),
    (r"expected (.+?)(?:, but got .+)?$", "{}"),
    (r"[:;,] (set .+)$", "{}"),
    (r"trainer: (\w+)=\S+ (?:would have no effect|contradicts)", "no trainer.{}"),
    (r"(\w+): is missing", "a value for {}"),
    (r"Known: (.{1,120})\.$", "one of {}"),
    (r"unknown \w+ '(.+?)'", "no {}"),
    (r"^(\S+), (line \d+): ", "valid YAML in {1} of {0}"),
    (r"^(\S+): cannot be read", "text in UTF-8 in {}"),
    (r"trainer: (\w+)=", "another trainer.{}"),
)


def refused(error: Exception, name: str = "") -> Finding:
    """The stop that an error is, with the part of its message that says what to write."""
    what = " ".join(f"{name}: {error}".split()) if name else str(error)
    found = (fix.format(*match.groups()) for pattern, fix in _FIXES if (match := re.search(pattern, what)))
    return Finding("stop", what, next(found, None))


def show(findings: Sequence[Finding], as_json: bool = False) -> int:
    """Print findings; returns the exit code, 1 if one of them is a stop."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for finding in findings:
            console.print(Text(f"{finding.verdict:8}", _STYLES[finding.verdict]) + Text(finding.what))
            if finding.fix:
                console.print(Text(f"{'':8}fix: {finding.fix}", "dim"))
    return int(any(finding.verdict == "stop" for finding in findings))
