"""Which sequences are computed, which go together, and what is left of their padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from drpo.trainer.batch import RolloutBatch, left_aligned, lengths, loss_mask, select
from drpo.trainer.micro_batches import MicroBatches, PaddedRows, split_within


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
    prompt_mask, completion_mask = ((torch.arange(50) < part.unsqueeze(1)).long() for part in widths.unbind(dim=1))
    batch: RolloutBatch = {"prompt_mask": prompt_mask, "completion_mask": completion_mask}
    groups = split_within(PaddedRows(batch, apart=apart), keep, budget)
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


def rollout_batch() -> RolloutBatch:
    return {
        "prompt_ids": torch.tensor([[0, 0, 1, 2], [0, 0, 0, 3], [4, 5, 6, 7]]),
        "prompt_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]),
        "completion_ids": torch.tensor([[11, 12, 0], [13, 0, 0], [14, 15, 16]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]),
        "advantages": torch.tensor([1.0, 2.0, 3.0]),
        "top_k_ids": torch.arange(18).view(3, 3, 2),
        "num_items_in_batch": torch.tensor(6),
    }


def test_select_takes_rows_and_the_columns_they_need() -> None:
    chosen = select(rollout_batch(), torch.tensor([1, 0]))
    assert chosen["prompt_ids"].tolist() == [[0, 3], [1, 2]]
    assert chosen["prompt_mask"].tolist() == [[0, 1], [1, 1]]
    assert chosen["completion_ids"].tolist() == [[13, 0], [11, 12]]
    assert chosen["advantages"].tolist() == [2.0, 1.0]
    assert chosen["top_k_ids"].tolist() == [[[6, 7], [8, 9]], [[0, 1], [2, 3]]]
    assert chosen["num_items_in_batch"] == 6
    assert lengths(chosen).tolist() == [2, 4]


def test_left_aligned_closes_the_gaps_and_says_where_the_counted_tokens_are() -> None:
    batch = rollout_batch()
    batch["tool_mask"] = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1]])
    ids, places, _ = left_aligned(batch, longest=7)
    assert [row[:length].tolist() for row, length in zip(ids, (4, 2, 7), strict=True)] == [
        [1, 2, 11, 12],
        [3, 13],
        [4, 5, 6, 7, 14, 15, 16],
    ]
    assert places.int().tolist() == [[0, 0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 1]]


@pytest.mark.parametrize(("longest", "width"), [(7, 7), (9, 9), (17, 17), (40, 17)])
def test_left_aligned_pads_a_model_s_input_to_a_multiple_of_16_or_the_longest(longest: int, width: int) -> None:
    ids, places, _ = left_aligned(rollout_batch(), longest)
    assert ids.shape == places.shape == (3, width)
    assert not ids[:, 7:].any()
    assert not places[:, 7:].any()


class TestMicroBatches:
    def test_of_an_update_share_its_counts(self) -> None:
        micro_batches = MicroBatches(Accelerator(cpu=True), budget=None, layout=PaddedRows)
        batch = rollout_batch()
        micro_batches.begin_update([batch, batch])
        # Completions of 2, 1 and 3 tokens, twice; prompt and completion of the third are 7.
        assert (micro_batches.counts.tokens, micro_batches.counts.sequences) == (12, 6)
        assert micro_batches.longest == 7
        assert micro_batches.share(batch) == 0.5

    def test_say_which_share_of_the_work_was_saved(self) -> None:
        micro_batches = MicroBatches(Accelerator(cpu=True), budget=None, layout=PaddedRows)
        assert micro_batches.take_work() == {}
        (part,) = micro_batches.split_to_train(rollout_batch(), torch.tensor([True, True, False]))
        assert part["advantages"].tolist() == [1.0, 2.0]
        # 3 sequences of 7 columns came; 2 of at most 4 tokens went through the model.
        assert micro_batches.take_work() == {
            "work/dropped_sequences": pytest.approx(1 / 3),
            "work/saved_tokens": pytest.approx(1 - 8 / 21),
        }
        assert micro_batches.take_work() == {}

    def test_are_idle_where_nothing_is_kept(self) -> None:
        micro_batches = MicroBatches(Accelerator(cpu=True), budget=None, layout=PaddedRows)
        ((_, idle),) = micro_batches.split(rollout_batch(), torch.zeros(3, dtype=torch.bool))
        assert loss_mask(idle).sum() == 0
        assert lengths(idle).tolist() == [2]
