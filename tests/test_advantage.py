from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from drpo import group_advantage
from drpo.advantage import Advantage

MODES = get_args(Advantage)
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def of_equal_lengths(rewards: torch.Tensor, group_size: int, mode: Advantage) -> torch.Tensor:
    return group_advantage(rewards, group_size, mode, lengths=torch.full_like(rewards, 3, dtype=torch.long))


def advantages(rewards: list[float], group_size: int, mode: Advantage) -> list[float]:
    return of_equal_lengths(torch.tensor(rewards, dtype=torch.float64), group_size, mode).tolist()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Mean 2 of 1, 2, 3; mean 6 of 0, 6, 12
        ("mean", [-1, 0, 1, -6, 0, 6]),
        # Standard deviation √((1 + 0 + 1) / 2) = 1; √((36 + 0 + 36) / 2) = 6
        ("mean-std", [-1, 0, 1, -1, 0, 1]),
        # 1 − (2 + 3) / 2, 2 − (1 + 3) / 2, 3 − (1 + 2) / 2; 0 − (6 + 12) / 2, 6 − (0 + 12) / 2, 12 − (0 + 6) / 2
        ("leave-one-out", [-1.5, 0, 1.5, -9, 0, 9]),
        # (1 − 2) / 2 and so on; (0 − 6) / 6
        ("max-rl", [-0.5, 0, 0.5, -1, 0, 1]),
    ],
)
def test_the_advantage_is_that_worked_by_hand_within_each_group(mode: Advantage, expected: list[float]) -> None:
    assert advantages([1, 2, 3, 0, 6, 12], group_size=3, mode=mode) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("mode", "outlier", "others"),
    [
        # Mean 1/8
        ("mean", 7 / 8, -1 / 8),
        # Variance (49/64 + 7 · 1/64) / 7 = 1/8
        ("mean-std", 7 / 8 * math.sqrt(8), -1 / 8 * math.sqrt(8)),
        # 1 − 0; 0 − 1/7
        ("leave-one-out", 1, -1 / 7),
        # (1 − 1/8) / (1/8); (0 − 1/8) / (1/8)
        ("max-rl", 7, -1),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_success_among_eight_has_the_advantage_worked_by_hand(
    mode: Advantage, outlier: float, others: float, dtype: torch.dtype
) -> None:
    rewards = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0], dtype=dtype)
    expected = [others] * 3 + [outlier] + [others] * 4
    assert group_advantage(rewards, 8, mode).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_default_subtracts_the_mean_alone() -> None:
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert group_advantage(rewards, 4).tolist() == [-0.25, -0.25, -0.25, 0.75]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.1, 1 / 3, 0.7, 1000.1])
@pytest.mark.parametrize("group_size", [2, 3, 7, 8, 16])
def test_a_group_of_equal_rewards_gets_exact_zeros(
    group_size: int, reward: float, mode: Advantage, dtype: torch.dtype
) -> None:
    equal = torch.full((group_size,), reward, dtype=dtype)
    one_unscored = equal.clone()
    one_unscored[0] = math.nan
    assert (of_equal_lengths(torch.cat([equal, one_unscored]), group_size, mode) == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [-1e3, 1e-3, 1.0])
def test_rewards_that_differ_by_their_rounding_alone_get_exact_zeros(
    scale: float, mode: Advantage, dtype: torch.dtype
) -> None:
    reward = torch.tensor(0.9, dtype=dtype)
    neighbor = reward * (1 + torch.finfo(dtype).eps)
    assert neighbor != reward
    rewards = torch.stack([reward, neighbor, reward, torch.full_like(reward, math.nan)]) * scale
    assert of_equal_lengths(rewards, 4, mode).tolist() == [0, 0, 0, 0]
    if scale > 0 or mode != "max-rl":
        assert (of_equal_lengths(torch.tensor([1, 1, 1.0625], dtype=dtype) * scale, 3, mode) != 0).all()


def test_the_same_reward_summed_from_other_parts_gets_zero() -> None:
    rewards = torch.tensor([0.6, 0.6, 0.9]) + torch.tensor([0.3, 0.3, 0.0])
    assert rewards[0] != rewards[2]
    assert group_advantage(rewards, 3, "mean-std").tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_a_group_of_one_gets_zero(mode: Advantage) -> None:
    assert advantages([5.0, -3.0, math.nan], group_size=1, mode=mode) == [0, 0, 0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Mean 2 of 1 and 3
        ("mean", [-1, 0, 1, 0]),
        # Standard deviation √((1 + 1) / 1)
        ("mean-std", [-1 / math.sqrt(2), 0, 1 / math.sqrt(2), 0]),
        # 1 − 3; 3 − 1
        ("leave-one-out", [-2, 0, 2, 0]),
        # (1 − 2) / 2; (3 − 2) / 2
        ("max-rl", [-0.5, 0, 0.5, 0]),
    ],
)
def test_a_completion_that_could_not_be_scored_counts_in_no_mean_and_gets_zero(
    mode: Advantage, expected: list[float]
) -> None:
    assert advantages([1, math.nan, 3, math.nan], group_size=4, mode=mode) == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_group_with_one_or_no_score_gets_zeros_and_leaves_the_others_alone(mode: Advantage) -> None:
    nan = math.nan
    with_unscored = advantages([nan, nan, nan, 1, 2, 6, nan, 4, nan], group_size=3, mode=mode)
    assert with_unscored[:3] == with_unscored[6:] == [0, 0, 0]
    assert with_unscored[3:6] == advantages([1, 2, 6], group_size=3, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_advantages_are_computed_in_fp32_or_in_fp64_if_rewards_have_it(
    given: torch.dtype, computed: torch.dtype, mode: Advantage
) -> None:
    # Two of these overflow fp16.
    advantage = of_equal_lengths(torch.tensor([60000, 60000, 0], dtype=given), 3, mode)
    assert advantage.dtype == computed
    reference = of_equal_lengths(torch.tensor([60000, 60000, 0], dtype=given).double(), 3, mode)
    torch.testing.assert_close(advantage.double(), reference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_no_rewards_give_no_advantages(mode: Advantage) -> None:
    assert advantages([], group_size=4, mode=mode) == []


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_an_infinite_reward_is_refused_naming_the_completion(mode: Advantage, value: float) -> None:
    with pytest.raises(ValueError, match=f"reward of completion 2 is {value}; expected a finite number, or NaN"):
        advantages([1, math.nan, value, 0], group_size=2, mode=mode)


@pytest.mark.parametrize(
    ("shape", "group_size"), [((7,), 2), ((2, 4), 4), ((), 1), ((4,), 0), ((4,), -2)], ids=lambda v: str(v)
)
def test_rewards_that_are_not_whole_groups_are_refused(shape: tuple[int, ...], group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"expected one dimension, a multiple of group_size={group_size}"):
        group_advantage(torch.zeros(shape), group_size)


def test_an_unknown_mode_is_refused_with_the_nearest_match() -> None:
    with pytest.raises(ValueError, match=r"unknown advantage 'mean_std'; did you mean 'mean-std'\?.*leave-one-out"):
        group_advantage(torch.zeros(4), 2, "mean_std")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "expected"),
    # Of rewards 1, -1, 1, 0: the mean is 1/4, the sum of squares 2.75.
    [
        ("mean", [0.75, -1.25, 0.75, -0.25]),
        ("mean-std", [(x - 0.25) / math.sqrt(2.75 / 3) for x in (1, -1, 1, 0)]),
        ("leave-one-out", [1.0, -5 / 3, 1.0, -1 / 3]),
    ],
)
@pytest.mark.parametrize("unit", [1e-30, 1e30, 1e38])
def test_rewards_of_any_magnitude_have_the_advantages_worked_by_hand(
    mode: Advantage, expected: list[float], unit: float
) -> None:
    rewards = torch.tensor([1.0, -1.0, 1.0, 0.0]) * unit
    by_hand = torch.tensor(expected) * (1 if mode == "mean-std" else unit)
    torch.testing.assert_close(group_advantage(rewards, 4, mode), by_hand, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["mean", "leave-one-out"])
def test_advantages_that_no_float_can_hold_are_refused(mode: Advantage) -> None:
    with pytest.raises(ValueError, match=r"advantages of rewards up to 3e\+38 exceed torch.float32"):
        group_advantage(torch.tensor([3e38, -3e38, 3e38, 0.0]), 4, mode)


def test_max_rl_refuses_a_negative_reward_in_a_group_with_advantages() -> None:
    with pytest.raises(
        ValueError, match=r"reward of completion 3 is -1; max-rl divides by a group's mean, expected at"
    ):
        group_advantage(torch.tensor([-1.0, -1.0, 1.0, -1.0]), 2, "max-rl")


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e38])
def test_max_rl_does_not_change_with_the_unit_of_rewards(unit: float) -> None:
    # The mean of 1, 0, 0, 1 is 1/2.
    assert group_advantage(torch.tensor([1.0, 0.0, 0.0, 1.0]) * unit, 4, "max-rl").tolist() == [1, -1, -1, 1]


def test_the_baseline_may_be_the_mean_weighted_by_length() -> None:
    rewards, lengths = torch.tensor([1.0, 2, 3, 0, 6, math.nan]), torch.tensor([1, 2, 3, 2, 1, 9])
    # (1·1 + 2·2 + 3·3) / 6 = 7/3; (2·0 + 1·6) / 3 = 2
    expected = [-4 / 3, -1 / 3, 2 / 3, -2, 4, 0]
    assert group_advantage(rewards, 3, "length-weighted", lengths).tolist() == pytest.approx(expected)


def test_completions_of_equal_rewards_get_zeros_beside_one_without_tokens() -> None:
    rewards, lengths = torch.tensor([0.3, 0.3, 0.3, 1.0]), torch.tensor([7, 11, 3, 0])
    assert group_advantage(rewards, 4, "length-weighted", lengths).tolist() == [0, 0, 0, 0]


def test_it_is_that_of_verl() -> None:
    algorithms = pytest.importorskip("verl.trainer.ppo.core_algos")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (32,), generator=generator)
    mask = (torch.arange(8) < lengths[:, None]).float()
    scores = torch.randn(32, generator=generator)
    token_rewards = torch.zeros(32, 8).scatter(1, lengths[:, None] - 1, scores[:, None])
    expected = algorithms.compute_opo_outcome_advantage(token_rewards, mask, np.arange(32) // 4)[0]
    actual = group_advantage(scores, 4, "length-weighted", lengths)
    torch.testing.assert_close(actual[:, None] * mask, expected)


@pytest.mark.parametrize(("lengths", "shape"), [(None, "None"), (torch.ones(3), r"\(3,\)")])
def test_lengths_that_are_not_one_for_each_reward_are_refused(lengths: torch.Tensor | None, shape: str) -> None:
    with pytest.raises(ValueError, match=rf"lengths has shape {shape}; length-weighted needs \(4,\), as rewards has"):
        group_advantage(torch.zeros(4), 2, "length-weighted", lengths)
