from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from builders import TIGHT, batch_of, gradients, indexed, random_tensors
from drpo import OBJECTIVES, Counts, Objective, aggregate, make_objective, mean_lengths_by_prompt, token_scale
from drpo.aggregation import Aggregation
from drpo.tokens import TopK

MODES = get_args(Aggregation)
HORIZON = {"seq-mean-token-sum-norm": 10}

GROUP = 4

# Rows of three tokens, one token and none.
MASK = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]])
# Of which the first two rows are one prompt's.
MEAN_LENGTHS = torch.tensor([2.0, 2.0, 5.0])
LOSS = torch.tensor([[1.0, 2.0, 3.0], [math.nan, 10.0, math.inf], [-math.inf, math.nan, math.nan]], dtype=torch.float64)


def needed(mode: Aggregation, mean_lengths: Tensor = MEAN_LENGTHS) -> dict[str, Any]:
    """What a mode takes beside the mask."""
    return {"horizon": HORIZON.get(mode), "mean_lengths": mean_lengths if mode == "prompt-mean" else None}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # (1 + 2 + 3 + 10) / 4 tokens
        ("token-mean", 4.0),
        # ((1 + 2 + 3) + 10) / 2 sequences
        ("seq-mean-token-sum", 8.0),
        # ((1 + 2 + 3) / 3 + 10 / 1) / 2 sequences
        ("seq-mean-token-mean", 6.0),
        # ((1 + 2 + 3) / 10 + 10 / 10) / 2 sequences
        ("seq-mean-token-sum-norm", 0.8),
        # ((1 + 2 + 3) / 2 + 10 / 2) / 2 sequences: the mean over the four tokens of the one prompt
        ("prompt-mean", 4.0),
    ],
)
def test_the_reduction_is_that_worked_by_hand_and_masked_non_finite_losses_do_not_poison_it(
    mode: Aggregation, expected: float
) -> None:
    leaf = LOSS.clone().requires_grad_()
    loss = aggregate(leaf, MASK, mode, **needed(mode))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(gradient, token_scale(MASK, mode, **needed(mode), dtype=torch.float64))
    assert (gradient[MASK == 0] == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
def test_nothing_to_count_gives_zero(shape: tuple[int, int], mode: Aggregation) -> None:
    leaf = torch.full(shape, math.nan, requires_grad=True)
    loss = aggregate(leaf, torch.zeros(shape), mode, **needed(mode, torch.zeros(shape[0])))
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, leaf)[0] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_row_with_nothing_to_count_is_no_sequence(mode: Aggregation) -> None:
    with_row, without = (
        aggregate(LOSS[rows], MASK[rows], mode, **needed(mode, MEAN_LENGTHS[rows])) for rows in (slice(3), slice(2))
    )
    assert torch.equal(with_row, without)


def test_an_fp64_loss_is_reduced_in_fp64() -> None:
    loss = torch.tensor([[0.1, 0.2, 0.4]], dtype=torch.float64)
    # 1/3 in fp32 would be off by 1e-8.
    assert aggregate(loss, torch.ones(1, 3)).item() == pytest.approx(0.7 / 3, rel=1e-12)
    assert aggregate(loss, torch.ones(1, 3)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_the_counts_are_tokens_that_count_and_rows_that_have_one(dtype: torch.dtype) -> None:
    counts = Counts.of(MASK.to(dtype))
    assert (counts.tokens.item(), counts.sequences.item()) == (4, 2)


def _sequences() -> tuple[dict[str, Any], Tensor]:
    """Thirty-two sequences of 0 to 40 tokens, flush left, and their lengths."""
    given = random_tensors(seed=0, shape=(32, 40), spread=0.5, dtype=torch.float32)
    lengths = torch.randint(1, 41, (32,), generator=torch.Generator().manual_seed(0))
    lengths[7] = 0
    return {name: _finite(value) for name, value in given.items() if name != "mask"}, lengths


def _finite(value: Any) -> Any:
    """Without the NaN of masked tokens, still a leaf where it was one."""
    if isinstance(value, TopK):
        return TopK(_finite(value.logp), _finite(value.behavior_logp), value.is_sampled)
    return value.detach().nan_to_num(-1.0).requires_grad_(value.requires_grad)


def _gradients(objective: Objective, rows: Tensor, rows_a_batch: int, padding: str) -> dict[Aggregation, Tensor]:
    """By mode, the gradient of the whole update for each token, flush left, after a pass over its micro-batches."""
    sequences, lengths = _sequences()
    counts = Counts(tokens=lengths.sum(), sequences=(lengths > 0).sum())
    totals = {mode: torch.zeros(()) for mode in MODES}
    whole = batch_of(objective, {**sequences, "mask": torch.arange(40) < lengths.unsqueeze(1)})
    objective = objective.for_update(whole)
    for batch_rows in rows.split(rows_a_batch):
        length = lengths[batch_rows].unsqueeze(1)
        width = int(length.max())
        column = torch.arange(width).expand(len(batch_rows), width)
        if padding == "left":
            column = column - (width - length)
        mask = (column >= 0) & (column < length)
        given = indexed(sequences, (batch_rows.unsqueeze(1), column.clamp(0)))
        loss = objective.loss(batch_of(objective, {**given, "mask": mask}))
        for mode in MODES:
            extra = needed(mode, mean_lengths_by_prompt(lengths, GROUP)[batch_rows])
            totals[mode] = totals[mode] + aggregate(loss, mask, mode, counts=counts, **extra)
    updates = {mode: gradients(total, sequences) for mode, total in totals.items()}
    return {mode: torch.cat([sampled.unsqueeze(2), others], dim=2) for mode, (sampled, others) in updates.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_does_not_depend_on_how_the_update_is_split_padded_or_ordered(name: str) -> None:
    objective = make_objective(name, **TIGHT[name])
    in_order = torch.arange(32)
    permuted = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    whole = _gradients(objective, in_order, rows_a_batch=32, padding="right")
    # Every order meets every size and every padding, and every size every padding.
    for rows, rows_a_batch, padding in (
        (in_order, 32, "left"),
        (permuted, 32, "right"),
        (in_order, 8, "right"),
        (permuted, 8, "left"),
        (in_order, 1, "left"),
        (permuted, 1, "right"),
    ):
        split = _gradients(objective, rows, rows_a_batch, padding)
        for mode in MODES:
            largest = whole[mode].abs().max().item()
            assert largest > 0
            torch.testing.assert_close(split[mode], whole[mode], rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_an_update_is_that_of_each_sequence_with_its_share(mode: Aggregation) -> None:
    """Guards the test above: gradients that agree with one another might all be wrong."""
    sequences, lengths = _sequences()
    gradient = _gradients(make_objective("pg"), torch.arange(32), 8, "right")[mode][..., 0]
    counted = torch.arange(40) < lengths.unsqueeze(1)
    tokens = int(lengths.sum())
    # 31 of the 32 have tokens.
    share = {
        "token-mean": torch.full((32,), 1 / tokens),
        "seq-mean-token-sum": torch.full((32,), 1 / 31),
        "seq-mean-token-mean": 1 / (31 * lengths.clamp(min=1)),
        "seq-mean-token-sum-norm": torch.full((32,), 1 / 310),
        "prompt-mean": 1 / (31 * mean_lengths_by_prompt(lengths, GROUP)),
    }[mode]
    ratio = (sequences["logp"] - sequences["behavior_logp"]).exp()
    expected = -ratio * sequences["advantage"] * share.unsqueeze(1) * counted
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


def test_an_unknown_mode_is_refused_with_the_nearest_match() -> None:
    with pytest.raises(ValueError, match=r"unknown aggregation 'token_mean'; did you mean 'token-mean'\?.*seq-mean"):
        aggregate(LOSS, MASK, "token_mean")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "horizon", "message"),
    [
        ("seq-mean-token-sum-norm", None, "horizon is None with aggregation 'seq-mean-token-sum-norm'.*needs one"),
        ("token-mean", 10, "horizon is 10 with aggregation 'token-mean'.*the others take none"),
        ("seq-mean-token-sum", 10, "horizon is 10 with aggregation 'seq-mean-token-sum'"),
        ("seq-mean-token-mean", 10, "horizon is 10 with aggregation 'seq-mean-token-mean'"),
        ("seq-mean-token-sum-norm", 0, "horizon is 0; expected a number of tokens > 0"),
        ("seq-mean-token-sum-norm", -5, "horizon is -5; expected a number of tokens > 0"),
    ],
)
def test_a_horizon_that_is_missing_superfluous_or_not_positive_is_refused(
    mode: Aggregation, horizon: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(LOSS, MASK, mode, horizon=horizon)


def test_a_loss_that_is_already_reduced_or_shaped_unlike_the_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss has shape \(3, 1\); expected \(3, 3\), like mask"):
        aggregate(LOSS[:, :1], MASK)
    with pytest.raises(ValueError, match=r"loss has shape \(\); expected \(3, 3\), like mask"):
        aggregate(LOSS[0, 0], MASK)


def test_prompt_mean_is_the_mean_over_prompts_of_the_mean_over_their_tokens() -> None:
    lengths = torch.tensor([3, 1, 0, 8, 2, 5])
    mask = torch.arange(8) < lengths.unsqueeze(1)
    loss = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean_lengths = mean_lengths_by_prompt(lengths, group_size=3)
    assert mean_lengths.tolist() == [2, 2, 2, 5, 5, 5]
    # The first prompt's three completions count as two, since one of them has no token.
    means = [loss[rows][mask[rows]].mean() for rows in (slice(3), slice(3, 6))]
    expected = (2 * means[0] + 3 * means[1]) / 5
    assert aggregate(loss, mask, "prompt-mean", mean_lengths=mean_lengths).item() == pytest.approx(
        expected.item(), 1e-9
    )


@pytest.mark.parametrize(("mode", "mean_lengths"), [("prompt-mean", None), ("token-mean", MEAN_LENGTHS)])
def test_mean_lengths_that_are_missing_or_superfluous_are_refused(
    mode: Aggregation, mean_lengths: Tensor | None
) -> None:
    with pytest.raises(ValueError, match=f"mean_lengths with aggregation {mode!r}: prompt-mean needs them"):
        aggregate(LOSS, MASK, mode, mean_lengths=mean_lengths)
