"""Groups without an advantage make way for those of further prompts, within a budget and over a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from drpo import DRPOTrainer
from drpo.data.problems import builtin_problems
from drpo.rollout.recorder import NOT_IN_SUPPORT
from drpo.trainer.batch import RolloutBatch
from drpo.trainer.dynamic_sampling import replace_rows
from support.rollouts import GradientKeeper, config, flat, made_up_reward, made_up_rollout, make_trainer

GROUP = 8


class Kept(DRPOTrainer):
    """Keeps its rollouts, and counts the prompts that it sampled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rollouts: list[RolloutBatch] = []
        self.sampled = 0

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.rollouts.append(cast(RolloutBatch, dict(output)))
        return output

    def _sample(self, inputs: list[dict[str, Any]]) -> RolloutBatch:
        self.sampled += len(inputs) // GROUP
        return super()._sample(inputs)

    def prompts(self) -> list[str]:
        """Of the last rollout's groups."""
        return self.processing_class.batch_decode(self.rollouts[-1]["prompt_ids"][::GROUP], skip_special_tokens=True)


@pytest.fixture(scope="module")
def problems() -> Dataset:
    return Dataset.from_list([vars(problem) for problem in builtin_problems("train", 64, seed=0)])


def dynamic(output: Path, problems: Dataset, rounds: int, **settings: Any) -> Kept:
    given = {
        "rollout_func": made_up_rollout,
        "reward_funcs": made_up_reward,
        "num_generations": GROUP,
        "per_device_train_batch_size": 64,
        "updates_per_rollout": 1,
        "audit_threshold": 100.0,
        "max_steps": 1,
        **settings,
    }
    return make_trainer(output, problems, kind=Kept, dynamic_sampling_rounds=rounds, **given)


def has_advantage(trainer: Kept) -> Tensor:
    return (trainer.rollouts[-1]["advantages"].view(-1, GROUP) != 0).any(dim=1)


def test_the_gradient_is_that_of_a_rollout_of_groups_with_an_advantage(tmp_path: Path, problems: Dataset) -> None:
    filled, plain = GradientKeeper(), GradientKeeper()
    trainer = dynamic(tmp_path, problems, 9, callbacks=[filled])
    trainer.train()
    assert has_advantage(trainer).all()
    chosen = [problem for text in trainer.prompts() for problem in problems if problem["prompt"] == text]
    assert len(chosen) == 8
    other = dynamic(tmp_path, Dataset.from_list(chosen), 0, callbacks=[plain], shuffle_dataset=False)
    other.train()
    assert other.prompts() == trainer.prompts()
    expected, actual = flat(plain.gradient), flat(filled.gradient)
    assert (actual - expected).norm() <= 1e-6 * expected.norm()
    assert int(trainer.rollouts[0]["num_items_in_batch"]) == int(other.rollouts[0]["num_items_in_batch"])


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_no_more_rounds_are_sampled_than_allowed(tmp_path: Path, problems: Dataset, rounds: int) -> None:
    def equal(prompts: list[str], **_: Any) -> list[float]:
        return [1.0 if "1" in prompt else 0.0 for prompt in prompts]

    trainer = dynamic(tmp_path, problems, rounds, reward_funcs=equal)
    trainer.train()
    assert trainer.sampled == 8 * (1 + rounds)
    assert not has_advantage(trainer).any()
    row = trainer.state.log_history[0]
    assert row.get("dynamic_sampling/rounds") == (rounds or None)
    assert row.get("dynamic_sampling/replaced") == (0 if rounds else None)
    assert row["untrained/equal_rewards"] == 1


def test_a_rollout_whose_groups_all_have_an_advantage_samples_no_more(tmp_path: Path, problems: Dataset) -> None:
    def parity(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(number % 2) for number in range(len(completion_ids))]

    trainer = dynamic(tmp_path, problems, 3, reward_funcs=parity)
    trainer.train()
    assert trainer.sampled == 8
    assert trainer.state.log_history[0]["dynamic_sampling/rounds"] == 0


def test_the_log_says_of_rewards_what_it_says_without(tmp_path: Path, problems: Dataset) -> None:
    rows = []
    for rounds in (0, 9):
        trainer = dynamic(tmp_path, problems, rounds)
        trainer.train()
        rows.append(trainer.state.log_history[0])
    names = ("reward", "reward_std", "rewards/made_up_reward/mean", "completions/mean_length")
    assert [rows[0][name] for name in names] == [rows[1][name] for name in names]
    assert rows[1]["dynamic_sampling/replaced"] > 0


def counts(trainer: Kept) -> dict[str, float]:
    row = trainer.state.log_history[-2]
    return {name: value for name, value in row.items() if name.startswith("dynamic_sampling/")}


def test_a_resumed_run_samples_the_same_further_prompts(tmp_path: Path, problems: Dataset) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    whole, resumed = (dynamic(tmp_path, problems, 2, max_steps=3, **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.prompts() == whole.prompts()
    assert counts(resumed) == counts(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_rank_may_have_part_of_a_group_where_nothing_is_replaced(tmp_path: Path, problems: Dataset) -> None:
    trainer = dynamic(tmp_path, problems, rounds=0)
    part: RolloutBatch = {"completion_mask": torch.ones(GROUP // 2, 3), "advantages": torch.zeros(GROUP // 2)}
    assert trainer._dynamic_sampling.fill(part, lambda _: part, {}) is part


def test_further_prompts_come_once_before_any_comes_again(tmp_path: Path, problems: Dataset) -> None:
    sampling = dynamic(tmp_path, problems, 1)._dynamic_sampling
    drawn = [row["prompt"] for _ in range(4) for row in sampling._draw(32)[::GROUP]]
    assert sorted(drawn[:64]) == sorted(drawn[64:]) == sorted(problems["prompt"])
    assert drawn[:64] != drawn[64:]


def test_rows_are_replaced_with_their_padding() -> None:
    def batch(prompt: list[list[int]], completion: list[list[int]], advantages: list[float]) -> RolloutBatch:
        ids = {"prompt_ids": torch.tensor(prompt), "completion_ids": torch.tensor(completion)}
        masks = {name.replace("ids", "mask"): (tensor > 0).long() for name, tensor in ids.items()}
        return cast(
            RolloutBatch,
            {**ids, **masks, "advantages": torch.tensor(advantages), "num_items_in_batch": torch.tensor(0)},
        )

    old = batch([[0, 1], [2, 3]], [[4, 5, 6], [7, 0, 0]], [0.0, 1.0])
    new = batch([[8, 8, 8], [0, 0, 9]], [[1, 1], [2, 0]], [0.0, -1.0])
    filled = replace_rows(old, torch.tensor([0]), new, torch.tensor([1]))
    assert filled["prompt_ids"].tolist() == [[0, 0, 9], [0, 2, 3]]
    assert filled["completion_ids"].tolist() == [[2, 0, 0], [7, 0, 0]]
    assert filled["completion_mask"].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert filled["advantages"].tolist() == [-1.0, 1.0]
    assert filled["num_items_in_batch"] == 2


@pytest.mark.parametrize("has_tools", ["old", "new", "both"])
def test_a_rollout_without_tools_counts_all_of_its_tokens(has_tools: str) -> None:
    def batch(tool_mask: list[list[int]], has_mask: bool) -> RolloutBatch:
        ids = torch.tensor([[1, 2], [3, 4]])
        ones = torch.ones_like(ids)
        row: dict[str, Tensor] = {
            "prompt_ids": ids,
            "prompt_mask": ones,
            "completion_ids": ids,
            "completion_mask": ones,
        }
        return cast(RolloutBatch, row | ({"tool_mask": torch.tensor(tool_mask)} if has_mask else {}))

    old, new = batch([[1, 0], [0, 1]], has_tools != "new"), batch([[0, 1], [1, 0]], has_tools != "old")
    filled = replace_rows(old, torch.tensor([1]), new, torch.tensor([0]))
    assert filled["tool_mask"].tolist() == [
        [1, 1] if has_tools == "new" else [1, 0],
        [1, 1] if has_tools == "old" else [0, 1],
    ]


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 2)])
def test_supports_of_other_sizes_are_padded_with_what_is_in_none(old: int, new: int) -> None:
    def batch(size: int) -> RolloutBatch:
        ones = torch.ones(1, 2, dtype=torch.long)
        row = {"completion_ids": ones, "completion_mask": ones, "support_ids": torch.full((1, 2, size), 7)}
        return cast(RolloutBatch, row)

    filled = replace_rows(batch(old), torch.tensor([0]), batch(new), torch.tensor([0]))
    assert filled["support_ids"].tolist() == [[[7] * new + [NOT_IN_SUPPORT] * (3 - new)] * 2]


def test_a_group_that_is_masked_as_a_whole_is_replaced(tmp_path: Path, problems: Dataset) -> None:
    def masks_the_first(prompts: list[str], trainer: DRPOTrainer) -> dict[str, Any]:
        output = made_up_rollout(prompts, trainer)
        is_first = {prompt: prompt == prompts[0] and len(prompts) == 64 for prompt in prompts}
        pairs = zip(prompts, output["completion_ids"], strict=True)
        return {**output, "env_mask": [[int(not is_first[prompt])] * len(ids) for prompt, ids in pairs]}

    def alternating(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(number % 2) for number in range(len(completion_ids))]

    trainer = dynamic(tmp_path, problems, 3, rollout_func=masks_the_first, reward_funcs=alternating)
    trainer.train()
    assert trainer.state.log_history[0]["dynamic_sampling/replaced"] == 1
    assert trainer.rollouts[0]["tool_mask"].any(dim=1).all()


def test_further_prompts_may_have_no_scores_at_all(tmp_path: Path, problems: Dataset) -> None:
    def unscored(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None] * len(prompts) if len(prompts) < 64 else list(made_up_reward(prompts, completion_ids))

    trainer = dynamic(tmp_path, problems, 2, reward_funcs=unscored)
    trainer.train()
    assert trainer.state.log_history[0]["dynamic_sampling/replaced"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dynamic_sampling_rounds": -1}, "dynamic_sampling_rounds is -1; expected a whole number, at least 0"),
        (
            {"dynamic_sampling_rounds": 1, "world_size": 2},
            "dynamic_sampling_rounds=1 needs whole groups on each process.* = 4, got 8",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    size = settings.pop("world_size", 1)
    monkeypatch.setattr("drpo.trainer.config.DRPOConfig.world_size", size)
    given = {"per_device_train_batch_size": 8 // size, "num_generations": 8, "updates_per_rollout": 1}
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **given, **settings)
