"""The text of a completion."""

from __future__ import annotations

from collections.abc import Sequence


def text_of(completion: str | Sequence[dict[str, str]]) -> str:
    """The text of a completion, plain or conversational (the content of its last message)."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
