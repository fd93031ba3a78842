"""Rollouts that nothing could be trained on: why, how many, and how a row of metrics says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "untrained/"

REASONS = {
    "equal_rewards": "the rewards of each prompt's completions were all equal, so that none had an advantage",
    "all_masked": "no token of a completion counted, as where all are masked or cut off",
}
"""Why there was nothing to train on, by the names of the counts."""


def as_metrics(counts: Mapping[str, int]) -> dict[str, float]:
    """The counts of a run so far as metrics."""
    return {f"{PREFIX}{reason}": float(count) for reason, count in counts.items()}


def describe_untrained(row: Mapping[str, Any]) -> str:
    """What a run's last row of metrics says of such rollouts, as a sentence; "" where there were none."""
    counts = {reason: int(row[f"{PREFIX}{reason}"]) for reason in REASONS if f"{PREFIX}{reason}" in row}
    causes = "; ".join(f"{count} of {row['rollout']} rollouts: {REASONS[reason]}" for reason, count in counts.items())
    return causes and f"Nothing to train on in {causes}."
