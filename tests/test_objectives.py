from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from builders import TIGHT, one_token, random_tensors
from drpo import OBJECTIVES, TokenBatch, make_objective
from drpo.objectives import CISPO, DGPO, DRPO, PG, PPO, SAPO, SPO, DPPOBinaryKL, DPPOBinaryTV, MaskDRPO, Objective
from drpo.objectives.drpo import _tell_confined


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


HYPERPARAMETERS = [(name, field.name) for name, cls in OBJECTIVES.items() for field in dataclasses.fields(cls)]


@pytest.mark.parametrize("tight", [True, False], ids=["tight", "defaults"])
@pytest.mark.parametrize("spread", [0.1, 2.0, 15.0, 1000.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_minus_advantage_times_ratio_times_weight(name: str, spread: float, tight: bool) -> None:
    objective = make_objective(name, **(TIGHT[name] if tight else {}))
    for seed in range(20):
        given = random_tensors(seed, spread=spread)
        batch = TokenBatch(**given)
        (gradient,) = torch.autograd.grad(objective.loss(batch).sum(), given["logp"])
        ratio, weight = batch.ratio.detach(), objective.gradient_weight(batch)
        # A weight near 0 is a difference of terms and keeps fewer digits than they have.
        torch.testing.assert_close(gradient, -batch.advantage * ratio * weight, rtol=1e-9, atol=0)
        assert not weight.requires_grad


# Where an objective stops a gradient, its loss is not what its gradient is the derivative of.
@pytest.mark.parametrize("tight", [True, False], ids=["tight", "defaults"])
@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if "sg(" not in objective.formula])
def test_the_loss_passes_gradcheck_away_from_kinks(name: str, tight: bool) -> None:
    objective = make_objective(name, **(TIGHT[name] if tight else {}))
    for seed in range(5):
        given = random_tensors(seed, shape=(4, 6))
        logp, mask = given.pop("logp").detach(), given.pop("mask")

        def weight(step: float, logp: Tensor = logp, given: Any = given, mask: Tensor = mask) -> Tensor:
            return objective.gradient_weight(TokenBatch(logp=logp + step, mask=mask, **given))

        # A weight that jumps within a step of 1e-4 has a kink there.
        mask = mask & ((weight(1e-4) - weight(-1e-4)).abs() < 0.5)
        assert mask.sum() > 8

        def loss(logp: Tensor, given: Any = given, mask: Tensor = mask) -> Tensor:
            return objective.loss(TokenBatch(logp=logp, mask=mask, **given))

        logp = torch.where(mask, logp, -1.0).requires_grad_()
        assert torch.autograd.gradcheck(loss, logp)


@pytest.mark.parametrize(
    ("objective", "prob", "behavior_prob", "advantage", "weight", "loss"),
    [
        # DRPO: r = 1.5; w = 1 − 0.2 / 0.1; L = −3 + 2 · 0.4 · 0.25 / 0.2
        pytest.param(DRPO(delta=0.1), 0.6, 0.4, 2.0, -1, -2, id="drpo-reversed"),
        # r = 1.125; w = 1 − 0.05 / 0.1; L = −2.25 + 2 · 0.4 · 0.015625 / 0.2
        pytest.param(DRPO(delta=0.1), 0.45, 0.4, 2.0, 0.5, -2.1875, id="drpo-attenuated"),
        # r = 0.75, moving back; w = 1 + 0.1 / 0.1; L = −1.5 + 2 · 0.4 · 0.0625 / 0.2
        pytest.param(DRPO(delta=0.1), 0.3, 0.4, 2.0, 2, -1.25, id="drpo-amplified"),
        # r = 0.5; w = 1 − 0.2 / 0.1; L = 0.5 + 1 · 0.4 · 0.25 / 0.2
        pytest.param(DRPO(delta=0.1), 0.2, 0.4, -1.0, -1, 1, id="drpo-negative-reversed"),
        # r = 1.5, moving back; w = 1 + 0.2 / 0.1; L = 1.5 + 1 · 0.4 · 0.25 / 0.2
        pytest.param(DRPO(delta=0.1), 0.6, 0.4, -1.0, 3, 2, id="drpo-negative-amplified"),
        pytest.param(DRPO(delta=0.1), 0.6, 0.4, 0.0, 1, 0, id="drpo-no-advantage"),
        # DPPO: |π − μ| = 0.2 > 0.15 and moving away
        pytest.param(DPPOBinaryTV(delta=0.15), 0.6, 0.4, 2.0, 0, 0, id="dppo-masked"),
        pytest.param(DPPOBinaryTV(delta=0.15), 0.2, 0.4, -1.0, 0, 0, id="dppo-negative-masked"),
        # |π − μ| = 0.2 > 0.15 but coming back; L = 1.5 · 2 and −0.5 · 1
        pytest.param(DPPOBinaryTV(delta=0.15), 0.6, 0.4, -2.0, 1, 3, id="dppo-coming-back"),
        pytest.param(DPPOBinaryTV(delta=0.15), 0.2, 0.4, 1.0, 1, -0.5, id="dppo-coming-up"),
        # r = 2 but |π − μ| = 0.1; L = −2 · 1
        pytest.param(DPPOBinaryTV(delta=0.15), 0.2, 0.1, 1.0, 1, -2, id="dppo-rare-inside"),
        pytest.param(DPPOBinaryTV(delta=0.15), 0.6, 0.4, 0.0, 1, 0, id="dppo-no-advantage"),
        # SPO: r = 3; w = 1 − 2 / 0.5; L = −3 + 1 · 4 / 1
        pytest.param(SPO(epsilon=0.5), 0.3, 0.1, 1.0, -3, 1, id="spo-reversed"),
        # r = 1.5; w = 1 − 0.5 / 0.5; L = −3 + 2 · 0.25 / 1
        pytest.param(SPO(epsilon=0.5), 0.6, 0.4, 2.0, 0, -2.5, id="spo-zeroed"),
        # r = 0.75, moving back; w = 1 + 0.25 / 0.5; L = −1.5 + 2 · 0.0625 / 1
        pytest.param(SPO(epsilon=0.5), 0.3, 0.4, 2.0, 1.5, -1.375, id="spo-amplified"),
        # r = 0.5; w = 1 − 0.5 / 0.5; L = 0.5 + 1 · 0.25 / 1
        pytest.param(SPO(epsilon=0.5), 0.2, 0.4, -1.0, 0, 0.75, id="spo-negative-zeroed"),
        pytest.param(SPO(epsilon=0.5), 0.6, 0.4, 0.0, 1, 0, id="spo-no-advantage"),
        # PPO: r = 1.5 > 1.28; L = −min(1.5 · 2, 1.28 · 2)
        pytest.param(PPO(clip_low=0.2, clip_high=0.28), 0.6, 0.4, 2.0, 0, -2.56, id="ppo-clipped-high"),
        # r = 1.25 < 1.28; L = −1.25 · 2
        pytest.param(PPO(clip_low=0.2, clip_high=0.28), 0.5, 0.4, 2.0, 1, -2.5, id="ppo-inside"),
        # r = 1.5, moving back; L = −min(1.5 · −2, 1.28 · −2)
        pytest.param(PPO(clip_low=0.2, clip_high=0.28), 0.6, 0.4, -2.0, 1, 3, id="ppo-coming-back"),
        # r = 0.5 < 0.8; L = −min(0.5 · −1, 0.8 · −1)
        pytest.param(PPO(clip_low=0.2, clip_high=0.28), 0.2, 0.4, -1.0, 0, 0.8, id="ppo-clipped-low"),
        # r = 0.5, moving back; L = −min(0.5 · 1, 0.8 · 1)
        pytest.param(PPO(clip_low=0.2, clip_high=0.28), 0.2, 0.4, 1.0, 1, -0.5, id="ppo-coming-up"),
        pytest.param(PPO(clip_low=0.2, clip_high=0.28), 0.6, 0.4, 0.0, 1, 0, id="ppo-no-advantage-high"),
        pytest.param(PPO(clip_low=0.2, clip_high=0.28), 0.2, 0.4, 0.0, 1, 0, id="ppo-no-advantage-low"),
        # Mask-DRPO: |π − μ| = 0.2 > 0.15, moving away; w = 1 − 0.2 / 0.15; L = −3 + 2 · 0.4 · 0.25 / 0.3
        pytest.param(MaskDRPO(delta=0.15), 0.6, 0.4, 2.0, -1 / 3, -7 / 3, id="mask_drpo-reversed"),
        # |π − μ| = 0.1; L = −1.25 · 2
        pytest.param(MaskDRPO(delta=0.15), 0.5, 0.4, 2.0, 1, -2.5, id="mask_drpo-inside"),
        # |π − μ| = 0.2 > 0.15 but coming back; L = 1.5 · 2
        pytest.param(MaskDRPO(delta=0.15), 0.6, 0.4, -2.0, 1, 3, id="mask_drpo-coming-back"),
        # DPPO with KL: 0.4 · ln(0.4 / 0.6) + 0.6 · ln(0.6 / 0.4) = 0.0811 > 0.05
        pytest.param(DPPOBinaryKL(delta=0.05), 0.6, 0.4, 2.0, 0, 0, id="dppo_kl-masked"),
        # 0.4 · ln(0.4 / 0.45) + 0.6 · ln(0.6 / 0.55) = 0.0051; L = −1.125 · 2
        pytest.param(DPPOBinaryKL(delta=0.05), 0.45, 0.4, 2.0, 1, -2.25, id="dppo_kl-inside"),
        # 0.01 · ln(0.01 / 0.1) + 0.99 · ln(0.99 / 0.9) = 0.0713 > 0.05, where |π − μ| is 0.09
        pytest.param(DPPOBinaryKL(delta=0.05), 0.1, 0.01, 1.0, 0, 0, id="dppo_kl-rare-masked"),
        pytest.param(DPPOBinaryKL(delta=0.05), 0.6, 0.4, -2.0, 1, 3, id="dppo_kl-coming-back"),
        # π = 1: the divergence is infinite; μ = 1 as well: it is 0, and L = −1 · 1
        pytest.param(DPPOBinaryKL(delta=0.05), 1.0, 0.999, 1.0, 0, 0, id="dppo_kl-certain"),
        pytest.param(DPPOBinaryKL(delta=0.05), 1.0, 1.0, 1.0, 1, -1, id="dppo_kl-both-certain"),
        # CISPO: r = 1.5, clipped to 1.2; w = 1.2 / 1.5; L = −1.2 · 2 · ln 0.6
        pytest.param(CISPO(), 0.6, 0.4, 2.0, 0.8, -2.4 * math.log(0.6), id="cispo-clipped"),
        # r = 0.5, not clipped below; L = −0.5 · 1 · ln 0.2
        pytest.param(CISPO(), 0.2, 0.4, 1.0, 1, -0.5 * math.log(0.2), id="cispo-below"),
        # SAPO at r = 1: w = 4 · ½ · ½; L = −4 · ½ · 2
        pytest.param(SAPO(), 0.4, 0.4, 2.0, 1, -4, id="sapo-on-policy"),
        # r = 1.5: σ(0.5) = 1 / (1 + e^−0.5); w = 4 · σ(0.5) · σ(−0.5); L = −4 · σ(0.5) · 2
        pytest.param(SAPO(), 0.6, 0.4, 2.0, 4 * sigmoid(0.5) * sigmoid(-0.5), -8 * sigmoid(0.5), id="sapo-positive"),
        # r = 1.5, τ = 2: w = 4 · σ(1) · σ(−1); L = 2 · σ(1) · 1
        pytest.param(
            SAPO(tau_negative=2.0), 0.6, 0.4, -1.0, 4 * sigmoid(1) * sigmoid(-1), 2 * sigmoid(1), id="sapo-negative"
        ),
        # DGPO: r = 1.5 > 1.28; w = √(1.28 / 1.5); L = −w · 1.5 · 2
        pytest.param(DGPO(), 0.6, 0.4, 2.0, math.sqrt(1.28 / 1.5), -3 * math.sqrt(1.28 / 1.5), id="dgpo-above"),
        # r = 0.5 < 0.8; w = 0.5 / 0.8; L = 0.625 · 0.5 · 1
        pytest.param(DGPO(), 0.2, 0.4, -1.0, 0.625, 0.3125, id="dgpo-below"),
        pytest.param(DGPO(), 0.6, 0.4, -2.0, 1, 3, id="dgpo-coming-back"),
        # The surrogate: L = −1.5 · 2 and 0.5 · 1
        pytest.param(PG(), 0.6, 0.4, 2.0, 1, -3, id="pg-positive"),
        pytest.param(PG(), 0.2, 0.4, -1.0, 1, 0.5, id="pg-negative"),
        pytest.param(PG(), 0.6, 0.4, 0.0, 1, 0, id="pg-no-advantage"),
    ],
)
def test_weight_and_loss_are_those_worked_by_hand(
    objective: Objective, prob: float, behavior_prob: float, advantage: float, weight: float, loss: float
) -> None:
    t = one_token(prob=prob, behavior_prob=behavior_prob, advantage=advantage)
    assert objective.gradient_weight(t).item() == pytest.approx(weight, abs=1e-12)
    assert objective.loss(t).item() == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_masked_token_has_no_loss(name: str) -> None:
    batch = TokenBatch(**random_tensors(seed=2))
    loss = make_objective(name, **TIGHT[name]).loss(batch)
    assert (loss[~batch.mask] == 0).all()
    assert (loss[batch.mask & (batch.advantage != 0)] != 0).any()


@pytest.mark.parametrize("delta", [0.05, 0.4, 2.5, 12.5])
def test_the_drpo_weight_stays_within_one_over_delta_of_one(delta: float) -> None:
    given = random_tensors(seed=3, shape=(50, 200), spread=10.0)
    weight = DRPO(delta=delta).gradient_weight(TokenBatch(**given))
    assert (weight - 1).abs().max() <= 1 / delta * (1 + 1e-12)
    # The bound is approached, so a looser one would not do.
    assert (weight - 1).abs().max() > 0.9 / delta


def test_the_spo_weight_has_no_bound_on_rare_tokens_and_the_drpo_weight_has() -> None:
    rare = [one_token(prob=0.5, behavior_prob=behavior_prob, advantage=1.0) for behavior_prob in (1e-2, 1e-4, 1e-6)]
    # 1 − (0.5 / μ − 1) / 0.5
    assert [SPO(epsilon=0.5).gradient_weight(t).item() for t in rare] == pytest.approx([-97, -9997, -999997])
    # 1 − (0.5 − μ) / 0.5 = 2μ
    assert [DRPO(delta=0.5).gradient_weight(t).item() for t in rare] == pytest.approx([2e-2, 2e-4, 2e-6])


@pytest.mark.parametrize("advantage", [2.0, -0.5])
@pytest.mark.parametrize("behavior_prob", [0.2, 0.4, 0.8])
def test_the_fixed_point_of_drpo_is_delta_away_from_mu_on_the_side_of_the_advantage(
    behavior_prob: float, advantage: float
) -> None:
    t = one_token(behavior_prob + math.copysign(0.1, advantage), behavior_prob, advantage)
    assert DRPO(delta=0.1).gradient_weight(t).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("delta", "divergence", "weight"),
    [
        (12.5, 0.05, 0.996),
        (12.5, 1.0, 0.92),
        (2.5, 0.05, 0.98),
        (2.5, 1.0, 0.60),
        (0.4, 0.05, 0.875),
        (0.4, 1.0, -1.5),
        (0.15, 0.05, 2 / 3),
        (0.15, 0.15, 0.0),
        (0.15, 1.0, -17 / 3),
    ],
)
def test_the_drpo_weight_of_a_diverging_token_is_that_of_the_published_thresholds(
    delta: float, divergence: float, weight: float
) -> None:
    # From μ = 1 down by the divergence; 1e-8 stands for π = 0.
    t = one_token(prob=max(1 - divergence, 1e-8), behavior_prob=1.0, advantage=-1.0)
    assert DRPO(delta=delta).gradient_weight(t).item() == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("drop", {}, "unknown objective 'drop'; did you mean 'drpo'"),
        ("PPO", {}, r"unknown objective 'PPO'.*Known: .*ppo"),
        ("drpo", {"delt": 0.2}, "unknown hyperparameter of drpo 'delt'; did you mean 'delta'"),
        ("ppo", {"clip_hi": 0.2}, "unknown hyperparameter of ppo 'clip_hi'; did you mean 'clip_high'"),
        ("spo", {"delta": 0.2}, r"unknown hyperparameter of spo 'delta'.*Known: epsilon"),
        ("pg", {"delta": 0.2}, "unknown hyperparameter of pg 'delta'.*There are none"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_match_and_the_choices(
    name: str, hyperparameters: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(name, **hyperparameters)


@pytest.mark.parametrize("value", [0, 0.0, -0.2, math.nan, math.inf, -math.inf, True, "0.2", None])
@pytest.mark.parametrize(("name", "hyperparameter"), HYPERPARAMETERS)
def test_a_hyperparameter_that_is_not_a_finite_number_above_zero_is_refused(
    name: str, hyperparameter: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"{hyperparameter} is {value!r}; expected a finite number > 0"):
        make_objective(name, **{hyperparameter: value})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_make_objective_gives_the_registered_class_with_the_hyperparameters_given(name: str) -> None:
    objective = make_objective(name, **TIGHT[name])
    assert type(objective) is OBJECTIVES[name]
    assert dataclasses.asdict(objective) == TIGHT[name]
    assert make_objective(name) == OBJECTIVES[name]()


@pytest.mark.parametrize(("name", "hyperparameter"), HYPERPARAMETERS)
def test_an_objective_is_frozen(name: str, hyperparameter: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(make_objective(name), hyperparameter, 1.0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_its_formula_weight_and_source(name: str) -> None:
    for said in (OBJECTIVES[name].formula, OBJECTIVES[name].weight, OBJECTIVES[name].source):
        assert said.strip()


def test_a_delta_that_confines_the_weight_is_told_once_and_a_corrective_one_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _tell_confined.cache_clear()
    batch = one_token(prob=0.5, behavior_prob=0.5, advantage=1.0)
    with caplog.at_level(logging.WARNING, logger="drpo.objectives.drpo"):
        DRPO(delta=0.99).loss(batch)
        assert not caplog.messages
        for delta in (12.5, 2.5, 12.5, 1.0, 2.5):
            DRPO(delta=delta).loss(batch)
    assert len(caplog.messages) == 3
    assert "delta=12.5 confines the gradient weight to [0.92, 1.08]" in caplog.messages[0]
    assert "delta=2.5 confines the gradient weight to [0.6, 1.4]" in caplog.messages[1]
    assert "delta=1 confines the gradient weight to [0, 2]" in caplog.messages[2]
