"""Error messages about names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One line: the unknown name, the nearest known one, all known ones."""
    choices = list(known)
    nearest = get_close_matches(name, choices, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    listed = f" Known: {', '.join(choices)}." if choices else " There are none."
    return f"unknown {kind} {name!r}{hint or '.'}{listed}"
