"""DRPOConfig: what it derives, takes and refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from drpo import DRPOConfig, DRPOTrainer
from drpo.rewards import exact_answer
from drpo.trainer.refused import AS_IN_TRL, REFUSED
from support.rollouts import config, load_model


def test_derives_the_rollout_from_one_knob(tmp_path: Path) -> None:
    args = config(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2, updates_per_rollout=4)
    assert (args.steps_per_generation, args.generation_batch_size, args.num_iterations) == (8, 64, 1)


@pytest.mark.parametrize(
    "settings", [{"top_k": -1}, {"scale_rewards": False}, {"min_p": 0.0}, {"generation_kwargs": {"use_cache": True}}]
)
def test_takes_what_changes_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"steps_per_generation": 3, "updates_per_rollout": 4},
            r"steps_per_generation=3 contradicts updates_per_rollout=4 × .* = 4; for rollouts of that size give "
            "updates_per_rollout=3 in place of steps_per_generation",
        ),
        (
            {"generation_batch_size": 64, "per_device_train_batch_size": 8},
            r"generation_batch_size=64 contradicts .* = 32; for rollouts of that size give updates_per_rollout=8 in place of",
        ),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            r"= 8; leave it out \(a rollout is whole updates of 2\)",
        ),
        ({"updates_per_rollout": 0}, "updates_per_rollout is 0; expected a whole number, at least 1"),
        ({"objective": "drop"}, "unknown objective 'drop'; did you mean 'dro' or 'drpo'"),
        ({"objective_kwargs": {"delte": 1}}, "did you mean 'delta'"),
        ({"aggregation": "token-men"}, "did you mean 'token-mean'"),
        ({"aggregation": "seq-mean-token-sum-norm"}, "horizon is None"),
        ({"advantage": "mean-sd"}, "did you mean 'mean-std'"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a finite number > 0"),
        ({"audit_threshold": float("nan")}, "audit_threshold is nan"),
        (
            {"tokens_per_micro_batch": 0},
            "tokens_per_micro_batch is 0; expected a whole number, at least 1",
        ),
        ({"updates_per_rollout": 2.5}, "updates_per_rollout is 2.5"),
        ({"objective_kwargs": [1]}, r"objective_kwargs is \[1\]; expected a mapping"),
        ({"anchor": "olt"}, "unknown anchor 'olt'; did you mean 'old'"),
        ({"objective": "ppo", "correction": "token_cap"}, "unknown correction 'token_cap'"),
        ({"correction": "token_mask"}, "correction: TokenMask weighs by π_old/μ .* against μ already"),
        ({"objective": "ppo", "correction_kwargs": {"cap": 2}}, "correction_kwargs is .* without a correction"),
        (
            {"objective": "ppo", "correction": "token_mask", "correction_kwargs": {"cap": 2}},
            "unknown hyperparameter of token_mask 'cap'",
        ),
        ({"objective": "icepop", "correction": "token_mask"}, "IcePop weighs tokens by π_old/μ itself"),
        ({"objective": "icepop", "anchor": "sampler"}, "anchor: got 'sampler' with IcePop"),
        ({"objective": "pdm", "anchor": "old"}, "anchor: got 'old' with PDM"),
        (
            {"objective": "drpo_topk", "anchor": "old", "correction": "token_mask"},
            "anchor: got 'old' with DRPOTopK",
        ),
        ({"objective": "ppo", "correction": ""}, "unknown correction ''"),
        ({"generation_kwargs": {"do_sample": False}}, "generation_kwargs has 'do_sample'"),
        ({"generation_kwargs": {"top_k": 20}}, "generation_kwargs has 'top_k'"),
    ],
)
def test_refuses_contradictions(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize("name", list(REFUSED))
def test_refuses_what_it_would_ignore(tmp_path: Path, name: str) -> None:
    default = DRPOConfig.__dataclass_fields__[name].default
    other = not default if isinstance(default, bool) else "other" if isinstance(default, str) else 0.5
    with pytest.raises(ValueError, match=f"does not take {name}="):
        config(tmp_path, **{name: other})


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [(name, value, kept) for name, values in AS_IN_TRL.items() for value, kept in values.items()],
)
def test_a_refusal_says_what_trains_as_trl_did(tmp_path: Path, name: str, value: Any, kept: str) -> None:
    with pytest.raises(ValueError, match=rf"; as in TRL: {re.escape(kept)}$"):
        config(tmp_path, **{name: value})
    config(tmp_path, **eval(f"dict({kept})", {"max_completion_length": 256}))


def test_is_what_the_trainer_asks_for(tmp_path: Path) -> None:
    model, tokenizer = load_model()
    with pytest.raises(TypeError, match="args is a GRPOConfig; expected a DRPOConfig"):
        DRPOTrainer(
            model=model,
            reward_funcs=exact_answer,
            args=GRPOConfig(str(tmp_path), bf16=False),
            processing_class=tokenizer,
        )  # type: ignore[arg-type]


def test_without_a_gpu_the_defaults_train_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert not DRPOConfig(str(tmp_path)).bf16
    assert DRPOConfig(str(tmp_path), use_cpu=True).bf16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "/no/such/model"}, "model: '/no/such/model' is no folder; expected one, or a name on the hub"),
        ({"model": Path("no/such/model")}, "model: 'no/such/model' is no folder"),
        ({"reward_funcs": 3}, "reward_funcs has 3; expected functions"),
        ({"train_dataset": Dataset.from_list([{"promt": "1="}])}, "no column 'prompt': .*did you mean 'promt'"),
        (
            {"train_dataset": Dataset.from_list([{"prompt": "1="}, {"prompt": ""}])},
            "row 1: prompt is ''; expected text",
        ),
        ({"train_dataset": Dataset.from_list([{"prompt": 3}])}, "row 0: prompt is 3; expected text"),
    ],
)
def test_a_wrong_argument_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(GRPOTrainer, "__init__", lambda *_, **__: pytest.fail("TRL's trainer was begun"))
    right = {
        "model": "arithmetic",
        "reward_funcs": exact_answer,
        "train_dataset": Dataset.from_list([{"prompt": "1="}]),
    }
    with pytest.raises((TypeError, ValueError), match=message):
        DRPOTrainer(args=config(tmp_path), **{**right, **arguments})
