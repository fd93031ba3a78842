from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from builders import TIGHT, anchored_tokens, batch_of, gradients, one_token, random_tensors
from drpo import OBJECTIVES, TokenBatch, TrustRegionMetrics, aggregate, make_objective
from drpo.tokens import TopK

GARBAGE = [math.nan, math.inf, -math.inf, 1e30, -1e30]


def tensors(**replaced: Tensor) -> dict[str, Tensor]:
    """Two rows of three tokens, all valid, but for those replaced."""
    valid = {
        "logp": torch.full((2, 3), -1.0),
        "behavior_logp": torch.full((2, 3), -1.5),
        "advantage": torch.ones(2, 3),
        "mask": torch.ones(2, 3),
    }
    return valid | replaced


def holding(value: float) -> Tensor:
    """[2, 3] with the value at row 1, column 2."""
    tensor = torch.full((2, 3), -1.0)
    tensor[1, 2] = value
    return tensor


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"logp": torch.zeros(3)}, r"logp has shape \(3,\); expected two dimensions, \[B, T\]"),
        ({"behavior_logp": torch.zeros(2, 4)}, r"behavior_logp has shape \(2, 4\); expected \(2, 3\), like logp"),
        ({"mask": torch.ones(3, 2)}, r"mask has shape \(3, 2\); expected \(2, 3\), like logp"),
        ({"advantage": torch.ones(3)}, r"advantage has shape \(3,\); expected \(2, 3\) or \(2,\)"),
        ({"advantage": torch.ones(2, 1)}, r"advantage has shape \(2, 1\); expected \(2, 3\) or \(2,\)"),
        ({"logp": torch.zeros(2, 3, dtype=torch.long)}, "logp has dtype torch.int64; expected a floating-point dtype"),
        (
            {"logp": torch.zeros(2, 3, dtype=torch.float16, requires_grad=True)},
            "logp has dtype torch.float16, .* the gradient of a rare token exceeds; expected logp.float",
        ),
        (
            {"behavior_logp": torch.zeros(2, 3, dtype=torch.int32)},
            "behavior_logp has dtype torch.int32; expected a floating-point dtype",
        ),
        ({"logp": holding(math.nan)}, r"logp is nan at \[1, 2\], a token that counts; expected a finite log-prob"),
        ({"logp": holding(-math.inf)}, r"logp is -inf at \[1, 2\], a token that counts; expected a finite log-prob"),
        ({"logp": holding(0.5)}, r"logp is 0\.5 at \[1, 2\], a token that counts; expected .*, at most 0"),
        (
            {"behavior_logp": holding(math.inf)},
            r"behavior_logp is inf at \[1, 2\], .*mask tokens the sampler could not",
        ),
        ({"old_logp": torch.zeros(2, 4)}, r"old_logp has shape \(2, 4\); expected \(2, 3\), like logp"),
        ({"old_logp": holding(math.nan)}, r"old_logp is nan at \[1, 2\], a token that counts"),
        ({"anchor": "old"}, "old_logp is missing; expected π_old's log-probs"),
        ({"anchor": "olt"}, "unknown anchor 'olt'; did you mean 'old'"),
        ({"advantage": holding(math.nan)}, r"advantage is nan at \[1, 2\], a token that counts; expected a finite num"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_what_got_and_expected(
    replaced: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBatch(**(tensors() | replaced))


def test_a_log_probability_may_exceed_zero_by_a_rounding_error() -> None:
    assert TokenBatch(**tensors(logp=holding(0.009))).logp[1, 2].item() == pytest.approx(0.009)


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("names", [("logp",), ("behavior_logp",), ("logp", "behavior_logp")])
def test_everything_is_computed_in_fp32_or_in_fp64_if_a_log_prob_has_it(
    names: tuple[str, ...], given: torch.dtype, computed: torch.dtype
) -> None:
    batch = TokenBatch(**tensors(**{name: torch.full((2, 3), -1.0, dtype=given) for name in names}))
    for tensor in (batch.logp, batch.behavior_logp, batch.advantage, batch.log_ratio, batch.ratio, batch.shift):
        assert tensor.dtype == computed


def test_an_fp64_advantage_does_not_promote_fp32_log_probs() -> None:
    assert TokenBatch(**tensors(advantage=torch.ones(2, 3, dtype=torch.float64))).advantage.dtype == torch.float32


def test_one_advantage_a_sequence_is_that_advantage_at_each_of_its_tokens() -> None:
    batch = TokenBatch(**tensors(advantage=torch.tensor([1.0, -2.0])))
    assert batch.advantage.tolist() == [[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_masked_positions_hold_changes_neither_loss_nor_gradient(name: str, garbage: float) -> None:
    def loss_and_gradient(filler: float) -> tuple[Tensor, Tensor]:
        given = random_tensors(seed=0)
        mask = given["mask"]
        topk: TopK = given.pop("topk")
        given = {k: torch.where(mask, t.detach(), filler) for k, t in given.items() if k != "mask"}
        given["logp"].requires_grad_()
        of_support = [torch.where(mask.unsqueeze(2), t.detach(), filler) for t in (topk.logp, topk.behavior_logp)]
        given["topk"] = TopK(of_support[0].requires_grad_(), of_support[1], topk.is_sampled)
        objective = make_objective(name, **TIGHT[name])
        batch = batch_of(objective, {**given, "mask": mask})
        loss = aggregate(objective.loss(batch), batch.mask)
        of_sampled, of_others = gradients(loss, given)
        gradient = torch.cat([of_sampled.unsqueeze(2), of_others], dim=2)
        assert (gradient[~mask] == 0).all()
        return loss, gradient

    clean, garbled = loss_and_gradient(-1.0), loss_and_gradient(garbage)
    assert clean[0].isfinite()
    assert torch.equal(clean[0], garbled[0])
    assert torch.equal(clean[1], garbled[1])


@pytest.mark.parametrize("distance", [-1e4, -50.0, -20.5, -19.5, 0.0, 19.5, 20.5, 50.0, 1e4])
def test_the_log_ratio_is_bounded_at_twenty_and_its_gradient_passes_through(distance: float) -> None:
    logp = torch.tensor([[min(distance, 0.0)]], dtype=torch.float64, requires_grad=True)
    behavior_logp = torch.tensor([[min(-distance, 0.0)]], dtype=torch.float64, requires_grad=True)
    batch = TokenBatch(logp=logp, behavior_logp=behavior_logp, advantage=torch.ones(1), mask=torch.ones(1, 1))
    assert batch.log_ratio.item() == pytest.approx(max(-20.0, min(20.0, distance)))
    (gradient,) = torch.autograd.grad(batch.log_ratio, logp, retain_graph=True)
    assert gradient.item() == 1.0
    # dr / d log π = r
    (gradient,) = torch.autograd.grad(batch.ratio, logp)
    assert gradient.item() == pytest.approx(batch.ratio.item())


def test_behavior_log_probs_and_advantages_get_no_gradient() -> None:
    given = tensors(logp=torch.full((2, 3), -1.0, requires_grad=True))
    given["old_logp"] = given["behavior_logp"].clone()
    for name in ("behavior_logp", "advantage", "old_logp"):
        given[name].requires_grad_()
    wide = torch.full((2, 3, 2), -1.0, requires_grad=True)
    batch = TokenBatch(**given, topk=TopK(wide, wide.clone(), torch.zeros(2, 3, 2)))
    assert batch.logp.requires_grad
    assert batch.likeliest.logp.requires_grad
    for tensor in (batch.behavior_logp, batch.advantage, batch.old_logp, batch.likeliest.behavior_logp):
        assert tensor is not None
        assert not tensor.requires_grad


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"logp": torch.zeros(2, 3)}, r"topk.logp has shape \(2, 3\); expected \(2, 3\) and K"),
        ({"behavior_logp": torch.zeros(2, 3, 5)}, r"topk.behavior_logp has shape \(2, 3, 5\); expected \(2, 3, 2\)"),
        ({"is_sampled": torch.zeros(2, 3)}, r"topk.is_sampled has shape \(2, 3\); expected \(2, 3, 2\)"),
        ({"logp": torch.ones(2, 3, 2)}, r"topk.logp is 1 at \[0, 0, 0\], a token that counts"),
    ],
)
def test_a_support_that_does_not_fit_is_refused(replaced: dict[str, Tensor], message: str) -> None:
    valid = {"logp": -torch.ones(2, 3, 2), "behavior_logp": -torch.ones(2, 3, 2), "is_sampled": torch.zeros(2, 3, 2)}
    with pytest.raises(ValueError, match=message):
        TokenBatch(**tensors(), topk=TopK(**{**valid, **replaced}))


def test_ratio_anchor_prob_and_shift_are_those_of_the_probabilities() -> None:
    batch = one_token(prob=0.6, behavior_prob=0.4, advantage=2.0)
    # r = 0.6 / 0.4; π − μ = 0.6 − 0.4
    assert batch.ratio.item() == pytest.approx(1.5)
    assert batch.anchor_prob.item() == pytest.approx(0.4)
    assert batch.shift.item() == pytest.approx(0.2)


def test_what_is_measured_from_the_anchor_follows_it() -> None:
    batch = anchored_tokens(prob=[0.6], old_prob=[0.5], behavior_prob=[0.4], advantage=[2.0])
    for t, ratio, prob, shift in ((batch, 1.2, 0.5, 0.1), (batch.against("sampler"), 1.5, 0.4, 0.2)):
        assert t.ratio.item() == pytest.approx(ratio)
        assert t.anchor_prob.item() == pytest.approx(prob)
        assert t.shift.item() == pytest.approx(shift)
        assert t.excess.item() == pytest.approx(ratio - 1)
        # log (1 − π)/(1 − anchor)
        assert t.others_log_ratio.item() == pytest.approx(math.log(0.4 / (1 - prob)))
        assert t.behavior_logp.exp().item() == pytest.approx(0.4)
    assert batch.against("old") is batch
    # log ρ = log(π_old / μ)
    assert batch.mismatch.log_ratio.item() == pytest.approx(math.log(0.5 / 0.4))


def test_the_trust_region_is_measured_from_the_sampler_whatever_the_anchor() -> None:
    scalars = []
    for anchor in ("sampler", "old"):
        metrics = TrustRegionMetrics()
        batch = TokenBatch(**random_tensors(seed=3), anchor=anchor)
        metrics.update(batch, torch.ones_like(batch.logp))
        scalars.append(metrics.compute().scalars)
    assert scalars[0] == scalars[1]


def test_shift_keeps_its_precision_in_fp32_where_the_policies_nearly_agree() -> None:
    near = torch.tensor([[-1.0]])
    batch = TokenBatch(near + 3 * 2**-24, near, torch.ones(1), torch.ones(1, 1))
    # μ(r − 1) = e^-1 (e^(3 · 2^-24) − 1); r in fp32 moves in steps of 2 · 2^-24.
    assert batch.shift.item() == pytest.approx(math.exp(-1) * math.expm1(3 * 2**-24), rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_reading_a_batch_without_gradient_first_does_not_lose_the_gradient(name: str) -> None:
    objective = make_objective(name, **TIGHT[name])

    def gradient(read_first: bool) -> Tensor:
        given = random_tensors(seed=1)
        batch = batch_of(objective, given)
        if read_first:
            with torch.no_grad():
                batch.ratio, batch.anchor_prob, batch.shift  # noqa: B018
                TrustRegionMetrics().update(batch, objective.gradient_weight(batch))
        return torch.autograd.grad(objective.loss(batch).sum(), given["logp"])[0]

    assert gradient(read_first=False).abs().sum() > 0
    assert torch.equal(gradient(read_first=True), gradient(read_first=False))
