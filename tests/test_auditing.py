"""A sampler with older weights than the trainer's is named, and no other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from drpo import DRPOTrainer
from drpo.data.problems import builtin_problems
from drpo.rollout.audit import AuditError, log_odds_mean, log_odds_sums
from drpo.trainer.auditing import CLEAR, RolloutAudits
from support.rollouts import config, load_model, make_trainer


@pytest.fixture(scope="module")
def problems() -> Dataset:
    return Dataset.from_list([vars(problem) for problem in builtin_problems("train", 64, seed=0)])


def frozen_sampler(prompts: list[str], trainer: DRPOTrainer) -> dict[str, Any]:
    """A rollout_func whose model never gets the trainer's weights."""
    model, tokenizer = load_model()
    prompt_ids = tokenizer(prompts)["input_ids"]
    completion_ids: list[list[int]] = []
    logprobs: list[list[float]] = []
    for prompt in prompt_ids:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(6):
                drawn = model(ids).logits[:, -1].softmax(-1).multinomial(1)
                ids = torch.cat([ids, drawn], dim=1)
            scores = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        completion_ids.append(ids[0, len(prompt) :].tolist())
        logprobs.append(scores.gather(1, ids[0, len(prompt) :, None]).squeeze(1).tolist())
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}


def parity(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def noise(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that is never the same for a whole group, whatever the policy does."""
    return torch.rand(len(completion_ids)).tolist()


STALE = {"learning_rate": 1e-3, "audit_threshold": 1.0, "per_device_train_batch_size": 32, "max_steps": 4}


@pytest.mark.parametrize("sampler", ["copy", "rollout_func"])
def test_a_sampler_that_keeps_old_weights_is_named_at_the_second_rollout(
    tmp_path: Path, problems: Dataset, sampler: str
) -> None:
    if sampler == "copy":
        trainer = make_trainer(tmp_path, problems, rollout_precision="bf16", **STALE)
        behavior = trainer._rollout_sampler.behavior
        begin_rollout, behavior.begin_rollout = behavior.begin_rollout, lambda policy: None
        begin_rollout(trainer.model)
    else:
        made_up = {"rollout_func": frozen_sampler, "reward_funcs": parity}
        trainer = make_trainer(tmp_path, problems, **made_up, **STALE)
    with pytest.raises(AuditError, match=r"the sampler did not get the new weights.*stale_sampler='warn'"):
        trainer.train()
    assert trainer.state.global_step == 2


def feed(gaps: list[float], changes: list[float]) -> None:
    """The check of each rollout's gap with the change since the first one."""
    trainer: Any = SimpleNamespace(args=SimpleNamespace(stale_sampler="stop"))
    audits = RolloutAudits(trainer, may_be_stale=True)
    for gap, change in zip(gaps, changes, strict=True):
        audits._changes = [(change, 1.0)] if change else []
        audits._check_weights(gap)


def test_a_sampler_that_falls_behind_slowly_is_named() -> None:
    changes = [0.004 * rollout for rollout in range(40)]
    # What the engine makes and what the updates made, of which the gap is the root of the squares' sum.
    gaps = [(0.02**2 + change**2) ** 0.5 for change in changes]
    with pytest.raises(AuditError, match="did not get the new weights"):
        feed(gaps, changes)


@pytest.mark.parametrize("seed", range(20))
def test_a_gap_that_crosses_a_slow_change_is_no_reason_to_stop(seed: int) -> None:
    # The gap of an engine varies threefold between rollouts.
    gaps = 0.02 * 3 ** torch.rand(100, generator=torch.Generator().manual_seed(seed))
    feed(gaps.tolist(), [0.004 * rollout for rollout in range(100)])


def test_a_stale_sampler_may_be_warned_of(tmp_path: Path, problems: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    made_up = {"rollout_func": frozen_sampler, "reward_funcs": parity}
    trainer = make_trainer(tmp_path, problems, stale_sampler="warn", **made_up, **STALE)
    trainer.train()
    assert trainer.state.global_step == 4
    assert "The sampler did not get the new weights" in caplog.text
    with pytest.raises(ValueError, match="unknown stale_sampler 'wrn'; did you mean 'warn'"):
        config(tmp_path, stale_sampler="wrn")


def test_the_gap_of_an_engine_hardly_depends_on_how_sure_the_policy_is() -> None:
    torch.manual_seed(0)
    noise = 0.01 * torch.randn(4000, 50)
    means, gaps = [], []
    for scale in (0.5, 8.0):
        logits = scale * torch.randn(4000, 50)
        drawn = logits.softmax(-1).multinomial(1)
        prob, other = ((logits + part).softmax(-1).gather(1, drawn) for part in (0.0, noise))
        means.append((prob - other).abs().mean().item())
        gaps.append(log_odds_mean(log_odds_sums(prob, other, torch.ones_like(prob, dtype=torch.bool))[None])[0])
    # The mean |Δ log-odds| of such noise is 0.01 · √(2/π).
    assert gaps == pytest.approx([0.008, 0.008], rel=0.35)
    assert means[1] > 5 * means[0]


def test_tokens_that_do_not_count_are_not_in_the_gap() -> None:
    prob, other = torch.tensor([0.5, 0.9]), torch.tensor([0.4, 0.1])
    mean, weight = log_odds_mean(log_odds_sums(prob, other, torch.tensor([True, False]))[None])
    assert (mean, weight) == pytest.approx((0.1 / 0.245, 0.245))


@pytest.mark.parametrize("rollouts", [12, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "settings", [{}, {"rollout_precision": "bf16"}, {"rollout_precision": "fp8"}, {"rollout_lag": 2}]
)
def test_a_sampler_with_the_weights_of_now_is_never_called_stale(
    tmp_path: Path, problems: Dataset, settings: dict[str, Any], rollouts: int
) -> None:
    given = {**STALE, "max_steps": 2 * rollouts, "reward_funcs": noise, **settings}
    trainer = make_trainer(tmp_path, problems, **given)
    trainer.train()
    gaps, changes = (
        [row[name] for row in trainer.state.log_history if name in row] for name in ("audit/gap", "audit/change")
    )
    # With a lag, only the first rollout is sampled by the weights of now. A policy that samples has no others.
    counts = {"": (rollouts, 0), "rollout_precision": (rollouts, rollouts - 1), "rollout_lag": (1, 0)}
    assert (len(gaps), len(changes)) == counts["".join(settings)]
    # A sampler without them would have been found.
    assert not changes or max(changes) > CLEAR * gaps[0]


def test_a_sampler_that_keeps_old_weights_is_named_after_a_resume(tmp_path: Path, problems: Dataset) -> None:
    made_up = {"rollout_func": frozen_sampler, "reward_funcs": parity, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, problems, **made_up, **{**STALE, "max_steps": 2}).train()
    trainer = make_trainer(tmp_path, problems, **made_up, **STALE)
    with pytest.raises(AuditError, match="the sampler did not get the new weights"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 2
