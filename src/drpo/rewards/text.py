"""The text of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def text_of(completion: str | Sequence[dict[str, Any]] | None) -> str:
    """The text of a completion, plain or conversational (that of its last message); empty where there is none, as in a tool call."""
    if completion is None or isinstance(completion, str):
        return completion or ""
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""
