"""Where the distance from μ sits, worked by hand, and in quantiles against sorted values."""

from __future__ import annotations

import math

import pytest
import torch

from builders import random_tensors, tokens
from drpo import TokenBatch, TrustRegionMetrics, make_objective
from drpo.metrics.groups import BUCKETS


def measured(batch: TokenBatch, weight: torch.Tensor) -> dict[str, float]:
    metrics = TrustRegionMetrics()
    metrics.update(batch, weight)
    return metrics.compute().scalars


def by_hand() -> dict[str, float]:
    # |π − μ|: 0.09, 0.2, 0.1, 0.004 and 0.4; r: 2, 0.6, 1.25, 0.5 and 1.8
    batch = tokens([0.18, 0.3, 0.5, 0.004, 0.9], [0.09, 0.5, 0.4, 0.008, 0.5], [2.0, 1.0, -1.0, -2.0, 0.0])
    return measured(batch, torch.tensor([[0.5, 1.0, 1.5, -1.0, 7.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("divergence/mean_positive", (0.09 + 0.2) / 2),
        ("divergence/mean_negative", (0.1 + 0.004) / 2),
        ("tokens/mu_to_0.01", 1 / 5),
        ("tokens/mu_to_0.1", 1 / 5),
        ("tokens/mu_to_0.5", 3 / 5),
        ("tokens/mu_to_0.9", 0.0),
        ("divergence/mean_mu_to_0.01", 0.004),
        ("divergence/mean_mu_to_0.5", (0.2 + 0.1 + 0.4) / 3),
        # |A|·r: 4, 0.6, 1.25, 1 and 0; of those |w − 1| takes or adds 0.5, 0, 0.5 and 2
        ("regulariser/strength", (4 * 0.5 + 0 + 1.25 * 0.5 + 1 * 2) / (4 + 0.6 + 1.25 + 1)),
    ],
)
def test_a_measurement_is_that_worked_by_hand(name: str, expected: float) -> None:
    assert by_hand()[name] == pytest.approx(expected, rel=1e-12)


def test_the_strength_is_by_the_objective_s_own_ratio() -> None:
    # π/π_old is 1.5, beyond PPO's clip, and 1; π/μ is 1.5 and 10. Σ|A|·r·|w − 1| / Σ|A|·r = 1.5 / 2.5
    logp, old_logp, behavior_logp = (
        torch.tensor([probs], dtype=torch.float64).log() for probs in ([0.75, 0.5], [0.5, 0.5], [0.5, 0.05])
    )
    batch = TokenBatch(logp, behavior_logp, torch.ones(1), torch.ones(1, 2), old_logp=old_logp, anchor="old")
    weight = make_objective("ppo").gradient_weight(batch)
    assert weight.tolist() == [[0, 1]]
    assert measured(batch, weight)["regulariser/strength"] == pytest.approx(0.6)


def test_a_group_without_tokens_has_no_distance() -> None:
    assert "divergence/mean_mu_to_0.9" not in by_hand()
    assert "divergence/p99_mu_to_0.9" not in by_hand()


@pytest.mark.parametrize(("name", "share"), [("p01", 0.01), ("p50", 0.5), ("p99", 0.99)])
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0])
def test_a_quantile_of_the_log_ratio_is_within_twelve_percent(spread: float, name: str, share: float) -> None:
    batch = TokenBatch(**random_tensors(seed=4, shape=(40, 50), spread=spread))
    values = batch.log_ratio.detach()[batch.mask].sort().values
    exact = values[math.ceil(share * len(values)) - 1].item()
    found = measured(batch, torch.ones_like(batch.ratio))[f"log_ratio/{name}"]
    assert 0 <= found - exact <= 0.1221 * abs(exact) + 2e-8


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1e-9, 1e-3, 1.0, 100.0])
def test_quantiles_lie_between_the_extremes_of_their_tokens(seed: int, dtype: torch.dtype, spread: float) -> None:
    shape = (2, 4) if seed % 2 else (6, 40)
    given = random_tensors(seed=seed, shape=shape, spread=spread)
    batch = TokenBatch(*(given[name].to(dtype) for name in ("logp", "behavior_logp", "advantage")), mask=given["mask"])
    metrics = TrustRegionMetrics()
    for row in range(shape[0]):
        # An update is of several batches, of which some have no token of a group.
        part = TokenBatch(*(t[row : row + 1] for t in (batch.logp, batch.behavior_logp, batch.advantage, batch.mask)))
        metrics.update(part, torch.ones_like(part.ratio))
    found = metrics.compute().scalars
    divergence, mu, advantage = (
        t.detach()[batch.mask] for t in (batch.shift.abs(), batch.anchor_prob, batch.advantage)
    )
    lows = dict(zip(BUCKETS, (-1.0, *BUCKETS.values()), strict=False))
    groups = {"positive": advantage > 0, "negative": advantage < 0}
    groups |= {name: (mu > lows[name]) & ((mu <= high) | (high == 1)) for name, high in BUCKETS.items()}
    assert sum(f"divergence/p99_{name}" in found for name in groups) >= 1
    for name, of in groups.items():
        if f"divergence/p99_{name}" in found:
            assert divergence[of].min().item() <= found[f"divergence/p99_{name}"] <= divergence[of].max().item(), name
    for name in ("p50", "p90", "p99"):
        assert divergence.min().item() <= found[f"divergence/{name}"] <= found["divergence/max"]
    log_ratio = batch.log_ratio.detach()[batch.mask]
    for name in ("p01", "p50", "p99"):
        assert log_ratio.min().item() <= found[f"log_ratio/{name}"] <= log_ratio.max().item()


def test_the_buckets_hold_every_token_once() -> None:
    scalars = measured(batch := TokenBatch(**random_tensors(seed=5)), torch.ones_like(batch.ratio))
    assert sum(scalars[f"tokens/{bucket}"] for bucket in BUCKETS) == pytest.approx(1)
    mean = sum(scalars[f"tokens/{b}"] * scalars.get(f"divergence/mean_{b}", 0.0) for b in BUCKETS)
    assert mean == pytest.approx(scalars["divergence/mean"])


def test_the_regulariser_of_the_plain_surrogate_has_no_strength_and_a_tighter_one_more() -> None:
    batch = TokenBatch(**random_tensors(seed=6))
    strengths = [
        measured(batch, make_objective(name, **kwargs).gradient_weight(batch))["regulariser/strength"]
        for name, kwargs in (("pg", {}), ("drpo", {"delta": 12.5}), ("drpo", {"delta": 0.1}))
    ]
    assert strengths[0] == 0
    assert strengths[2] == pytest.approx(125 * strengths[1], rel=1e-9)
