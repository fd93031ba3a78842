"""The objectives as verl calls them: names, values, gradients, metrics, and what is refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor
from verl.trainer.config import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.utils.metric import AggregationType, Metric, reduce_metrics
from verl.workers.config import ActorConfig, PolicyLossConfig

from builders import TIGHT, random_tensors
from drpo import OBJECTIVES, Counts, TokenBatch, TrustRegionMetrics, aggregate
from drpo.integrations.verl import LOSS_MODES, PolicyLoss
from drpo.integrations.verl.config import why_not_in_verl
from drpo.integrations.verl.losses import policy_loss
from drpo.integrations.verl.metrics import MEASURED

BYPASS = {"rollout_is": None, "bypass_mode": True}
COMPUTED = [mode for mode, name in LOSS_MODES.items() if why_not_in_verl(OBJECTIVES[name]) is None]
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def policy(mode: str, correction: dict[str, Any] | None = None, **more: Any) -> PolicyLoss:
    return PolicyLoss(loss_mode=mode, rollout_correction=RolloutCorrectionConfig(**(correction or BYPASS)), **more)


def actor(loss: PolicyLossConfig, **settings: Any) -> ActorConfig:
    return ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, policy_loss=loss, **settings)


def rollout(seed: int = 1, shape: tuple[int, int] = (8, 40)) -> dict[str, Tensor]:
    given = random_tensors(seed=seed, shape=shape)
    return {
        "old_log_prob": given["behavior_logp"].nan_to_num(-1.0),
        "log_prob": given["logp"].detach().nan_to_num(-1.0),
        "advantages": given["advantage"].nan_to_num(0.0),
        "response_mask": given["mask"],
    }


def called(
    config: ActorConfig, aggregation: str = "token-mean", **tensors: Any
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, gradient by log π, and metrics."""
    log_prob = tensors.pop("log_prob").clone().requires_grad_()
    function = get_policy_loss_fn(config.policy_loss.loss_mode)
    loss, metrics = function(log_prob=log_prob, loss_agg_mode=aggregation, config=config, **tensors)
    loss.backward()
    assert log_prob.grad is not None
    return loss.detach(), log_prob.grad, metrics


@pytest.fixture(autouse=True)
def _another_update() -> None:
    MEASURED.reset()


def test_every_objective_has_a_name_in_verl_and_no_loss_of_verl_is_replaced() -> None:
    assert set(LOSS_MODES.values()) == set(OBJECTIVES)
    theirs = {name for name, loss in POLICY_LOSS_REGISTRY.items() if loss is not policy_loss}
    assert theirs >= {"vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "geo_mean", "dro", "cispo"}
    assert theirs & set(LOSS_MODES) == set()
    assert {"drpo", "spo", "pg", "ppo", "drpo/dppo_tv", "drpo/dro", "dppo_topk_tv"} <= set(LOSS_MODES)


@pytest.mark.parametrize("aggregation", MODES)
@pytest.mark.parametrize("mode", COMPUTED)
def test_loss_and_gradient_are_those_of_the_library(mode: str, aggregation: Any) -> None:
    name, tensors = LOSS_MODES[mode], rollout()
    horizon = 50 if aggregation.endswith("norm") else None
    config = actor(policy(mode, hyperparameters=TIGHT[name]), loss_scale_factor=horizon)
    # What ppo_loss tells the loss, of an update of which this is one of several micro-batches on two ranks.
    config.global_batch_info.update(dp_size=2, batch_num_tokens=900, global_batch_size=24, loss_scale_factor=horizon)
    loss, gradient, _ = called(config, aggregation, **tensors)

    log_prob = tensors["log_prob"].clone().requires_grad_()
    batch = TokenBatch(log_prob, tensors["old_log_prob"], tensors["advantages"], tensors["response_mask"])
    counts = Counts(tokens=torch.tensor(900), sequences=torch.tensor(24))
    expected = 2 * aggregate(
        policy(mode, hyperparameters=TIGHT[name]).make_objective().loss(batch), batch.mask, aggregation,
        counts=counts, horizon=horizon,
    )  # fmt: skip
    expected.backward()
    # verl averages over a sequence with 1e-8 added to its length.
    rtol = 1e-9 if aggregation != "seq-mean-token-mean" else 1e-8
    torch.testing.assert_close(loss, expected.detach(), rtol=rtol, atol=1e-12)
    torch.testing.assert_close(gradient, log_prob.grad, rtol=rtol, atol=1e-12)
    assert gradient.norm() > 1e-4


def test_verl_s_correction_multiplies_loss_gradient_and_weight() -> None:
    tensors = rollout()
    config = actor(policy("ppo", {"rollout_is": "token"}))
    weights = torch.full_like(tensors["log_prob"], 0.5)
    loss, gradient, metrics = called(config, **tensors)
    MEASURED.reset()
    halved, half, halved_metrics = called(config, **tensors, rollout_is_weights=weights)
    torch.testing.assert_close((halved, half), (loss / 2, gradient / 2))
    assert halved_metrics["actor/weight/mean"] == pytest.approx(metrics["actor/weight/mean"] / 2)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_what_is_masked_reaches_neither_loss_nor_gradient(garbage: float) -> None:
    tensors = rollout()
    loss, gradient, _ = called(actor(policy("drpo")), **tensors)
    mask = tensors["response_mask"]
    for name in ("old_log_prob", "log_prob", "advantages"):
        tensors[name] = torch.where(mask, tensors[name], garbage)
    again, same, _ = called(actor(policy("drpo")), **tensors)
    torch.testing.assert_close((again, same), (loss, gradient))


def averaged(*ranks: list[dict[str, float]]) -> dict[str, float]:
    """As verl's engine and trainer do it with what each rank returns after each micro-batch."""
    gathered = []
    for micro_batches in ranks:
        every = [Metric.from_dict(metrics, aggregation=AggregationType.MEAN) for metrics in micro_batches]
        for name, metric in every[0].items():
            for more in every[1:]:
                metric.append(more[name])
        gathered.append(every[0])
    # Of an update; a rollout has one here.
    return reduce_metrics({name: [Metric.aggregate_dp([rank[name] for rank in gathered])] for name in gathered[0]})


def test_a_maximum_is_that_of_all_ranks_and_micro_batches() -> None:
    # |π − μ| of a token is 0.5 · (r − 1): 0.1, 0.2 on one rank, 0.4, 0.3 on the other, with a micro-batch each.
    config, half = actor(policy("drpo")), torch.full((1, 1), 0.5, dtype=torch.float64)
    ranks = []
    for ratios in ([1.2, 1.4], [1.8, 1.6]):
        MEASURED.reset()
        tokens = {"old_log_prob": half.log(), "advantages": half, "response_mask": half > 0}
        ranks.append([called(config, log_prob=(half * ratio).log(), **tokens)[2] for ratio in ratios])
    reduced = averaged(*ranks)
    assert reduced["actor/divergence/max"] == pytest.approx(0.4)
    assert reduced["actor/ratio/max"] == pytest.approx(1.8)
    assert reduced["actor/divergence/mean"] == pytest.approx(0.25)


@pytest.mark.parametrize("parts", [[8], [1, 7], [3, 1, 4]])
def test_metrics_do_not_depend_on_the_split_into_micro_batches(parts: list[int]) -> None:
    tensors = rollout()
    loss = policy("drpo", hyperparameters={"delta": 0.1}, histograms=True)
    given = [called(actor(loss), **rows)[2] for rows in _split(tensors, parts)]
    found = averaged(given)

    whole = TrustRegionMetrics(by_group=False)
    batch = TokenBatch(*(tensors[name] for name in ("log_prob", "old_log_prob", "advantages", "response_mask")))
    whole.update(batch, loss.make_objective().gradient_weight(batch))
    measured = whole.compute()
    for name, value in measured.scalars.items():
        assert found[f"actor/{name}"] == pytest.approx(value, rel=1e-9), name
    for name in ("divergence_histogram", "weight_histogram"):
        counts = [found[f"actor/{name}/{index:03d}"] for index in range(len(getattr(measured, name)))]
        assert counts == pytest.approx(getattr(measured, name), abs=1e-6)


def _split(tensors: dict[str, Tensor], parts: list[int]) -> list[dict[str, Tensor]]:
    columns = {name: tensor.split(parts) for name, tensor in tensors.items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(parts))]


def test_every_call_returns_the_same_names_and_an_optimizer_step_begins_another_update() -> None:
    tensors, config = rollout(), actor(policy("drpo"))
    first = called(config, **tensors)[2]
    empty = called(config, **{**tensors, "response_mask": torch.zeros_like(tensors["response_mask"])})[2]
    assert set(first) == set(empty)
    assert averaged([first, empty]) == pytest.approx(first)
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.SGD([weight]).step()
    assert called(config, **tensors)[2] == first


def test_an_update_whose_step_is_skipped_is_over_too() -> None:
    tensors, config = rollout(), actor(policy("drpo"))
    MEASURED.reset()
    config.global_batch_info.update(dp_size=1, global_batch_size=8, batch_num_tokens=None, loss_scale_factor=None)
    first = [called(config, **rows)[2] for rows in _split(tensors, [3, 5])]
    assert [called(config, **rows)[2] for rows in _split(tensors, [3, 5])] == first


def test_the_mean_over_ranks_of_a_mean_over_tokens_is_one_over_the_tokens_of_all() -> None:
    tensors, config = rollout(), actor(policy("drpo"))
    ranks = _split(tensors, [2, 6])
    tokens = [int(rows["response_mask"].sum()) for rows in ranks]
    assert tokens[0] != tokens[1]
    MEASURED.reset()
    expected = called(config, **tensors)[2]
    config.global_batch_info.update(
        dp_size=2, batch_num_tokens=sum(tokens), global_batch_size=None, loss_scale_factor=None
    )
    logged = []
    for rows in ranks:
        MEASURED.reset()
        logged.append(called(config, **rows)[2])
    for name in ("ratio/mean", "divergence/mean", "kl/k1", "kl/k3", "chi_squared"):
        mean = sum(metrics[f"actor/{name}"] for metrics in logged) / 2
        assert mean == pytest.approx(expected[f"actor/{name}"], rel=1e-9), name


@pytest.mark.parametrize(("ranks", "correction"), [(1, {}), (2, {"rollout_rs": "seq_mean_k3"})])
def test_tokens_that_verl_counts_and_rejects_do_not_make_what_is_measured_smaller(
    ranks: int, correction: dict[str, Any]
) -> None:
    tensors, config = rollout(), actor(policy("ppo", {"bypass_mode": False, **correction}))
    MEASURED.reset()
    expected = called(config, **tensors)[2]["actor/ratio/mean"]
    MEASURED.reset()
    counted = 2 * int(tensors["response_mask"].sum())
    config.global_batch_info.update(
        dp_size=ranks, batch_num_tokens=counted, global_batch_size=None, loss_scale_factor=None
    )
    assert called(config, **tensors)[2]["actor/ratio/mean"] == expected


@pytest.mark.parametrize("broken", [torch.nan, -torch.inf])
@pytest.mark.parametrize("name", ["log_prob", "old_log_prob"])
def test_a_broken_log_prob_makes_the_gradient_so_and_verl_skips_the_update(name: str, broken: float) -> None:
    tensors, config = rollout(), actor(policy("drpo"))
    row, column = tensors["response_mask"].nonzero()[0].tolist()
    MEASURED.reset()
    without = {**tensors, "response_mask": tensors["response_mask"].clone()}
    without["response_mask"][row, column] = False
    measured = called(config, **without)[2]
    MEASURED.reset()
    tensors[name][row, column] = broken
    loss, gradient, metrics = called(config, **tensors)
    assert loss.isnan()
    assert gradient.isnan().any()
    assert metrics == measured


@pytest.mark.parametrize(
    ("settings", "correction", "message"),
    [
        ({"loss_mode": "drpo"}, {"bypass_mode": False}, "expected algorithm.rollout_correction.bypass_mode=True"),
        ({"loss_mode": "dropo"}, BYPASS, "unknown loss_mode 'dropo'; did you mean 'drpo'"),
        ({"loss_mode": "dppo_tv"}, BYPASS, "is verl's own loss.*expected drpo/dppo_tv"),
        ({"loss_mode": "vanilla"}, BYPASS, r"expected .*_target_=verl.workers.config.PolicyLossConfig"),
        ({"loss_mode": "dppo_topk_tv"}, BYPASS, "needs log-probs of the sampler's likeliest tokens"),
        ({"loss_mode": "icepop"}, BYPASS, "expected loss_mode ppo with algorithm.rollout_correction.rollout_is=token"),
        ({"loss_mode": "drpo", "hyperparameters": {"dleta": 1}}, BYPASS, "hyperparameters: unknown .* did you mean 'delta'"),
        ({"loss_mode": "drpo", "hyperparameters": {"delta": -1}}, BYPASS, "hyperparameters: delta is -1"),
        ({"loss_mode": "drpo/dro", "dro_beta": 0.1}, BYPASS, "dro_beta=0.1 is not read"),
        ({"loss_mode": "drpo", "use_v1": False}, BYPASS, "expected trainer.use_v1=True"),
        ({"loss_mode": "drpo"}, {**BYPASS, "rollout_is": "token"}, "rollout_is=token is not applied in bypass mode"),
        ({"loss_mode": "drpo"}, {**BYPASS, "rollout_rs": "seq_sum_k1"}, "rollout_rs=seq_sum_k1 is not applied"),
    ],
)  # fmt: skip
def test_a_configuration_that_asks_for_something_else_than_it_gets_is_refused(
    settings: dict[str, Any], correction: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**settings, rollout_correction=RolloutCorrectionConfig(**correction))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (actor(PolicyLossConfig(loss_mode="drpo")), "expected .*_target_=drpo.integrations.verl.PolicyLoss"),
        (actor(policy("ppo"), clip_ratio_c=10.0), "clip_ratio_c=10.0 is not read by loss_mode=ppo"),
        (actor(policy("ppo"), clip_ratio_high=0.28), "clip_ratio_high=0.28 is not read"),
        (actor(policy("drpo/sapo"), tau_pos=2.0), "tau_pos=2.0 is not read"),
    ],
)
def test_a_worker_refuses_what_its_loss_would_ignore(config: ActorConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        called(config, **rollout())


def test_a_name_that_another_plug_in_has_taken_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from drpo.integrations.verl.losses import register

    monkeypatch.setitem(POLICY_LOSS_REGISTRY, "spo", asdict)
    with pytest.raises(ValueError, match="'spo' is already registered by dataclasses"):
        register()
