"""The same tokens through verl's own policy losses, called as a library: loss and gradient, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights, compute_rollout_rejection_mask
from verl.workers.config import ActorConfig, PolicyLossConfig

from builders import random_tensors
from drpo import TokenBatch, aggregate, make_correction, make_objective

BETA = 0.3
KL_COV_SHARE = 0.3


def verl_loss(loss_mode: str, mode: str, settings: dict[str, Any], **tensors: Tensor) -> Tensor:
    policy_loss = PolicyLossConfig(
        loss_mode=loss_mode, dro_beta=BETA, clip_cov_ratio=1.0, kl_cov_ratio=KL_COV_SHARE, ppo_kl_coef=BETA
    )
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, policy_loss=policy_loss, **settings)
    loss, _ = get_policy_loss_fn(loss_mode)(loss_agg_mode=mode, config=config, **tensors)
    return loss


def clip(low: float, high: float, **more: float) -> dict[str, float]:
    """Where verl keeps the bounds of every objective; clip_ratio itself is read only if these are not set, and they are."""
    return {"clip_ratio_low": low, "clip_ratio_high": high, **more}


CLIP = {"clip_low": 0.2, "clip_high": 0.28}
MODES = ["token-mean", "seq-mean-token-sum"]


@pytest.mark.parametrize("spread", [0.3, 2.0])
@pytest.mark.parametrize(
    ("loss_mode", "settings", "objective", "hyperparameters", "modes"),
    [
        ("vanilla", clip(0.2, 0.28), "ppo_dual_clip", {**CLIP, "clip_dual": 3.0}, MODES),
        # verl's DPPO keeps its threshold among the clip ratios, and truncates the ratio at a bound not reached here.
        ("dppo_tv", clip(0.15, 0.15, clip_ratio_c=1e9), "dppo_tv", {"delta": 0.15}, MODES),
        ("dppo_kl", clip(0.05, 0.05, clip_ratio_c=1e9), "dppo_kl", {"delta": 0.05}, MODES),
        ("gspo", clip(0.2, 0.28), "gspo", CLIP, MODES),
        # verl averages over a sequence with 1e-8 added to its length, whence the long rows.
        ("sapo", {}, "sapo", {}, ["seq-mean-token-mean"]),
        ("geo_mean", clip(0.4, 0.4), "gmpo", {}, ["seq-mean-token-mean"]),
        ("cispo", clip(10.0, 0.2), "cispo", {}, MODES),
        ("dro", {}, "dro", {"beta": BETA}, MODES),
        # A share of all: which of fewer are drawn is chance, in verl too.
        ("clip_cov", clip(0.2, 0.28), "clip_cov", {**CLIP, "share": 1.0}, MODES),
        ("kl_cov", {}, "kl_cov", {"share": KL_COV_SHARE, "beta": BETA}, MODES),
    ],
)
def test_loss_and_gradient_are_those_of_verl(
    loss_mode: str,
    settings: dict[str, Any],
    objective: str,
    hyperparameters: dict[str, float],
    modes: list[Any],
    spread: float,
) -> None:
    given = random_tensors(seed=1, shape=(8, 120), spread=spread)
    mask = given["mask"]
    logp, behavior_logp = (given[name].detach().nan_to_num(-1.0) for name in ("logp", "behavior_logp"))
    # No two are equal: of equal covariances verl's kl_cov takes some and ours all.
    logp = logp - 1e-6 * torch.rand(logp.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    advantage = torch.randn(8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).expand(8, 120)
    for mode in modes:
        theirs = logp.clone().requires_grad_()
        expected = verl_loss(
            loss_mode,
            mode,
            settings,
            old_log_prob=behavior_logp,
            log_prob=theirs,
            advantages=advantage,
            response_mask=mask,
        )
        expected.backward()

        ours = logp.clone().requires_grad_()
        batch = TokenBatch(logp=ours, behavior_logp=behavior_logp, advantage=advantage, mask=mask)
        loss = aggregate(make_objective(objective, **hyperparameters).loss(batch), mask, mode)
        loss.backward()

        assert theirs.grad is not None
        assert theirs.grad.norm() > 1e-3
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-15)
        if not loss_mode.startswith("dppo"):
            torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_the_value_of_dppo_in_verl_is_a_weighted_log_likelihood_and_here_the_surrogate() -> None:
    """The one value that differs; the gradients are the same."""
    ratio, advantage = torch.tensor([[1.2, 0.9]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    behavior_logp = torch.tensor([[0.1, 0.2]], dtype=torch.float64).log()
    logp, mask = behavior_logp + ratio.log(), torch.ones(1, 2, dtype=torch.bool)
    theirs = verl_loss(
        "dppo_tv",
        "token-mean",
        clip(0.15, 0.15, clip_ratio_c=20.0),
        old_log_prob=behavior_logp,
        log_prob=logp,
        advantages=advantage,
        response_mask=mask,
    )
    assert theirs.item() == pytest.approx(-(ratio * logp).mean().item())
    batch = TokenBatch(logp, behavior_logp, advantage, mask)
    assert aggregate(make_objective("dppo_tv").loss(batch), mask).item() == pytest.approx(-ratio.mean().item())


@pytest.mark.parametrize(
    ("name", "hyperparameters", "rollout_rs", "threshold"),
    [
        ("sequence_max_k3", {"delta": 0.1}, "seq_max_k3", 0.1),
        ("sequence_mean_k3", {"delta": 0.04}, "seq_mean_k3", 0.04),
        # verl's bounds are those of the inverse, μ/π_old.
        ("sequence_geometric", {"low": 1 / 1.1, "high": 1 / 0.95}, "seq_mean_k1", "0.95_1.1"),
    ],
)
def test_what_sequence_masks_drop_is_what_verl_rejects(
    name: str, hyperparameters: dict[str, float], rollout_rs: str, threshold: float | str
) -> None:
    given = random_tensors(seed=1, shape=(200, 12), spread=0.3)
    mask = given["mask"]
    logp, behavior_logp = (given[name].detach().nan_to_num(-1.0) for name in ("logp", "behavior_logp"))
    theirs, _ = compute_rollout_rejection_mask(logp - behavior_logp, mask.double(), rollout_rs, threshold)
    batch = TokenBatch(logp, behavior_logp, torch.ones(200), mask, logp, anchor="old")
    ours = make_correction(name, **hyperparameters).weight(batch)
    assert torch.equal(ours * mask, theirs)
    assert 0.1 < theirs.sum() / mask.sum() < 0.9


@pytest.mark.parametrize(
    ("name", "hyperparameters", "rollout_is", "threshold"),
    [
        ("token_truncate", {"cap": 1.2}, "token", 1.2),
        ("token_mask", {"low": 0.8, "high": 1.2}, "token", "0.8_1.2"),
        ("sequence_truncate", {"cap": 1.2}, "sequence", 1.2),
        ("sequence_mask", {"low": 0.5, "high": 2.0}, "sequence", "0.5_2.0"),
    ],
)
def test_weights_by_the_mismatch_are_those_of_verl(
    name: str, hyperparameters: dict[str, float], rollout_is: str, threshold: float | str
) -> None:
    given = random_tensors(seed=1, shape=(200, 12), spread=0.3)
    mask = given["mask"]
    logp, behavior_logp = (given[name].detach().nan_to_num(-1.0) for name in ("logp", "behavior_logp"))
    theirs, _ = compute_rollout_correction_weights(logp - behavior_logp, mask.double(), rollout_is, threshold)
    batch = TokenBatch(logp, behavior_logp, torch.ones(200), mask, logp, anchor="old")
    correction = make_correction(name, **hyperparameters)
    torch.testing.assert_close(correction.weight(batch) * mask, theirs, rtol=1e-9, atol=1e-15)
    outside = correction.is_outside(batch).expand_as(mask)[mask]
    assert outside.any()
    assert not outside.all()
