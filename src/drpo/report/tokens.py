"""The completions in which the objective changed a token's gradient most, with such tokens marked."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from html import escape
from typing import Any

from drpo.metrics.effects import UNCHANGED

COMPLETIONS_SHOWN = 8


def changed_most(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a ``rollouts.jsonl`` whose tokens have weights farthest from 1, farthest first.

    Sequences without an advantage have no policy gradient that a weight could change.
    """
    changed = (row for row in rows if row.get("advantage") and _largest_change(row) > UNCHANGED)
    return heapq.nlargest(COMPLETIONS_SHOWN, changed, key=_largest_change)


def _largest_change(row: dict[str, Any]) -> float:
    return max((abs(1 - weight) for weight in row.get("weight", ())), default=0.0)


def effect_of(weight: float) -> str | None:
    """What a weight does to a token's gradient, by the names of :data:`drpo.metrics.effects.EFFECTS`; None for nothing."""
    if abs(1 - weight) <= UNCHANGED:
        return None
    if abs(weight) <= UNCHANGED:
        return "zeroed"
    return "reversed" if weight < 0 else "attenuated" if weight < 1 else "amplified"


def marked_completion(row: dict[str, Any]) -> str:
    """One row as HTML: where it is from, its prompt, and its tokens, each with its numbers where it is marked."""
    header = f"Rollout {row['rollout']}, reward {row['reward']:.3g}, advantage {row['advantage']:.3g}"
    tokens = zip(row["text"], row["weight"], row["logp"], row["behavior_logp"], strict=True)
    body = "".join(_marked_token(*token) for token in tokens)
    return f"<p>{escape(header)}:</p><pre>{escape(row['prompt'])}\n\n{body}</pre>"


def _marked_token(text: str, weight: float, logp: float, behavior_logp: float) -> str:
    effect = effect_of(weight)
    if effect is None:
        return escape(text)
    numbers = f"w = {weight:.3g}, π = {math.exp(logp):.3g}, μ = {math.exp(behavior_logp):.3g}"
    return f'<mark class="{effect}" title="{escape(numbers)}">{escape(text)}</mark>'
