"""A recipe's reward as verl's: ``reward.custom_reward_function.path=pkg://drpo.integrations.verl.reward``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from drpo.rewards import Reward
from drpo.run.recipe import load_recipe


@cache
def _reward(recipe: str) -> Reward:
    return load_recipe(Path(recipe)).make_reward()


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    recipe: str,
    **_: Any,
) -> float:
    """The reward of one completion; 0.0 where the recipe's reward knows no score.

    Args:
        recipe: the file, from ``reward.custom_reward_function.reward_kwargs``.
    """
    (score,) = _reward(recipe)(completions=[solution_str], answer=[ground_truth])
    return float(score or 0.0)
