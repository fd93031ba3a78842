from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from builders import (
    EVERY,
    TIGHT,
    TIGHT_CORRECTIONS,
    FrozenStops,
    anchored_tokens,
    batch_of,
    gradients,
    indexed,
    objective_of,
    one_token,
    random_tensors,
    tokens,
)
from drpo import OBJECTIVES, TokenBatch, aggregate, make_objective
from drpo.aggregation import Aggregation
from drpo.objectives import (
    CISPO,
    CORRECTIONS,
    CPPO,
    DGPO,
    DRO,
    DRPO,
    DRPOK3,
    DRPOKL,
    DRPOTV,
    GMPO,
    GSPO,
    IPO,
    M2PO,
    P3O,
    PDM,
    PG,
    PPO,
    SAPO,
    SPO,
    VESPO,
    ClipCov,
    Corrected,
    DPPOBinaryKL,
    DPPOBinaryTV,
    DPPOTopKKL,
    DPPOTopKTV,
    DRPOTopK,
    DRPOUnweighted,
    DualClipPPO,
    IcePop,
    KLCov,
    MaskDRPO,
    MaskDRPORegion,
    Objective,
    PGTVPenalty,
    RolloutIS,
    SoftCPPO,
    TopKObjective,
    anchored,
    make_correction,
)
from drpo.objectives.base import LARGEST, SMALLEST
from drpo.objectives.clip_cov import _draw
from drpo.objectives.drpo import _tell_confined
from drpo.tokens import Anchor, TopK


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


HYPERPARAMETERS = [(name, field.name) for name, cls in OBJECTIVES.items() for field in dataclasses.fields(cls)]


@EVERY
@pytest.mark.parametrize("spread", [0.1, 2.0, 15.0, 1000.0])
def test_the_gradient_is_minus_advantage_times_ratio_times_weight(name: str, spread: float, tight: bool) -> None:
    objective = objective_of(name, tight)
    for seed in range(20):
        given = random_tensors(seed, spread=spread)
        batch = batch_of(objective, given)
        gradient, others = gradients(objective.loss(batch), given)
        ratio, weight = batch.ratio.detach(), objective.gradient_weight(batch)
        # A weight near 0 is a difference of terms and keeps fewer digits than they have.
        torch.testing.assert_close(gradient, -objective.coefficient(batch), rtol=1e-9, atol=0)
        steered = batch.advantage != 0
        torch.testing.assert_close(gradient[steered], (-batch.advantage * ratio * weight)[steered], rtol=1e-9, atol=0)
        idle = batch.mask & ~steered
        assert objective.acts_without_advantage or not (gradient[idle] != 0).any()
        of_others = torch.zeros_like(others)
        if isinstance(objective, TopKObjective):
            of_others = objective.top_k_coefficient(batch)
        torch.testing.assert_close(others, -of_others, rtol=1e-9, atol=0)
        low, high = objective.weight_bounds
        assert ((low - 1e-12 <= weight) & (weight <= high + 1e-12))[batch.mask].all()
        assert not weight.requires_grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_acts_without_advantage_says_whether_a_token_without_one_has_a_gradient(name: str) -> None:
    objective = objective_of(name, tight=True)
    given = random_tensors(seed=0, shape=(20, 20))
    batch = batch_of(objective, given)
    gradient, _ = gradients(objective.loss(batch), given)
    assert (gradient[batch.mask & (batch.advantage == 0)] != 0).any() == objective.acts_without_advantage


@pytest.mark.parametrize("name", [n for n, objective in OBJECTIVES.items() if objective.over_updates])
@pytest.mark.parametrize("correct", [False, True])
def test_an_objective_told_its_update_gives_each_part_what_it_has_in_the_whole(name: str, correct: bool) -> None:
    objective: Objective = objective_of(name, tight=True)
    if correct:
        objective = Corrected(objective, make_correction("opsm", delta=0.02))
    given = random_tensors(seed=4, shape=(12, 9))
    whole = batch_of(objective, given)
    told = objective.for_update(whole)
    assert told == objective
    assert (objective.over_updates, told.over_updates, told.over_sequences) == (True, False, correct)
    parts = [batch_of(objective, indexed(given, slice(first, first + 3))) for first in range(0, 12, 3)]
    for of in (lambda o, t: o.loss(t), lambda o, t: o.coefficient(t), lambda o, t: o.gradient_weight(t)):
        assert torch.equal(torch.cat([of(told, part) for part in parts]), of(objective, whole))
    untold = torch.cat([objective.coefficient(part) for part in parts])
    assert not torch.equal(untold, objective.coefficient(whole))


def test_m2po_drops_the_largest_disagreements_until_the_rest_agree() -> None:
    # log ρ = 0.1, −0.2, 0.3; the means of 0.01, 0.04, 0.09 from the smallest on are 0.01, 0.025, 0.0467. r = 1.
    old_prob = [0.5, 0.5, 0.5]
    behavior_prob = [0.5 * math.exp(-log_ratio) for log_ratio in (0.3, -0.2, 0.1)]
    t = anchored_tokens(old_prob, old_prob, behavior_prob, [2.0, 2.0, 2.0])
    assert M2PO().gradient_weight(t).tolist() == [[0, 1, 1]]
    assert M2PO().loss(t).tolist() == [[0, -2, -2]]
    assert M2PO(tau=0.047).gradient_weight(t).tolist() == [[1, 1, 1]]
    assert M2PO(tau=0.02).gradient_weight(t).tolist() == [[0, 0, 1]]
    assert M2PO(tau=0.005).gradient_weight(t).tolist() == [[0, 0, 0]]
    # PPO's clip on top: r = 1.5.
    t = anchored_tokens([0.75, 0.5, 0.5], old_prob, behavior_prob[::-1], [2.0, 2.0, 2.0])
    assert M2PO().gradient_weight(t).tolist() == [[0, 1, 0]]


def four_covariances() -> TokenBatch:
    """A = 3, 1, −1, −3 and log π = −1, −2, −3, −6, with means 0 and −3: cov = 6, 1, 0, 9. r = 1 but for the last, e."""
    logp = torch.tensor([[-1.0, -2.0, -3.0, -6.0]], dtype=torch.float64)
    anchor = torch.tensor([[-1.0, -2.0, -3.0, -7.0]], dtype=torch.float64)
    advantage = torch.tensor([[3.0, 1.0, -1.0, -3.0]], dtype=torch.float64)
    return TokenBatch(logp, anchor, advantage, torch.ones_like(logp))


def test_kl_cov_penalises_the_share_of_the_tokens_with_the_largest_covariance() -> None:
    # One token at least: the last. c = −3e − 0.5; L = 3e + 0.5 · 1
    objective = KLCov(beta=0.5)
    assert objective.coefficient(four_covariances())[0].tolist() == pytest.approx([3, 1, -1, -3 * math.e - 0.5])
    assert objective.loss(four_covariances())[0].tolist() == pytest.approx([-3, -1, 1, 3 * math.e + 0.5])
    # Half of four: the first too, which has not moved and has no slope.
    summary = KLCov(share=0.5).summary(four_covariances())
    assert summary.tolist() == pytest.approx([0, -3, 6])
    # Of equal advantages every covariance is 0, and nothing tells the few tokens from the others.
    assert not KLCov().is_outside(dataclasses.replace(four_covariances(), advantage=torch.full((1, 4), 0.5))).any()


def test_clip_cov_drops_at_most_a_share_of_the_tokens_whose_covariance_is_in_between() -> None:
    t = four_covariances()
    assert ClipCov(cov_low=0.5, cov_high=5.0).gradient_weight(t).tolist() == [[1, 0, 1, 1]]
    assert ClipCov(cov_low=0.5, cov_high=9.5).gradient_weight(t).sum() == 3
    # A tenth of four is none, of which one remains; three quarters are all three.
    assert ClipCov(cov_low=0.5, cov_high=9.5, share=0.1).gradient_weight(t).sum() == 3
    assert ClipCov(cov_low=0.5, cov_high=9.5, share=0.5).gradient_weight(t).sum() == 2
    assert ClipCov(cov_low=0.5, cov_high=9.5, share=0.75).gradient_weight(t).tolist() == [[0, 0, 1, 0]]
    assert ClipCov(cov_low=0.5, cov_high=5.0).loss(t)[0].tolist() == pytest.approx([-3, 0, 1, 3 * math.e])


def test_clip_cov_draws_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(1, 100_000, generator=generator).abs().neg()
    t = TokenBatch(logp, logp, torch.ones(1), torch.ones_like(logp))
    draws = _draw(t)
    for low in (0.0, 0.25, 0.5, 0.75):
        assert ((draws >= low) & (draws < low + 0.25)).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.corrcoef(torch.cat([draws, logp.double()]))[0, 1].abs() < 0.02


def test_p3o_caps_the_ratio_at_the_effective_sample_size_and_penalises_what_is_missing_of_it() -> None:
    # r = 2 and 0.5: E = 2.5² / (2 · 4.25) = 25/34; log r + 1/r − 1 = ln 2 − 0.5 and 1 − ln 2, its slopes 0.5 and −1
    t = tokens(prob=[0.4, 0.2], behavior_prob=[0.2, 0.4], advantage=[1.0, -1.0])
    capped = [25 / 34 - 9 / 34 * 0.5, -0.5 + 9 / 34]
    assert P3O().coefficient(t)[0].tolist() == pytest.approx(capped)
    assert P3O().loss(t)[0].tolist() == pytest.approx(
        [
            -25 / 34 * math.log(0.4) + 9 / 34 * (math.log(2) - 0.5),
            0.5 * math.log(0.2) + 9 / 34 * (1 - math.log(2)),
        ]
    )


@EVERY
def test_the_loss_passes_gradcheck_away_from_kinks(name: str, tight: bool) -> None:
    """Where an objective stops a gradient, what it stops is held fixed."""
    objective = objective_of(name, tight)
    for seed in range(5):
        given = random_tensors(seed, shape=(4, 6))
        topk: TopK = given.pop("topk")
        logp, mask = given.pop("logp").detach(), given.pop("mask")

        def batch(
            logp: Tensor, topk_logp: Tensor, mask: Tensor = mask, given: Any = given, topk: TopK = topk
        ) -> TokenBatch:
            topk = TopK(topk_logp, topk.behavior_logp, topk.is_sampled)
            return batch_of(objective, {**given, "logp": logp, "mask": mask, "topk": topk})

        def weight(step: float, batch: Any = batch, logp: Tensor = logp, topk: TopK = topk) -> Tensor:
            return objective.gradient_weight(batch(logp + step, topk.logp.detach() + step * topk.is_sampled))

        # A weight that jumps within a step of 1e-4 has a kink there; what it jumps by elsewhere is the curve.
        calm = (weight(1e-4) - weight(-1e-4)).abs() < 0.05 * weight(0).abs().clamp(min=1)
        mask = mask & calm
        assert mask.sum() > 8
        stops = FrozenStops()

        def loss(
            logp: Tensor, topk_logp: Tensor, batch: Any = batch, mask: Tensor = mask, stops: Any = stops
        ) -> Tensor:
            with stops:
                return objective.loss(batch(logp, topk_logp, mask))

        leaves = [torch.where(mask, logp, -1.0), torch.where(mask.unsqueeze(2), topk.logp.detach(), -1.0)]
        # The fast mode compares the gradient along random directions through all tokens, not an entry at a time.
        assert torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves], fast_mode=True)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
@pytest.mark.parametrize(
    ("name", "sequence_loss"),
    [
        # Written from the papers' sequence losses: r is [B, T], the mean over the tokens that count.
        pytest.param(
            "gspo", lambda mean_log, a: -torch.minimum(mean_log.exp() * a, mean_log.exp().clamp(0.8, 1.28) * a)
        ),
        pytest.param("gmpo", lambda mean_log, a: -mean_log.exp() * a),
    ],
)
def test_the_gradient_of_a_sequence_objective_is_that_of_the_sequence_loss(
    name: str, sequence_loss: Any, aggregation: Any
) -> None:
    advantage = torch.tensor([1.0, -2.0, 0.5, -0.5, 3.0, 0.0], dtype=torch.float64)
    given = random_tensors(seed=8, spread=0.3) | {"advantage": advantage}
    batch = TokenBatch(**given)
    needed = {"seq-mean-token-sum-norm": {"horizon": 7}, "prompt-mean": {"mean_lengths": torch.arange(1.0, 7.0)}}
    arguments = needed.get(aggregation, {})
    objective = make_objective(name, **TIGHT[name])
    ours, _ = gradients(aggregate(objective.loss(batch), batch.mask, aggregation, **arguments), given)

    log_ratio = given["logp"].nan_to_num() - given["behavior_logp"].nan_to_num()
    if name == "gmpo":
        positive = batch.advantage > 0
        log_ratio = torch.where(positive, log_ratio.clamp(max=0.4), log_ratio.clamp(min=-0.4))
    mean_log = (log_ratio * batch.mask).sum(dim=1) / batch.mask.sum(dim=1)
    per_token = sequence_loss(mean_log, advantage).unsqueeze(1).expand_as(batch.logp)
    theirs, _ = gradients(aggregate(per_token, batch.mask, aggregation, **arguments), given)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert theirs.norm() > 1e-3


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
        # IPO: |π − μ| = 0.2 > 0.15, moving away and coming back
        pytest.param(IPO(delta=0.15), 0.6, 0.4, 2.0, 0, 0, id="ipo-masked"),
        pytest.param(IPO(delta=0.15), 0.6, 0.4, -2.0, 0, 0, id="ipo-coming-back"),
        # r = 2 but |π − μ| = 0.1; L = −2 · 1
        pytest.param(IPO(delta=0.15), 0.2, 0.1, 1.0, 1, -2, id="ipo-rare-inside"),
        # The default is 0.3: 0.25 is inside and 0.35 outside; r = 0.5 and 0.3
        pytest.param(IPO(), 0.25, 0.5, -1.0, 1, 0.5, id="ipo-default-inside"),
        pytest.param(IPO(), 0.15, 0.5, -1.0, 0, 0, id="ipo-default-outside"),
        # Rollout IS: r = 1.5 > 1.28, moving away and coming back; r = 0.75 < 0.8; r = 1.25 and L = −1.25 · 2
        pytest.param(RolloutIS(), 0.6, 0.4, 2.0, 0, 0, id="rollout_is-above"),
        pytest.param(RolloutIS(), 0.6, 0.4, -2.0, 0, 0, id="rollout_is-coming-back"),
        pytest.param(RolloutIS(), 0.3, 0.4, 1.0, 0, 0, id="rollout_is-below"),
        pytest.param(RolloutIS(), 0.5, 0.4, 2.0, 1, -2.5, id="rollout_is-inside"),
        # SAO's band: r = 1.5 < 6 and 0.75 > 0.7
        pytest.param(RolloutIS(clip_low=0.3, clip_high=5.0), 0.6, 0.4, 2.0, 1, -3, id="rollout_is-sao-high"),
        pytest.param(RolloutIS(clip_low=0.3, clip_high=5.0), 0.3, 0.4, 1.0, 1, -0.75, id="rollout_is-sao-low"),
        # Mask-DRPO with two thresholds: 0.2 > 0.15, so w = 1 − 0.2 / 0.4 and L = −3 + 2 · 0.4 · 0.25 / 0.8
        pytest.param(MaskDRPORegion(delta=0.4), 0.6, 0.4, 2.0, 0.5, -2.75, id="mask_drpo_region-outside"),
        pytest.param(MaskDRPORegion(delta=0.1), 0.5, 0.4, 2.0, 1, -2.5, id="mask_drpo_region-inside"),
        # 0.2 > 0.1, but w = 1 − 0.2 / 12.5
        pytest.param(
            MaskDRPORegion(region_delta=0.1), 0.6, 0.4, 2.0, 0.984, -3 + 0.2 / 25, id="mask_drpo_region-default"
        ),
        # r = 1.5; w = 1/1.5 − 0.5 / 2; L = −2 ln 0.6 + 0.5 · 0.5
        pytest.param(
            PGTVPenalty(beta=0.5), 0.6, 0.4, 2.0, 2 / 3 - 0.25, 0.25 - 2 * math.log(0.6), id="pg_tv_penalty-away"
        ),
        # r = 0.5, A < 0; w = 2 − 0.5; L = ln 0.2 + 0.5 · 0.5
        pytest.param(PGTVPenalty(beta=0.5), 0.2, 0.4, -1.0, 1.5, 0.25 + math.log(0.2), id="pg_tv_penalty-negative"),
        # Soft CPPO of one token: Z = 0.2 > 0.15; w = 0.15 / 0.2; L = −0.75 · 3
        pytest.param(SoftCPPO(), 0.6, 0.4, 2.0, 0.75, -2.25, id="cppo_soft-outside"),
        pytest.param(SoftCPPO(), 0.6, 0.4, -2.0, 1, 3, id="cppo_soft-coming-back"),
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
        # Of μ from π, not the other way: 0.1 · ln 10 + 0.9 · ln(0.9 / 0.99) = 0.1445, and 0.0713 the other way
        pytest.param(DPPOBinaryKL(delta=0.1), 0.01, 0.1, -1.0, 0, 0, id="dppo_kl-direction"),
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
        # Dual clip: A < 0 and r = 4 > 3; L = min(4 · 1, 3 · 1)
        pytest.param(DualClipPPO(), 0.8, 0.2, -1.0, 0, 3, id="ppo_dual_clip-runaway"),
        # r = 2 < 3: PPO's; L = 2 · 1
        pytest.param(DualClipPPO(), 0.8, 0.4, -1.0, 1, 2, id="ppo_dual_clip-coming-back"),
        pytest.param(DualClipPPO(), 0.8, 0.2, 1.0, 0, -1.28, id="ppo_dual_clip-positive"),
        # DRPO without |A|: r = 1.5; w = 1 − 0.2 / (2 · 0.1); L = −3 + 0.4 · 0.25 / 0.2
        pytest.param(DRPOUnweighted(delta=0.1), 0.6, 0.4, 2.0, 0, -2.5, id="drpo_unweighted-positive"),
        # r = 0.5; w = 1 − (−0.2) / (−1 · 0.1); L = 0.5 + 0.4 · 0.25 / 0.2
        pytest.param(DRPOUnweighted(delta=0.1), 0.2, 0.4, -1.0, -1, 1, id="drpo_unweighted-negative"),
        # A = 0 has a loss all the same: 0.4 · 0.25 / 0.2
        pytest.param(DRPOUnweighted(delta=0.1), 0.6, 0.4, 0.0, 1, 0.5, id="drpo_unweighted-no-advantage"),
        # TV: w = 1 − 0.5 · 0.4; L = −3 + 0.5 · 2 · 0.2
        pytest.param(DRPOTV(beta=0.5), 0.6, 0.4, 2.0, 0.8, -2.8, id="drpo_tv-away"),
        # r = 0.5, moving back; w = 1 + 0.5 · 0.4; L = −0.5 + 0.5 · 1 · 0.2
        pytest.param(DRPOTV(beta=0.5), 0.2, 0.4, 1.0, 1.2, -0.4, id="drpo_tv-back"),
        # k3: r = 2; w = 1 − 0.5 · 1 / 2; L = −2 + 0.5 · 1 · (1 − ln 2)
        pytest.param(DRPOK3(beta=0.5), 0.4, 0.2, 1.0, 0.75, -2 + 0.5 * (1 - math.log(2)), id="drpo_k3-away"),
        # r = 0.5, A < 0; w = 1 − 0.5 · 0.5 / 0.5; L = 0.5 + 0.5 · 1 · (−0.5 + ln 2)
        pytest.param(DRPOK3(beta=0.5), 0.2, 0.4, -1.0, 0.5, 0.25 + 0.5 * math.log(2), id="drpo_k3-negative"),
        # KL: (π − μ)/(1 − π) = 0.2 / 0.4 = 0.5; w = 1 − 0.5 · 0.5 / 1.5; D = 0.4 ln(2/3) + 0.6 ln(0.6/0.4) = 0.2 ln 1.5
        pytest.param(DRPOKL(beta=0.5), 0.6, 0.4, 2.0, 5 / 6, -3 + 0.2 * math.log(1.5), id="drpo_kl-away"),
        # Of a token that both are sure of there is nothing to regularise: L = −1 · 1
        pytest.param(DRPOKL(beta=0.5), 1.0, 1.0, 1.0, 1, -1, id="drpo_kl-both-certain"),
        # GSPO of one token: s = r = 1.5 > 1.28; L = −1.28 · 2
        pytest.param(GSPO(clip_low=0.2, clip_high=0.28), 0.6, 0.4, 2.0, 0, -2.56, id="gspo-clipped"),
        # GMPO: ln 1.5 = 0.405 > 0.4; G = e^0.4
        pytest.param(GMPO(), 0.6, 0.4, 2.0, 0, -2 * math.exp(0.4), id="gmpo-clipped"),
        # ln 0.5 is not clipped where A > 0
        pytest.param(GMPO(), 0.2, 0.4, 1.0, 1, -0.5, id="gmpo-coming-up"),
        # VESPO: W = 2, k = 2, λ = 3: φ = e³ · 4 · e^−6; w = φ / 2; L = −φ · 1 · ln 0.4
        pytest.param(VESPO(), 0.4, 0.2, 1.0, 2 * math.exp(-3), -4 * math.exp(-3) * math.log(0.4), id="vespo-positive"),
        # k = 3, λ = 2: φ = e² · 8 · e^−4; L = φ · ln 0.4
        pytest.param(VESPO(), 0.4, 0.2, -1.0, 4 * math.exp(-2), 8 * math.exp(-2) * math.log(0.4), id="vespo-negative"),
        # DRO: c = 1 − 0.5 ln 2, w = c / 2; L = −ln 0.4 + 0.25 ln² 2
        pytest.param(
            DRO(beta=0.5),
            0.4,
            0.2,
            1.0,
            (1 - 0.5 * math.log(2)) / 2,
            -math.log(0.4) + 0.25 * math.log(2) ** 2,
            id="dro-away",
        ),
        # CPPO of one token is DPPO: Z = 0.2 > 0.15
        pytest.param(CPPO(), 0.6, 0.4, 2.0, 0, 0, id="cppo-masked"),
        pytest.param(CPPO(), 0.5, 0.4, 2.0, 1, -2.5, id="cppo-inside"),
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


def test_cppo_tightens_by_what_the_prefix_has_spent_beyond_its_allowance() -> None:
    # ω = 1, 0.75, 0.5 and Z = 0.3, 0.075, 0.075; the allowance is clip(90 % quantile of 0.3, 0.1, 0.15) to 0.04.
    t = tokens(prob=[0.1, 0.5, 0.55], behavior_prob=[0.4, 0.4, 0.4], advantage=[1.0, 1.0, 1.0])
    # Coming back, whatever it spends. Then 0.2 + 0.04 · 1 − 0.3 < 0 < 0.075; then 0.2 + 0.04 · 1.75 − 0.375 < 0.
    assert CPPO(delta=0.2, weight_min=0.5).gradient_weight(t).tolist() == [[1, 0, 0]]
    # A prefix of which 90 % never moved earns the least allowance: 0.02 · 31 > 0.3, but 0.2 + 0.001 · 31 − 0.3 < 0.1.
    t = tokens([0.1, *[0.4] * 30, 0.5], [0.4] * 32, [1.0] * 32)
    assert CPPO(delta=0.2, weight_min=1.0).gradient_weight(t)[0, -1] == 1
    assert CPPO(delta=0.2, weight_min=1.0, allowance_low=1e-3).gradient_weight(t)[0, -1] == 0
    # The same without the prefix: 0.1 < 0.2.
    assert CPPO(delta=0.2, weight_min=0.5).gradient_weight(one_token(0.5, 0.4, 1.0)).item() == 1


def test_soft_cppo_weighs_a_token_down_to_what_its_prefix_left_it() -> None:
    # ω = 1, 0.75, 0.5 and Z = 0.15, 0.15, 0.1; the allowance is clip(90 % quantile of 0.15, 0.2, 0.2) to 0.04.
    t = tokens(prob=[0.25, 0.6, 0.6], behavior_prob=[0.4, 0.4, 0.4], advantage=[1.0, 1.0, 1.0])
    # Coming back. Then B = 0.2 + 0.04 − 0.15 = 0.09 and 0.09 / 0.15; then B = 0.2 + 0.04 · 1.75 − 0.3 = −0.03.
    weight = SoftCPPO(delta=0.2, weight_min=0.5).gradient_weight(t)
    assert weight[0].tolist() == pytest.approx([1, 0.6, 0])


def two_of_four(sampled: int) -> TokenBatch:
    """μ = (0.4, 0.3, 0.2, 0.1) and π = (0.6, 0.2, 0.1, 0.1) over a vocabulary of four of which two are in the support; A = 1."""
    pi, mu = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.6, 0.2, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]))
    is_sampled = torch.arange(2).view(1, 1, 2) == sampled
    topk = TopK(pi[:2].view(1, 1, 2), mu[:2].view(1, 1, 2), is_sampled)
    one = torch.ones(1, 1, dtype=torch.float64)
    return TokenBatch(pi[sampled] * one, mu[sampled] * one, one, one, topk=topk)


@pytest.mark.parametrize(
    ("objective", "sampled", "weight", "loss"),
    [
        # ½(0.2 + 0.1 + 0.1) = 0.2 over the two and the rest, 0.3 and 0.2; r = 1.5
        (DPPOTopKTV(delta=0.19), 0, 0, 0),
        (DPPOTopKTV(delta=0.21), 0, 1, -1.5),
        # Sampled from the rest: ½(0.2 + 0.1 + 0.1 + 0) with 0.2 → 0.1 apart; r = 0.5, coming up
        (DPPOTopKTV(delta=0.19), 2, 1, -0.5),
        # 0.4 ln(2/3) + 0.3 ln(3/2) + 0.3 ln(3/2) = 0.2 ln 1.5 = 0.0811
        (DPPOTopKKL(delta=0.08), 0, 0, 0),
        (DPPOTopKKL(delta=0.082), 0, 1, -1.5),
        # (π − μ) + Σ π(μ − π) = 0.2 − 0.12 + 0.02 + 0.02 > 0 and 0.2 > 0.15
        (PDM(delta=0.15), 0, 0, 0),
        (PDM(delta=0.25), 0, 1, -1.5),
        # 0.04 + 0.01 over the support; w = 1 − 0.4 · 0.2 / 0.1; L = −1.5 + 0.05 / 0.2
        (DRPOTopK(delta=0.1), 0, 0.2, -1.25),
        # from outside: μ(r − 1)² = 0.2 · 0.25 beside it; w = 1 + 0.1 / 0.1; L = −0.5 + 0.1 / 0.2
        (DRPOTopK(delta=0.1), 2, 2, 0),
    ],
)
def test_top_k_weights_and_losses_are_those_worked_by_hand(
    objective: Objective, sampled: int, weight: float, loss: float
) -> None:
    t = two_of_four(sampled)
    assert objective.gradient_weight(t).item() == pytest.approx(weight, abs=1e-12)
    assert objective.loss(t).item() == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize(("delta", "weight"), [(0.21, 0), (0.24, 1)])
def test_the_top_k_divergence_is_that_of_mu_from_pi(delta: float, weight: float) -> None:
    pi, mu = (torch.tensor(p, dtype=torch.float64).log().view(1, 1, 3) for p in ([0.8, 0.1, 0.1], [0.5, 0.3, 0.2]))
    topk = TopK(pi, mu, torch.tensor([[[True, False, False]]]))
    t = dataclasses.replace(one_token(0.8, 0.5, 1.0), topk=topk)
    # 0.5 ln(5/8) + 0.3 ln 3 + 0.2 ln 2 = 0.233; the other way 0.8 ln(8/5) − 0.1 ln 3 − 0.1 ln 2 = 0.197
    assert DPPOTopKKL(delta=delta).gradient_weight(t).item() == weight


def test_a_support_that_is_the_whole_vocabulary_leaves_no_rest_to_diverge_in() -> None:
    generator = torch.Generator().manual_seed(0)
    behavior_logp = torch.randn(200, 1, 50, generator=generator).log_softmax(2)
    logp = (behavior_logp + 1e-4 * torch.randn(200, 1, 50, generator=generator)).log_softmax(2)
    is_sampled = torch.zeros(200, 1, 50, dtype=torch.bool)
    is_sampled[:, :, 0] = True
    t = TokenBatch(
        logp[..., 0],
        behavior_logp[..., 0],
        torch.ones(200),
        torch.ones(200, 1),
        topk=TopK(logp, behavior_logp, is_sampled),
    )
    assert (DPPOTopKKL(delta=0.001).gradient_weight(t) == 1).all()


@pytest.mark.parametrize(("prob", "behavior_prob"), [(1e-9, 3e-9), (0.3, 0.4), (1 - 2e-7, 1 - 4e-7)])
def test_the_ratio_of_what_is_left_keeps_its_digits_in_fp32(prob: float, behavior_prob: float) -> None:
    logp, behavior_logp = (torch.tensor([[math.log(p)]], dtype=torch.float32) for p in (prob, behavior_prob))
    t = TokenBatch(logp, behavior_logp, torch.ones(1), torch.ones(1, 1))
    # Of the log-probs as rounded to fp32.
    left, behavior_left = (-math.expm1(t.item()) for t in (logp, behavior_logp))
    assert t.others_log_ratio.item() == pytest.approx(math.log1p((left - behavior_left) / behavior_left), rel=1e-5)


def test_pdm_masks_a_token_on_its_way_back_that_takes_the_others_further_away() -> None:
    pi, mu = (torch.tensor(p, dtype=torch.float64) for p in ([0.1, 0.5, *[0.1] * 4], [0.11, 0.6, *[0.0725] * 4]))
    topk = TopK(pi.log().view(1, 1, 6), mu.log().view(1, 1, 6), (torch.arange(6) == 0).view(1, 1, 6))
    t = dataclasses.replace(one_token(0.1, 0.11, 1.0), topk=topk)
    # A(r − 1) < 0, but −0.01 + 0.1 · 0.01 + 0.5 · 0.1 − 4 · 0.1 · 0.0275 = 0.03 > 0
    assert DPPOBinaryTV(delta=0.005).gradient_weight(t).item() == 1
    assert PDM(delta=0.005).gradient_weight(t).item() == 0
    # A step the other way lowers KL(μ‖π), as the derivative by the logits says.
    logits = pi.log().requires_grad_()
    (slope,) = torch.autograd.grad((mu * (mu.log() - logits.log_softmax(0))).sum(), logits)
    (direction,) = torch.autograd.grad(logits.log_softmax(0)[0], logits)
    assert (slope @ direction).item() == pytest.approx(0.03)


@pytest.mark.parametrize("top_k", [1, 2, 5, 8])
def test_the_expectation_of_drpo_topk_over_a_whole_vocabulary_is_that_of_drpo(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, behavior_logits = torch.randn(2, 8, dtype=torch.float64, generator=generator).unbind()
    behavior_logp = behavior_logits.log_softmax(0)
    support = behavior_logp.topk(top_k).indices.expand(8, 1, top_k)

    def expected(objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss over y ~ μ, its gradient by the logits, and the variance of the penalty."""
        leaf = logits.clone().requires_grad_()
        logp = leaf.log_softmax(0)
        topk = TopK(logp[support], behavior_logp[support], support == torch.arange(8).view(8, 1, 1))
        batch = TokenBatch(
            logp.unsqueeze(1), behavior_logp.unsqueeze(1), -2 * torch.ones(8), torch.ones(8, 1), topk=topk
        )
        loss = (behavior_logp.exp() * objective.loss(batch).squeeze(1)).sum()
        penalty = (objective.loss(batch) + batch.ratio * batch.advantage).squeeze(1).detach()
        mean = (behavior_logp.exp() * penalty).sum()
        variance = (behavior_logp.exp() * (penalty - mean).square()).sum()
        return loss.detach(), torch.autograd.grad(loss, leaf)[0], variance

    ours, theirs = expected(DRPOTopK(delta=0.3)), expected(DRPO(delta=0.3))
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-12, atol=1e-15)
    assert theirs[2] > 1e-3
    if top_k == 8:
        assert ours[2] < 1e-20


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        # π_old = 0.6 twice, so ρ = 1.5 and 3, Π = 4.5
        (
            [0.4, 0.2],
            {"token_truncate": [1.5, 2], "token_mask": [1.5, 0], "sequence_truncate": [2, 2], "sequence_mask": [0, 0]},
        ),
        # ρ = 1.2 and 1.5, Π = 1.8
        (
            [0.5, 0.4],
            {
                "token_truncate": [1.2, 1.5],
                "token_mask": [1.2, 1.5],
                "sequence_truncate": [1.8, 1.8],
                "sequence_mask": [1.8, 1.8],
            },
        ),
        # ρ = 2/3 and 0.6, Π = 0.4
        (
            [0.9, 1.0],
            {
                "token_truncate": [2 / 3, 0.6],
                "token_mask": [2 / 3, 0.6],
                "sequence_truncate": [0.4, 0.4],
                "sequence_mask": [0, 0],
            },
        ),
    ],
)
@pytest.mark.parametrize("name", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_weights_by_the_mismatch_are_those_worked_by_hand(
    name: str, sampler: list[float], expected: dict[str, list[float]]
) -> None:
    t = anchored_tokens(prob=[0.5, 0.5], old_prob=[0.6, 0.6], behavior_prob=sampler, advantage=[1.0, 1.0])
    correction = make_correction(name)
    assert correction.weight(t)[0].tolist() == pytest.approx(expected[name])
    corrected, plain = Corrected(PPO(), correction), PPO()
    weighted = torch.tensor(expected[name], dtype=torch.float64) * plain.loss(t)[0]
    assert corrected.loss(t)[0].tolist() == pytest.approx(weighted.tolist())
    assert corrected.weight_bounds == (0, 2)
    assert Corrected(DRO(), correction).acts_without_advantage


@pytest.mark.parametrize(
    ("name", "hyperparameters", "old_prob", "behavior_prob", "advantage", "kept"),
    [
        # ρ = 1.5 and 1, so k3 = 0.5 − ln 1.5 = 0.0945 and 0: at most 0.0945, on average 0.0473
        ("sequence_max_k3", {"delta": 0.095}, [0.6, 0.5], [0.4, 0.5], 1.0, [1, 1]),
        ("sequence_max_k3", {"delta": 0.094}, [0.6, 0.5], [0.4, 0.5], 1.0, [0, 0]),
        ("sequence_mean_k3", {"delta": 0.048}, [0.6, 0.5], [0.4, 0.5], -1.0, [1, 1]),
        ("sequence_mean_k3", {"delta": 0.047}, [0.6, 0.5], [0.4, 0.5], -1.0, [0, 0]),
        # k3 grows faster with ρ above 1 than below: ρ = 2/3 has 2/3 − 1 + ln 1.5 = 0.0721
        ("sequence_max_k3", {"delta": 0.073}, [0.4, 0.5], [0.6, 0.5], 1.0, [1, 1]),
        ("sequence_max_k3", {"delta": 0.072}, [0.4, 0.5], [0.6, 0.5], 1.0, [0, 0]),
        # √1.5 = 1.2247
        ("sequence_geometric", {"high": 1.23}, [0.6, 0.5], [0.4, 0.5], 1.0, [1, 1]),
        ("sequence_geometric", {"high": 1.22}, [0.6, 0.5], [0.4, 0.5], 1.0, [0, 0]),
        ("sequence_geometric", {"low": 0.81, "high": 2.0}, [0.5, 0.5], [0.75, 0.5], 1.0, [1, 1]),
        ("sequence_geometric", {"low": 0.82, "high": 2.0}, [0.5, 0.5], [0.75, 0.5], 1.0, [0, 0]),
        # 0.1 ln 10 + 0.9 ln(0.9 / 0.99) = 0.1445, and 0.01 ln(1/10) + 0.99 ln(0.99 / 0.9) = 0.0713; either way round
        ("kpop", {"delta": 0.145}, [0.1, 0.01], [0.01, 0.1], 1.0, [1, 1]),
        ("kpop", {"delta": 0.144}, [0.1, 0.01], [0.01, 0.1], 1.0, [0, 0]),
        ("kpop", {"delta": 0.05}, [0.6, 0.5], [0.4, 0.5], -1.0, [0, 1]),
        # (0.5 + 1) / 2 = 0.75 over both; only the token that A takes further away goes
        ("vaco", {"delta": 0.76}, [0.6, 0.4], [0.4, 0.2], 1.0, [1, 1]),
        ("vaco", {"delta": 0.74}, [0.6, 0.4], [0.4, 0.2], 1.0, [0, 0]),
        ("vaco", {"delta": 0.74}, [0.6, 0.4], [0.4, 0.2], -1.0, [1, 1]),
        ("vaco", {"delta": 0.2}, [0.6, 0.2], [0.4, 0.4], 1.0, [0, 1]),
    ],
)
@pytest.mark.parametrize("anchor", ["sampler", "old"])
def test_masks_by_the_mismatch_are_those_worked_by_hand(
    name: str,
    hyperparameters: dict[str, float],
    old_prob: list[float],
    behavior_prob: list[float],
    advantage: float,
    kept: list[int],
    anchor: str,
) -> None:
    # Between π_old and μ where the ratio is against π_old, wherever π is; between π and μ where it is against μ.
    t = tokens(old_prob, behavior_prob, [advantage] * 2)
    if anchor == "old":
        t = anchored_tokens([0.9, 0.1], old_prob, behavior_prob, [advantage] * 2)
    correction = make_correction(name, **hyperparameters)
    assert correction.weight(t).tolist() == [kept]
    assert Corrected(SPO(), correction).loss(t).tolist() == (SPO().loss(t) * torch.tensor([kept])).tolist()
    assert Corrected(SPO(), correction).weight_bounds == SPO().weight_bounds


@pytest.mark.parametrize(
    ("advantage", "delta", "kept"), [(-1.0, 0.35, 1), (-1.0, 0.34, 0), (1.0, 0.34, 1), (0, 0.1, 1)]
)
@pytest.mark.parametrize("anchor", ["sampler", "old"])
def test_opsm_drops_bad_sequences_that_the_policy_has_left(
    advantage: float, delta: float, kept: int, anchor: str
) -> None:
    # ½ (ln(0.4 / 0.2) + ln 1) = 0.3466, of π and not of π_old; the other way it is negative
    for prob, behavior_prob, expected in ((0.2, 0.4, kept), (0.4, 0.2, 1)):
        t = tokens([prob, 0.5], [behavior_prob, 0.5], [advantage] * 2)
        if anchor == "old":
            t = anchored_tokens([prob, 0.5], [0.9, 0.9], [behavior_prob, 0.5], [advantage] * 2)
        assert make_correction("opsm", delta=delta).weight(t).tolist() == [[expected] * 2]


# What the weight is inside of the region where it is not 1, and outside where it is not 0. Masks take their weight from the
# region, so that this holds the others to theirs; the reference of test_fuzz.py holds the weights of all.
INSIDE: dict[str, Any] = {
    **dict.fromkeys(("gspo", "gmpo", "icepop"), lambda w: w > 0),
    **dict.fromkeys(("drpo", "spo"), lambda w: w >= 0),
    # Its region bounds r, and its weight is over r; below.
    "p3o": None,
}
OUTSIDE: dict[str, Any] = {
    **dict.fromkeys(("drpo", "spo"), lambda w: w < 0),
    **dict.fromkeys(("mask_drpo", "mask_drpo_region", "cispo", "dgpo", "cppo_soft", "kl_cov"), lambda w: w != 1),
}


@pytest.mark.parametrize("anchor", ["sampler", "old"])
@pytest.mark.parametrize(
    "name", [n for n, kind in OBJECTIVES.items() if kind.region is not None and INSIDE.get(n, 1) is not None]
)
def test_the_gradient_weight_changes_where_a_token_is_outside_of_the_region_and_nowhere_else(
    name: str, anchor: Anchor
) -> None:
    objective = make_objective(name, **TIGHT[name])
    if anchor == "old" and isinstance(objective, TopKObjective):
        pytest.skip("needs the sampler's likeliest tokens")
    if anchor == "sampler" and objective.corrects_mismatch:
        pytest.skip("needs the old policy")
    for seed in range(20):
        t = TokenBatch(**random_tensors(seed), anchor=anchor)
        # A penalty has no slope at a token that has not moved.
        steered = t.mask & (t.advantage != 0) & (t.log_ratio != 0)
        outside, weight = objective.is_outside(t).expand_as(t.mask)[steered], objective.gradient_weight(t)[steered]
        assert INSIDE.get(name, lambda w: w == 1)(weight[~outside]).all()
        assert OUTSIDE.get(name, lambda w: w == 0)(weight[outside]).all()
        assert outside.any()
        assert not outside.all()


def test_p3o_s_region_ends_at_the_effective_sample_size() -> None:
    # Ratios 1, 2 and 1/2: E = 3.5² / (3 · 5.25) = 7/9.
    t = tokens([0.4, 0.4, 0.2], [0.4, 0.2, 0.4], [1.0] * 3)
    assert make_objective("p3o").is_outside(t).tolist() == [[True, True, False]]


def test_a_region_beside_another_has_a_side_of_its_own_in_the_formula() -> None:
    region = make_objective("ppo_dual_clip").region
    assert region is not None
    assert region.outside == "A(r − 1) > 0 and (r < 1 − clip_low or r > 1 + clip_high); or A < 0 and r > clip_dual"
    assert region.where == "r < 1 − clip_low or r > 1 + clip_high; or A < 0 and r > clip_dual"


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction_changes_the_tokens_outside_of_its_region(name: str) -> None:
    correction = make_correction(name, **TIGHT_CORRECTIONS.get(name, {}))
    sides = set()
    for seed in range(20):
        t = TokenBatch(**random_tensors(seed), anchor="old")
        outside, weight = correction.is_outside(t).expand_as(t.mask), correction.weight(t).expand_as(t.mask)
        sides |= set(outside[t.mask].tolist())
        if name.endswith("truncate"):
            assert (weight[outside] == correction.largest).all()
            assert (weight[~outside] <= correction.largest).all()
        else:
            assert torch.equal(weight == 0, outside)
        both = Corrected(PPO(), correction)
        assert torch.equal(both.is_outside(t), outside | PPO().is_outside(t))
    assert sides == {True, False}


@pytest.mark.parametrize("distance", [-600.0, 600.0])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction_of_policies_far_apart_is_finite(name: str, distance: float) -> None:
    logp = torch.full((1, 64), -600.0)
    old, sampler = (logp, logp + 600) if distance < 0 else (logp + 600, logp)
    t = TokenBatch(old, sampler, torch.ones(1), torch.ones(1, 64), old_logp=old, anchor="old")
    weight = make_correction(name).weight(t)
    assert ((weight >= 0) & (weight <= 2)).all()


def test_icepop_weighs_by_the_mismatch_and_drops_what_is_out_of_range() -> None:
    # r = 1, π_old/μ = 1.5, 6 (above 5) and 0.4 (below 0.5); L = −1.5 · 1 · 2
    t = anchored_tokens([0.6, 0.6, 0.2], old_prob=[0.6, 0.6, 0.2], behavior_prob=[0.4, 0.1, 0.5], advantage=[2.0] * 3)
    assert IcePop().gradient_weight(t)[0].tolist() == pytest.approx([1.5, 0, 0])
    assert IcePop().loss(t)[0].tolist() == pytest.approx([-3, 0, 0])


@pytest.mark.parametrize("name", [n for n, objective in OBJECTIVES.items() if issubclass(objective, TopKObjective)])
def test_a_top_k_objective_without_a_support_says_what_is_missing(name: str) -> None:
    with pytest.raises(ValueError, match="topk is missing; this objective needs log-probs of the sampler's likeliest"):
        make_objective(name).loss(one_token(0.6, 0.4, 1.0))


def test_a_correction_of_a_ratio_against_the_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="anchor is 'sampler'; a correction by π_old/μ needs anchor 'old'"):
        IcePop().loss(one_token(0.6, 0.4, 1.0))


def test_a_mask_goes_with_any_anchor_and_a_weight_with_pi_old_alone() -> None:
    for name, correction in CORRECTIONS.items():
        assert anchored(PPO(), None, make_correction(name)).anchor == "old"
        if correction.operator == "mask":
            assert anchored(DRPO(), None, make_correction(name)).anchor == "sampler"
            assert anchored(IcePop(), None, make_correction(name)).corrects_mismatch
            continue
        with pytest.raises(ValueError, match="weighs by π_old/μ a loss whose ratio is taken against μ already"):
            anchored(DRPO(), None, make_correction(name))


def test_a_correction_of_the_likeliest_tokens_is_refused() -> None:
    with pytest.raises(
        ValueError, match="PDM looks at the sampler's likeliest tokens, and no correction goes with that"
    ):
        Corrected(PDM(), make_correction("opsm"))


def test_a_correction_on_top_of_a_correction_is_refused() -> None:
    with pytest.raises(ValueError, match="IcePop weighs tokens by π_old/μ itself"):
        Corrected(IcePop(), make_correction("token_mask"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_masked_token_has_no_loss(name: str) -> None:
    objective = make_objective(name, **TIGHT[name])
    batch = batch_of(objective, random_tensors(seed=2))
    loss = objective.loss(batch)
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
        ("drop", {}, "unknown objective 'drop'; did you mean 'dro' or 'drpo'"),
        ("grpo", {}, "unknown objective 'grpo'; here that is ppo, with"),
        ("luspo", {}, "here that is gspo with aggregation 'seq-mean-token-sum'. Known:"),
        ("vaco", {}, "here that is a correction, correction 'vaco'"),
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


@pytest.mark.parametrize("value", [SMALLEST, 1.0, 100.0, LARGEST])
@pytest.mark.parametrize(("name", "hyperparameter"), [(n, h) for n, h in HYPERPARAMETERS if h != "top_k"])
def test_loss_gradient_and_weight_are_finite_in_fp32_with_any_hyperparameter(
    name: str, hyperparameter: str, value: float
) -> None:
    try:
        objective = make_objective(name, **{hyperparameter: value})
    except ValueError as refused:
        assert hyperparameter in str(refused)  # noqa: PT017
        return
    for spread in (1e-3, 0.5, 15.0, 1000.0):
        given = random_tensors(seed=1, spread=spread, dtype=torch.float32)
        batch = batch_of(objective, given)
        loss = objective.loss(batch)
        for tensor in (loss, *gradients(loss, given), objective.gradient_weight(batch)):
            assert tensor.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_make_objective_gives_the_registered_class_with_the_hyperparameters_given(name: str) -> None:
    objective = make_objective(name, **TIGHT[name])
    assert type(objective) is OBJECTIVES[name]
    assert dataclasses.asdict(objective) == dataclasses.asdict(OBJECTIVES[name]()) | TIGHT[name]
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


@EVERY
def test_over_sequences_says_whether_a_token_depends_on_the_others_of_its_row(name: str, tight: bool) -> None:
    objective = objective_of(name, tight)
    depends = False
    for seed in range(20):
        given = random_tensors(seed, spread=0.3)
        whole = objective.coefficient(batch_of(objective, given))
        alone = torch.zeros_like(whole)
        for column in range(whole.shape[1]):
            given_column = {**given, "mask": given["mask"].clone()}
            given_column["mask"][:, :column] = False
            given_column["mask"][:, column + 1 :] = False
            alone += objective.coefficient(batch_of(objective, given_column))
        depends |= not torch.equal(whole, alone)
    assert depends == objective.over_sequences
