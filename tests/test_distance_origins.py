"""The distance from μ is told apart by where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from drpo import TokenBatch
from drpo.data.problems import builtin_problems
from drpo.trainer.batch import RolloutBatch
from drpo.trainer.distance_origins import DistanceOrigins
from drpo.trainer.token_log import TokenLog
from support.rollouts import make_trainer

ROUNDING = 1e-5


@pytest.fixture(scope="module")
def problems() -> Dataset:
    return Dataset.from_list([vars(problem) for problem in builtin_problems("train", 64, seed=0)])


def logged(output: Path, problems: Dataset, **settings: Any) -> list[dict[str, float]]:
    """Three rollouts of two updates each."""
    few = {"per_device_train_batch_size": 32, "updates_per_rollout": 2, "max_steps": 6, "learning_rate": 1e-3}
    given = {**few, "split_distance": True, "drop_zero_advantage": False, "audit_threshold": 1.0, **settings}
    trainer = make_trainer(output, problems, **given)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def test_the_parts_are_those_worked_by_hand() -> None:
    # μ 0.5, π with its weights 0.4, when the rollout began 0.6, now 0.3; and a token that does not count.
    def of(prob: float) -> torch.Tensor:
        return torch.tensor([[prob, float("nan")]]).log()

    mask = torch.tensor([[1, 0]])
    batch: RolloutBatch = {
        "completion_mask": mask,
        "lagged_per_token_logps": of(0.4),
        "old_per_token_logps": of(0.6),
    }
    split = DistanceOrigins()
    split.update(batch, TokenBatch(of(0.3), of(0.5), torch.ones(1), mask))
    measured = split.take(lambda tensor: tensor)
    for part, expected in (("engine", 0.1), ("staleness", 0.2), ("drift", 0.3)):
        assert measured[f"{part}/divergence/mean"] == pytest.approx(expected, rel=1e-5)
    assert split.take(lambda tensor: tensor) == {}


@pytest.mark.parametrize("fused", [True, False])
def test_one_fp32_model_has_no_gap_and_only_updates_move_it(tmp_path: Path, problems: Dataset, fused: bool) -> None:
    rows = logged(tmp_path, problems, fused_loss=fused)
    assert len(rows) == 6
    for update, row in enumerate(rows):
        assert row["engine/divergence/mean"] < ROUNDING
        assert "staleness/divergence/mean" not in row
        # Before the first update on a rollout, there is nothing but rounding.
        assert (row["drift/divergence/mean"] > ROUNDING) == (update % 2 == 1)
        assert row["drift/divergence/mean"] == pytest.approx(row["divergence/mean"], abs=ROUNDING)


def test_a_low_precision_sampler_is_all_gap_before_the_first_update(tmp_path: Path, problems: Dataset) -> None:
    for update, row in enumerate(logged(tmp_path, problems, rollout_precision="bf16")):
        assert row["engine/divergence/mean"] > ROUNDING
        if update % 2 == 0:
            assert row["drift/divergence/mean"] < ROUNDING
            assert row["engine/divergence/mean"] == pytest.approx(row["divergence/mean"], rel=0.01)


def test_old_samples_are_stale_before_the_first_update(tmp_path: Path, problems: Dataset) -> None:
    rows = logged(tmp_path, problems, rollout_lag=1)
    assert "staleness/divergence/mean" not in rows[0]
    for update, row in enumerate(rows[2:]):
        assert row["engine/divergence/mean"] < ROUNDING < row["staleness/divergence/mean"]
        if update % 2 == 0:
            assert row["drift/divergence/mean"] < ROUNDING
            assert row["staleness/divergence/mean"] == pytest.approx(row["divergence/mean"], abs=ROUNDING)


def test_measuring_changes_nothing(tmp_path: Path, problems: Dataset) -> None:
    settings = {"rollout_lag": 1}
    with_split, without = (
        [row["loss"] for row in logged(tmp_path, problems, split_distance=split, **settings)] for split in (True, False)
    )
    assert with_split == without


def test_recorded_rollouts_have_the_policy_that_the_rollout_began_with(tmp_path: Path, problems: Dataset) -> None:
    given = {"per_device_train_batch_size": 32, "drop_zero_advantage": False, "learning_rate": 1e-3}
    trainer = make_trainer(tmp_path, problems, split_distance=True, **given)
    trainer.token_log = TokenLog(trainer.processing_class)
    trainer.train()
    rows = trainer.token_log.take()
    # Of one fp32 model, that is what it sampled with.
    for row in rows:
        assert row["old_logp"] == pytest.approx(row["behavior_logp"], abs=1e-4)
    assert max(abs(a - b) for row in rows for a, b in zip(row["logp"], row["old_logp"], strict=True)) > 1e-3
