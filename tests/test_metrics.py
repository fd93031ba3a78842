from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from builders import TIGHT, batch_of, indexed, one_token, random_tensors, tokens
from drpo import OBJECTIVES, TokenBatch, TrustRegion, TrustRegionMetrics, make_objective
from drpo.metrics.histograms import (
    DIVERGENCE_EDGES,
    LOG_RATIO_EDGES,
    WEIGHT_EDGES,
    divergence_bins,
    log_ratio_bins,
    weight_bins,
)


def measured(batch: TokenBatch, weight: Tensor, entropy: Tensor | None = None) -> TrustRegion:
    metrics = TrustRegionMetrics()
    metrics.update(batch, weight, entropy)
    return metrics.compute()


def by_hand() -> tuple[TokenBatch, Tensor]:
    """Seven tokens and the weights an imagined objective gives them."""
    batch = tokens(
        prob=[0.6, 0.5, 0.2, 0.3, 0.4, 0.1, 0.3],
        behavior_prob=[0.4, 0.4, 0.4, 0.3, 0.8, 0.2, 0.2],
        advantage=[2.0, 1.0, 1.0, 1.0, -1.0, -3.0, 0.0],
    )
    return batch, torch.tensor([[-1.0, 0.0, 1.5, 1.0, 0.25, 0.5, 9.0]], dtype=torch.float64)


# π/μ and |π − μ| of those tokens
RATIOS = [1.5, 1.25, 0.5, 1.0, 0.5, 0.5, 1.5]
DIVERGENCES = [0.2, 0.1, 0.2, 0.0, 0.4, 0.1, 0.1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ratio/mean", sum(RATIOS) / 7),
        ("ratio/max", 1.5),
        ("divergence/mean", sum(DIVERGENCES) / 7),
        ("divergence/max", 0.4),
        # KL(μ‖π) ≈ mean(−log r), and mean(r − 1 − log r)
        ("kl/k1", sum(-math.log(r) for r in RATIOS) / 7),
        ("kl/k3", sum(r - 1 - math.log(r) for r in RATIOS) / 7),
        ("chi_squared", sum((r - 1) ** 2 for r in RATIOS) / 7),
        ("perplexity_ratio", math.prod(RATIOS) ** (-1 / 7)),
        ("effective_sample_size", sum(RATIOS) ** 2 / (7 * sum(r * r for r in RATIOS))),
        # The token without advantage has no say: (−1 + 0 + 1.5 + 1 + 0.25 + 0.5) / 6
        ("weight/mean", 2.25 / 6),
        # Of four tokens with A > 0: −1, 0, 1.5, 1
        ("weight/reversed_positive", 1 / 4),
        ("weight/zeroed_positive", 1 / 4),
        ("weight/amplified_positive", 1 / 4),
        ("weight/attenuated_positive", 0.0),
        # Of two with A < 0: 0.25, 0.5
        ("weight/attenuated_negative", 1.0),
        ("weight/zeroed_negative", 0.0),
        ("weight/reversed_negative", 0.0),
        ("weight/amplified_negative", 0.0),
        ("entropy", (1 + 2 + 3 + 4 + 5 + 6 + 7) / 7),
    ],
)
def test_a_measurement_is_that_worked_by_hand(name: str, expected: float) -> None:
    entropy = torch.arange(1.0, 8.0).unsqueeze(0)
    assert measured(*by_hand(), entropy).scalars[name] == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("weight", "effect"),
    [
        (-0.5, "reversed"),
        (-2e-3, "reversed"),
        (-5e-4, "zeroed"),
        (5e-4, "zeroed"),
        (2e-3, "attenuated"),
        (1 - 2e-3, "attenuated"),
        (1 - 5e-4, None),
        (1 + 5e-4, None),
        (1 + 2e-3, "amplified"),
        (30.0, "amplified"),
    ],
)
@pytest.mark.parametrize(("advantage", "sign"), [(0.1, "positive"), (-3.0, "negative")])
def test_a_token_has_the_one_effect_of_its_weight_or_none_within_a_thousandth_of_one(
    advantage: float, sign: str, weight: float, effect: str | None
) -> None:
    batch = one_token(prob=0.4, behavior_prob=0.4, advantage=advantage)
    scalars = measured(batch, torch.full((1, 1), weight, dtype=torch.float64)).scalars
    effects = {name: share for name, share in scalars.items() if name.startswith("weight/") and name != "weight/mean"}
    assert set(effects) == {f"weight/{e}_{sign}" for e in ("attenuated", "zeroed", "reversed", "amplified")}
    assert [name for name, share in effects.items() if share] == ([f"weight/{effect}_{sign}"] if effect else [])


def test_the_histograms_count_each_token_between_its_edges() -> None:
    region = measured(*by_hand())
    assert len(region.divergence_histogram) == len(DIVERGENCE_EDGES) + 1
    assert len(region.weight_histogram) == len(WEIGHT_EDGES) + 1
    # A token of no advantage is in the first alone.
    assert (sum(region.divergence_histogram), sum(region.weight_histogram)) == (7, 6)
    for value, count in ((0.0, 1), (0.1, 3), (0.2, 2), (0.4, 1)):
        assert region.divergence_histogram[sum(edge.item() < value for edge in DIVERGENCE_EDGES)] == count
    for weight in (-1.0, 0.0, 0.25, 0.5, 1.0, 1.5):
        assert region.weight_histogram[sum(edge.item() < weight for edge in WEIGHT_EDGES)] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("bins", "edges", "least"),
    [
        (divergence_bins, DIVERGENCE_EDGES, 0.0),
        (log_ratio_bins, LOG_RATIO_EDGES, -torch.inf),
        (weight_bins, WEIGHT_EDGES, -torch.inf),
    ],
)
def test_a_bin_lies_between_its_edges(
    bins: Callable[[Tensor], Tensor], edges: Tensor, least: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(100_000, generator=generator, dtype=dtype).mul(6).exp()
    values = torch.cat(
        [spread, -spread, 1 + spread, 1 - spread, torch.tensor([0.0, -0.0, 1.0, torch.inf], dtype=dtype)]
    )
    values = values[values >= least]
    assert bins(values).equal(torch.bucketize(values.double(), edges, right=True, out_int32=True))
    assert 0 <= bins(torch.tensor([torch.nan], dtype=dtype)).item() <= len(edges)


def test_a_weight_beyond_the_outermost_edges_is_counted_at_the_end() -> None:
    batch = tokens([0.4, 0.4, 0.4], [0.4, 0.4, 0.4], [1.0, 1.0, 1.0])
    histogram = measured(batch, torch.tensor([[-1e6, 1e6, 1e6]], dtype=torch.float64)).weight_histogram
    assert (histogram[0], histogram[-1], sum(histogram)) == (1, 2, 3)


@pytest.mark.parametrize(("name", "quantile"), [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)])
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0, 20.0])
def test_a_quantile_of_the_divergence_is_at_most_an_eighth_too_high(spread: float, name: str, quantile: float) -> None:
    batch = TokenBatch(**random_tensors(seed=4, shape=(40, 50), spread=spread))
    divergence = batch.shift.detach().abs()[batch.mask].sort().values
    exact = divergence[math.ceil(quantile * len(divergence)) - 1].item()
    scalars = measured(batch, torch.ones_like(batch.ratio)).scalars
    assert exact <= scalars[f"divergence/{name}"] <= 1.125 * exact
    assert scalars[f"divergence/{name}"] <= scalars["divergence/max"]


@pytest.mark.parametrize(
    "shifts",
    [
        # The median is 1.01 steps; the upper edge of its bin, 1.125 steps, is more than twice the mean of 0.54 steps.
        pytest.param([0.0] * 49 + [1.01] * 50 + [3.0], id="above"),
        # In the first bin, below half a step, lie all of them.
        pytest.param([0.1, 0.2, 0.3, 0.4], id="smallest"),
    ],
)
def test_a_quantile_is_what_the_mean_allows(shifts: list[float]) -> None:
    step = 2**-26
    batch = tokens([0.4 + step * shift for shift in shifts], [0.4] * len(shifts), [1.0] * len(shifts))
    scalars = measured(batch, torch.ones_like(batch.ratio)).scalars
    mean, largest = scalars["divergence/mean"], scalars["divergence/max"]
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        # 1 − share of the tokens are at the quantile or beyond; share of them are at it or nearer.
        assert (1 - share) * scalars[f"divergence/{name}"] <= mean * (1 + 1e-12), name
        assert share * scalars[f"divergence/{name}"] + (1 - share) * largest >= mean * (1 - 1e-12), name


def test_policies_that_agree_have_no_divergence_and_a_full_sample() -> None:
    batch = tokens([0.4, 0.2], [0.4, 0.2], [1.0, -1.0])
    scalars = measured(batch, torch.ones_like(batch.ratio)).scalars
    for name in ("divergence/mean", "divergence/max", "divergence/p50", "divergence/p99", "kl/k1", "kl/k3"):
        assert scalars[name] == 0
    assert scalars["effective_sample_size"] == pytest.approx(1)


def test_policies_without_a_token_in_common_have_no_sample_size() -> None:
    # In fp32, e^-20 − 1 is −1.
    logp, behavior_logp, one = torch.tensor([[-70.0]]), torch.tensor([[math.log(0.9)]]), torch.ones(1, 1)
    scalars = measured(TokenBatch(logp, behavior_logp, one, one), one).scalars
    assert "effective_sample_size" not in scalars
    assert scalars["divergence/mean"] == pytest.approx(0.9)


def test_k3_keeps_its_precision_in_fp32_where_the_policies_nearly_agree() -> None:
    near = torch.full((1, 1), -1.0)
    batch = TokenBatch(near + 3 * 2**-22, near, torch.ones(1), torch.ones(1, 1))
    # e^x − 1 − x ≈ x² / 2, which is 4.5 steps of fp32 at x.
    assert measured(batch, torch.ones(1, 1)).scalars["kl/k3"] == pytest.approx(9 * 2**-45, rel=1e-3, abs=0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_tokens_are_measured_nowhere(garbage: float) -> None:
    given = random_tensors(seed=5)
    mask = given["mask"]
    batch = TokenBatch(**given)
    weight = make_objective("drpo", delta=0.1).gradient_weight(batch)
    entropy = torch.rand(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = TokenBatch(**indexed(indexed(given, mask), None))
    expected = measured(alone, weight[mask].unsqueeze(0), entropy[mask].unsqueeze(0))
    region = measured(batch, torch.where(mask, weight, garbage), torch.where(mask, entropy, garbage))
    assert_same(region, expected)


def assert_same(region: TrustRegion | None, expected: TrustRegion) -> None:
    # Sums in another order differ in the last digits, counts and maxima not at all.
    assert region.scalars == pytest.approx(expected.scalars, rel=1e-12, abs=1e-15)
    for name in ("ratio/max", "divergence/max", "divergence/p50", "divergence/p90", "divergence/p99"):
        assert region.scalars[name] == expected.scalars[name]
    assert region.divergence_histogram == expected.divergence_histogram
    assert region.weight_histogram == expected.weight_histogram


def rows_of(batch: TokenBatch, rows: slice) -> TokenBatch:
    names = [field.name for field in dataclasses.fields(batch) if field.init]
    return TokenBatch(**indexed({name: getattr(batch, name) for name in names}, rows))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("rows_a_batch", [1, 2, 5])
def test_micro_batches_combine_to_the_whole(rows_a_batch: int, name: str) -> None:
    objective = make_objective(name, **TIGHT[name])
    batch = batch_of(objective, random_tensors(seed=6, shape=(12, 9)))
    objective = objective.for_update(batch)
    metrics = TrustRegionMetrics()
    for start in range(0, 12, rows_a_batch):
        part = rows_of(batch, slice(start, start + rows_a_batch))
        metrics.update(part, objective.gradient_weight(part), -part.logp)
    assert_same(metrics.compute(), measured(batch, objective.gradient_weight(batch), -batch.logp))


def gathered(ranks: list[TrustRegionMetrics]) -> list[TrustRegion | None]:
    """What each rank computes if they gather from one another."""
    sent: list[list[Tensor]] = []
    for rank in ranks:
        tensors: list[Tensor] = []

        def record(tensor: Tensor, tensors: list[Tensor] = tensors) -> Tensor:
            # A graph kept from update to update would hold the memory of all of them.
            assert not tensor.requires_grad
            tensors.append(tensor)
            return tensor

        rank.compute(record)
        sent.append(tensors)

    def exchange() -> Callable[[Tensor], Tensor]:
        rounds = zip(*sent, strict=True)
        return lambda _: torch.cat(next(rounds))

    return [rank.compute(exchange()) for rank in ranks]


def test_ranks_combine_to_the_whole_and_all_compute_the_same() -> None:
    batch = TokenBatch(**random_tensors(seed=7, shape=(9, 9)))
    objective = make_objective("drpo", delta=0.1)
    ranks = []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 9)):
        metrics = TrustRegionMetrics()
        part = rows_of(batch, rows)
        metrics.update(part, objective.gradient_weight(part), -part.logp)
        ranks.append(metrics)
    for region in gathered(ranks) + gathered(ranks[::-1]):
        assert_same(region, measured(batch, objective.gradient_weight(batch), -batch.logp))


def test_a_rank_whose_tokens_are_all_masked_adds_nothing() -> None:
    batch, weight = by_hand()
    full, masked = TrustRegionMetrics(), TrustRegionMetrics()
    full.update(batch, weight)
    masked.update(TokenBatch(batch.logp, batch.behavior_logp, batch.advantage, torch.zeros_like(batch.mask)), weight)
    for region in gathered([full, masked]) + gathered([masked, full]):
        assert_same(region, measured(batch, weight))


def test_a_measurement_that_does_not_apply_is_absent() -> None:
    positive = measured(one_token(0.6, 0.4, 1.0), torch.ones(1, 1)).scalars
    assert "entropy" not in positive
    assert "weight/mean" in positive
    assert any(name.endswith("_positive") for name in positive)
    assert not any(name.endswith("_negative") for name in positive)
    unsteered = measured(one_token(0.6, 0.4, 0.0), torch.ones(1, 1)).scalars
    assert "divergence/mean" in unsteered
    assert not any(name.startswith("weight/") for name in unsteered)


@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
def test_nothing_to_measure_is_an_empty_measurement(shape: tuple[int, int]) -> None:
    metrics = TrustRegionMetrics()
    assert metrics.compute() == TrustRegion()
    nothing = torch.zeros(shape)
    metrics.update(TokenBatch(nothing, nothing, nothing, nothing), torch.ones(shape))
    assert metrics.compute() == TrustRegion()


def test_without_weights_all_but_their_effects_is_measured() -> None:
    batch, weight = by_hand()
    of_policies = TrustRegionMetrics()
    of_policies.update(batch)
    whole, expected = measured(batch, weight), of_policies.compute()
    is_effect = {name: name.startswith(("weight/", "regulariser/")) for name in whole.scalars}
    assert any(is_effect.values())
    assert expected.scalars == {name: value for name, value in whole.scalars.items() if not is_effect[name]}
    assert expected.divergence_histogram == whole.divergence_histogram
    assert not any(expected.weight_histogram)


def test_a_reset_forgets_what_was_measured() -> None:
    metrics = TrustRegionMetrics()
    metrics.update(*by_hand())
    metrics.reset()
    assert metrics.compute() == TrustRegion()
    batch = one_token(0.5, 0.4, 1.0)
    metrics.update(batch, torch.ones(1, 1))
    assert_same(metrics.compute(), measured(batch, torch.ones(1, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_in_the_bins_of_their_values(dtype: torch.dtype) -> None:
    weight = torch.linspace(-3, 3, 25).to(dtype)
    assert weight_bins(weight).equal(weight_bins(weight.float()))
