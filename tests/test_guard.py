"""What is not finite is not trained on, and said."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from drpo.errors import TrainingStoppedError
from drpo.trainer.checkpoint import checkpoints_in
from drpo.trainer.collapse import StopOnCollapse
from support.rollouts import alternating_reward, config, make_trainer, weights


def poisoned(trainer: Any, *updates: int, value: float = torch.nan) -> Any:
    """The trainer, with one entry of a gradient replaced in these updates."""

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.state.global_step + 1 in updates:
            gradient = gradient.clone()
            gradient[0, 0] = value
        return gradient

    trainer.model.model.layers[1].mlp.up_proj.weight.register_hook(poison)
    return trainer


@pytest.mark.parametrize("clipping", [1.0, 0.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_once_is_skipped_and_counted(
    tmp_path: Path, problems: Dataset, value: float, clipping: float
) -> None:
    settings = {"max_steps": 4, "learning_rate": 1e-3, "max_grad_norm": clipping, "logging_steps": 1}
    trainer = poisoned(make_trainer(tmp_path, problems, **settings), 2, value=value)
    seen: list[dict[str, torch.Tensor]] = []
    step = trainer._get_grad_norm

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(weights(trainer))
        return step(*args, **kwargs)

    trainer._get_grad_norm = watched
    trainer.train()
    # Before the third update the weights are those before the second; then they move again.
    assert all(torch.equal(seen[1][name], weight) for name, weight in seen[2].items())
    assert any(not torch.equal(seen[2][name], weight) for name, weight in seen[3].items())
    assert all(weight.isfinite().all() for weight in weights(trainer).values())
    assert [row.get("updates/skipped") for row in trainer.state.log_history[:4]] == [None, 1.0, 1.0, 1.0]
    batch = load_file(tmp_path / "skipped_updates" / "update-000002-rank-0.safetensors")
    assert {"0.completion_ids", "0.sampling_per_token_logps", "0.advantages"} <= batch.keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens_per_micro_batch": 32},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"objective": "ppo", "split_distance": True, "tokens_per_micro_batch": 32},
    ],
    ids=str,
)
def test_an_update_in_parts_is_skipped_with_all_of_them(
    tmp_path: Path, problems: Dataset, settings: dict[str, Any]
) -> None:
    trainer = poisoned(make_trainer(tmp_path, problems, reward_funcs=alternating_reward, **settings), 2)
    trainer.train()
    assert all(weight.isfinite().all() for weight in weights(trainer).values())
    batch = load_file(tmp_path / "skipped_updates" / "update-000002-rank-0.safetensors")
    parts = [tensor for name, tensor in batch.items() if name.endswith(".completion_ids")]
    assert len(parts) > 1


def test_an_optimizer_remembers_nothing_of_a_skipped_update(tmp_path: Path, problems: Dataset) -> None:
    trainer = poisoned(make_trainer(tmp_path, problems, max_steps=2), 2)
    trainer.train()
    states = [state for state in trainer.optimizer.state.values() if "step" in state]
    assert {state["step"].item() for state in states} == {1}
    assert all(state["exp_avg"].isfinite().all() for state in states)


def test_where_a_scaled_loss_skips_updates_by_itself_no_batch_is_kept(tmp_path: Path, problems: Dataset) -> None:
    trainer = make_trainer(tmp_path, problems, max_steps=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    trainer.train()
    assert not trainer._guard._parts


def test_training_stops_after_so_many_in_a_row_and_names_the_first_cause(tmp_path: Path, problems: Dataset) -> None:
    settings = {"max_steps": 6, "max_skipped_updates": 2}
    trainer = poisoned(make_trainer(tmp_path, problems, **settings), 2, 4, 5)
    with pytest.raises(
        TrainingStoppedError, match=r"^2 updates in a row .* the first was update 4: the gradient is not"
    ):
        trainer.train()
    assert all(weight.isfinite().all() for weight in weights(trainer).values())


def test_a_log_prob_that_is_not_finite_is_named_and_not_trained_on(tmp_path: Path, problems: Dataset) -> None:
    trainer = make_trainer(tmp_path, problems, max_steps=6)
    forward = trainer.model.model.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        if trainer.state.global_step == 1 and torch.is_grad_enabled():
            outputs["last_hidden_state"] = outputs["last_hidden_state"] * torch.nan
        return outputs

    trainer.model.model.forward = broken
    with pytest.raises(ValueError, match=r"logp is nan at \[0, 0\], a token that counts"):
        trainer.train()
    assert all(weight.isfinite().all() for weight in weights(trainer).values())


@pytest.mark.parametrize("value", [3e38, -3e38, torch.inf])
def test_a_reward_beyond_all_bounds_is_named(tmp_path: Path, problems: Dataset, value: float) -> None:
    def huge(completions: list[str], **_: Any) -> list[float]:
        return [value, *[0.0] * (len(completions) - 1)]

    trainer = make_trainer(tmp_path, problems, reward_funcs=huge)
    before = weights(trainer)
    with pytest.raises(
        TrainingStoppedError,
        match=r"^reward huge: returned (-?3e\+38|inf) for completion 0, .*; expected a number of magnitude 1e\+09",
    ):
        trainer.train()
    assert all(torch.equal(before[name], weight) for name, weight in weights(trainer).items())


@pytest.mark.parametrize(
    ("rewards", "stops"),
    [
        ((0.2, 0.8, 0.3, 0.3), True),
        ((0.2, 0.8, 0.3, 0.4), False),
        ((0.2, 0.8, 0.3), False),
        ((0.2, 0.8, 0.3, 0.5, 0.3), False),
        ((-1.0, -4.0, -4.0), False),
        ((), False),
    ],
)
def test_a_reward_that_stays_below_half_of_its_best_is_a_collapse(rewards: tuple[float, ...], stops: bool) -> None:
    state = TrainerState()
    state.log_history = [{"step": 2 * place, "reward": reward} for place, reward in enumerate(rewards, 1)]
    with pytest.raises(TrainingStoppedError, match="below half") if stops else nullcontext():
        StopOnCollapse(2).on_log(config(Path("nowhere"), updates_per_rollout=2), state, TrainerControl())


def test_rollouts_in_collapse_are_counted_however_seldom_the_log_is_written() -> None:
    state = TrainerState()
    # Of two updates a rollout: the rows are five rollouts apart.
    state.log_history = [{"step": step, "reward": reward} for step, reward in ((10, 0.8), (20, 0.1))]
    arguments = config(Path("nowhere"), updates_per_rollout=2)
    StopOnCollapse(6).on_log(arguments, state, TrainerControl())
    with pytest.raises(TrainingStoppedError, match="for 5 rollouts"):
        StopOnCollapse(5).on_log(arguments, state, TrainerControl())


def test_the_best_checkpoint_from_before_a_collapse_is_kept_and_named(tmp_path: Path, problems: Dataset) -> None:
    calls = []

    def falls(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append(0)
        # In turns, so that each group has advantages: of the rollouts' means, the second is the best, the last ones fall.
        best = {1: 0.8, 2: 1.0}.get(len(calls), 0.7 if len(calls) <= 4 else 0.1)
        return [(place % 2) * best for place in range(len(completion_ids))]

    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 40, "save_total_limit": 2}
    trainer = make_trainer(tmp_path, problems, reward_funcs=falls, callbacks=[StopOnCollapse(4)], **saving)
    # A rollout has two updates: the second one's checkpoint is the fourth, and the eighth rollout's first is the fifteenth.
    with pytest.raises(
        TrainingStoppedError,
        match=rf"0\.05; it fell after update 7, and the best checkpoint is {tmp_path}/checkpoint-4$",
    ):
        trainer.train()
    assert trainer.state.global_step == 15
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-4", "checkpoint-14"]


@pytest.mark.parametrize("saved", [(10, 20, 30, 40), (20, 40)])
def test_the_best_checkpoint_is_the_same_whichever_others_are_there_and_known_again_in_a_run_that_goes_on(
    tmp_path: Path, saved: tuple[int, ...]
) -> None:
    for update in saved:
        (tmp_path / f"checkpoint-{update}").mkdir()
    # Ten updates each at 0.1, 0.9, 0.6 and 0.55, of two a rollout.
    state = TrainerState(global_step=40, max_steps=100)
    state.log_history = [
        {"step": 10 * window + step, "reward": reward}
        for window, reward in enumerate((0.1, 0.9, 0.6, 0.55))
        for step in range(1, 11)
    ]
    arguments = config(tmp_path, updates_per_rollout=2)
    StopOnCollapse(5).on_train_begin(arguments, state, TrainerControl())
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-20")
    # As training ends Transformers would delete the last one for it.
    state.global_step = 100
    StopOnCollapse(5).on_save(arguments, state, TrainerControl())
    assert state.best_model_checkpoint is None
