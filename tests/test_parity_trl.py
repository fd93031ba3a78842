"""The same tokens through TRL's own losses, called as a library: loss and gradient, in fp64."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from builders import random_tensors
from drpo import Corrected, TokenBatch, aggregate, make_correction, make_objective

HORIZON = 50
EPSILON, EPSILON_HIGH = 0.2, 0.28


def trl_loss(
    loss_type: str, logp: Tensor, behavior_logp: Tensor, advantage: Tensor, mask: Tensor, **settings: Any
) -> Tensor:
    """TRL's loss of a batch whose log-probs are given, out of training, where no accumulation scales it."""
    accelerator = SimpleNamespace(num_processes=1, reduce=lambda t, reduction: t, gather=lambda t: t)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        _metrics={"eval": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=accelerator,
        args=SimpleNamespace(
            delta=settings.get("delta"),
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        ),
        aux_loss_enabled=False,
        beta=0.0,
        epsilon_low=EPSILON,
        epsilon_high=settings.get("epsilon_high", EPSILON_HIGH),
        importance_sampling_level=settings.get("importance_sampling_level", "token"),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        loss_type=loss_type,
        max_completion_length=HORIZON,
        model=SimpleNamespace(training=False),
        off_policy_mask_threshold=settings.get("off_policy_mask_threshold"),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    ids = torch.zeros(logp.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": ids[:, :0],
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantage,
        "old_per_token_logps": behavior_logp,
        "num_items_in_batch": mask.sum(),
    }
    if "sampler_logp" in settings:
        inputs["sampling_per_token_logps"] = settings["sampler_logp"]
    return GRPOTrainer._compute_loss(trainer, None, inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss_type", "objective", "hyperparameters", "mode", "settings"),
    [
        ("grpo", "ppo", {"clip_low": EPSILON, "clip_high": EPSILON_HIGH}, "seq-mean-token-mean", {}),
        ("dapo", "ppo", {"clip_low": EPSILON, "clip_high": EPSILON_HIGH}, "token-mean", {}),
        ("dr_grpo", "ppo", {"clip_low": EPSILON, "clip_high": EPSILON_HIGH}, "seq-mean-token-sum-norm", {}),
        # TRL's epsilon_high of CISPO bounds r itself.
        ("cispo", "cispo", {"clip_high": 4.0}, "token-mean", {"epsilon_high": 5.0}),
        ("sapo", "sapo", {}, "seq-mean-token-mean", {}),
        ("vespo", "vespo", {}, "token-mean", {}),
        # The same with the sequence's ratio, which is the mean over its tokens.
        (
            "grpo",
            "gspo",
            {"clip_low": EPSILON, "clip_high": EPSILON_HIGH},
            "seq-mean-token-mean",
            {"importance_sampling_level": "sequence"},
        ),
        # LUSPO: every token has its sequence's loss, and they add up.
        (
            "luspo",
            "gspo",
            {"clip_low": EPSILON, "clip_high": EPSILON_HIGH},
            "seq-mean-token-sum",
            {"importance_sampling_level": "sequence"},
        ),
        # TRL's two-sided clip is the dual clip.
        (
            "dapo",
            "ppo_dual_clip",
            {"clip_low": EPSILON, "clip_high": EPSILON_HIGH, "clip_dual": 3.0},
            "token-mean",
            {"delta": 3.0},
        ),
    ],
)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_loss_and_gradient_are_those_of_trl(
    loss_type: str,
    objective: str,
    hyperparameters: dict[str, float],
    mode: Any,
    settings: dict[str, Any],
    spread: float,
) -> None:
    given = random_tensors(seed=1, shape=(8, 12), spread=spread)
    mask = given["mask"]
    mask[:, 0] = True  # TRL counts a row without tokens as a sequence; this library does not
    advantage = given["advantage"].nan_to_num(0.5)[:, 0]
    logp, behavior_logp = (given[name].detach().nan_to_num(-1.0) for name in ("logp", "behavior_logp"))

    theirs = logp.clone().requires_grad_()
    expected = trl_loss(loss_type, theirs, behavior_logp, advantage, mask, **settings)
    expected.backward()

    ours = logp.clone().requires_grad_()
    batch = TokenBatch(logp=ours, behavior_logp=behavior_logp, advantage=advantage, mask=mask)
    horizon = HORIZON if mode == "seq-mean-token-sum-norm" else None
    loss = aggregate(make_objective(objective, **hyperparameters).loss(batch), mask, mode, horizon=horizon)
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-15)
    assert theirs.grad is not None
    assert theirs.grad.norm() > 1e-4


@pytest.mark.parametrize("threshold", [0.02, 0.5])
def test_off_policy_sequence_masking_is_that_of_trl(threshold: float) -> None:
    given = random_tensors(seed=1, shape=(40, 12))
    mask = given["mask"]
    mask[:, 0] = True
    advantage = given["advantage"].nan_to_num(0.5)[:, 0]
    logp, old_logp, sampler_logp = (
        given[name].detach().nan_to_num(-1.0) for name in ("logp", "old_logp", "behavior_logp")
    )
    theirs = logp.clone().requires_grad_()
    settings = {"off_policy_mask_threshold": threshold, "sampler_logp": sampler_logp}
    expected = trl_loss("dapo", theirs, old_logp, advantage, mask, **settings)
    expected.backward()

    ours = logp.clone().requires_grad_()
    batch = TokenBatch(ours, sampler_logp, advantage, mask, old_logp, anchor="old")
    correction = make_correction("opsm", delta=threshold)
    loss = aggregate(Corrected(make_objective("ppo"), correction).loss(batch), mask)
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-15)
    dropped = (correction.weight(batch)[:, 0] == 0)[advantage < 0]
    assert dropped.any()
    assert not dropped.all()
