"""Maxima among a policy loss's metrics stay maxima.

verl 0.9.1 takes the mean of whatever a policy loss returns over the micro-batches of an update and over the ranks;
over the updates of a rollout it takes the maximum where the name has "max" in it. Here that rule holds from the start.
"""

from __future__ import annotations

from typing import Any

from verl.utils.metric import AggregationType, Metric


def is_maximum(name: str) -> bool:
    """Whether verl reduces a metric of this name by its maximum."""
    return "max" in name


def keep_maxima() -> None:
    """Have verl's workers reduce a policy loss's metrics as its trainer does, by their names."""

    def from_dict(cls: type[Metric], data: dict[str, Any], aggregation: AggregationType) -> dict[str, Metric]:
        return {
            name: cls(AggregationType.MAX if is_maximum(name) else aggregation, value) for name, value in data.items()
        }

    Metric.from_dict = classmethod(from_dict)  # type: ignore[assignment,method-assign]
