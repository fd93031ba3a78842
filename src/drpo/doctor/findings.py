"""What a check found, and how it is shown."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TextIO

from rich.console import Console
from rich.text import Text

from drpo.redact import redact

Verdict = Literal["ok", "warning", "stop"]

_STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "stop": "bold red"}


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        verdict: ``ok``; ``warning``, the run works and is perhaps not what was meant; ``stop``, it
            does not work or computes something else than was asked for.
        what: one line.
        fix: what to write, where there is something to mend and the line does not end in it.
    """

    verdict: Verdict
    what: str
    fix: str | None = None

    @classmethod
    def of_error(cls, error: BaseException, where: str = "") -> Finding:
        """The stop that an error is."""
        return cls("stop", " ".join(f"{where}{error}".split()), getattr(error, "fix", None))


def show(findings: Sequence[Finding], file: TextIO, as_json: bool = False) -> int:
    """Print findings; returns the exit code, 1 if one of them is a stop."""
    if as_json:
        print(redact(json.dumps([asdict(finding) for finding in findings], indent=2)), file=file)
    else:
        console = Console(file=file, highlight=False, soft_wrap=True)
        # On a terminal text wraps beside its verdict; where a program reads it a finding is one line, however long.
        width = console.width - 8 if file.isatty() else sys.maxsize
        for finding in findings:
            lines = [(line, "") for line in textwrap.wrap(redact(finding.what), width)]
            if finding.fix:
                lines += [(line, "dim") for line in textwrap.wrap(f"fix: {redact(finding.fix)}", width)]
            for number, (line, style) in enumerate(lines):
                verdict = "" if number else finding.verdict
                console.print(Text(f"{verdict:8}", _STYLES[finding.verdict]) + Text(line, style))
    return int(any(finding.verdict == "stop" for finding in findings))
