"""Which sequences are computed, which go together, and what is left of their padding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drpo.trainer.micro_batches import Work, left_aligned, lengths, select, split_by_length


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50), st.booleans()), min_size=1, max_size=30),
    st.one_of(st.none(), st.integers(1, 300)),
    st.booleans(),
)
def test_every_kept_sequence_is_in_one_group_within_the_budget(
    sequences: list[tuple[int, int, bool]], budget: int | None, apart: bool
) -> None:
    widths = torch.tensor([(prompt, completion) for prompt, completion, _ in sequences])
    keep = torch.tensor([kept for _, _, kept in sequences])
    sizes = widths.sum(dim=1)
    # Prompts and completions may be padded each by itself.
    padded = widths if apart else sizes.unsqueeze(1)
    groups = split_by_length(padded, keep, budget)
    assert sorted(torch.cat([*groups, torch.zeros(0)]).tolist()) == keep.nonzero().squeeze(1).tolist()
    for group in groups:
        tokens = len(group) * padded[group].amax(dim=0).sum().item()
        assert budget is None or tokens <= budget or len(group) == 1
    for longer, shorter in itertools.pairwise(groups):
        assert sizes[longer].min() >= sizes[shorter].max()
        # The next one did not fit.
        together = torch.cat([padded[longer], padded[shorter[:1]]])
        assert len(together) * together.amax(dim=0).sum() > (budget or 0)
    assert budget is not None or len(groups) <= 1


def inputs() -> dict[str, Any]:
    return {
        "prompt_ids": torch.tensor([[0, 0, 1, 2], [0, 0, 0, 3], [4, 5, 6, 7]]),
        "prompt_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]),
        "completion_ids": torch.tensor([[11, 12, 0], [13, 0, 0], [14, 15, 16]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]),
        "advantages": torch.tensor([1.0, 2.0, 3.0]),
        "top_k_ids": torch.arange(18).view(3, 3, 2),
        "num_items_in_batch": torch.tensor(6),
        "num_images": None,
    }


def test_select_takes_rows_and_the_columns_they_need() -> None:
    chosen = select(inputs(), torch.tensor([1, 0]))
    assert chosen["prompt_ids"].tolist() == [[0, 3], [1, 2]]
    assert chosen["prompt_mask"].tolist() == [[0, 1], [1, 1]]
    assert chosen["completion_ids"].tolist() == [[13, 0], [11, 12]]
    assert chosen["advantages"].tolist() == [2.0, 1.0]
    assert chosen["top_k_ids"].tolist() == [[[6, 7], [8, 9]], [[0, 1], [2, 3]]]
    assert chosen["num_items_in_batch"] == 6
    assert chosen["num_images"] is None
    assert lengths(chosen).tolist() == [2, 4]


def test_left_aligned_closes_the_gaps_and_says_where_the_counted_tokens_are() -> None:
    given = {**inputs(), "tool_mask": torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1]])}
    ids, places = left_aligned(given, longest=7)
    assert [row[:length].tolist() for row, length in zip(ids, (4, 2, 7), strict=True)] == [
        [1, 2, 11, 12],
        [3, 13],
        [4, 5, 6, 7, 14, 15, 16],
    ]
    assert places.int().tolist() == [[0, 0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 1]]


@pytest.mark.parametrize(("longest", "width"), [(7, 7), (9, 9), (17, 17), (40, 17)])
def test_left_aligned_pads_a_model_s_input_to_a_multiple_of_16_or_the_longest(longest: int, width: int) -> None:
    ids, places = left_aligned(inputs(), longest)
    assert ids.shape == places.shape == (3, width)
    assert not ids[:, 7:].any()
    assert not places[:, 7:].any()


def test_work_says_which_share_was_saved() -> None:
    work = Work(sequences=8, dropped=4, padded_tokens=400, computed_tokens=100)
    assert work.metrics() == {
        "work/dropped_sequences": 0.5,
        "work/saved_tokens": pytest.approx(0.75),
    }
    assert Work().metrics() == {}
