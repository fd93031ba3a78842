"""The grader as verl's reward function: ``reward.custom_reward_function.path=pkg://drpo.integrations.verl.grader``, ``.name=compute_score``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from drpo.rewards.math import STATUSES, MathGrader


@lru_cache(maxsize=8)
def _grader(settings: tuple[tuple[str, Any], ...]) -> MathGrader:
    return MathGrader(**dict(settings))


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    **settings: Any,
) -> dict[str, float]:
    """The score of one completion, and a flag for each status, which verl averages into its metrics.

    verl knows no completion without a score: where the grader says None, it is 0.0 here and the flag tells.

    Args:
        settings: of :class:`MathGrader`, from ``reward.custom_reward_function.reward_kwargs``.
    """
    grade = _grader(tuple(sorted(settings.items()))).grade([solution_str], [str(ground_truth)])[0]
    flags = {status: float(grade.status == status) for status in STATUSES}
    return {"score": grade.score or 0.0, "acc": flags["correct"], **flags}
