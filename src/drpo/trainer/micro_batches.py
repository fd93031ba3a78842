"""Which sequences of an update go through the model together, and over how many tokens its loss is averaged.

A sequence whose advantage is 0 has no gradient under an objective weighted by A; padding has none
under any. Both stay in the denominators of the loss, which are counted before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from drpo.aggregation import Counts
from drpo.tokens import TokenBatch
from drpo.trainer.batch import RolloutBatch, lengths, loss_mask, select, widths


class MicroBatches:
    """The micro-batches of an update on this rank.

    Args:
        accelerator: Accelerate's, of the ranks that share an update.
        budget: tokens, padding included, that go through the model at once; None takes a batch as a whole.
        layout: how a scorer lays out the sequences of a batch.

    Attributes:
        counts: tokens and sequences of the update that count, over its batches and all ranks.
        longest: tokens of the longest sequence among them.
    """

    def __init__(self, accelerator: Any, budget: int | None, layout: Callable[[RolloutBatch], Layout]) -> None:
        self._accelerator = accelerator
        self._budget = budget
        self._layout = layout
        self._work = torch.zeros(6, dtype=torch.long)

    def begin_update(self, batches: Sequence[RolloutBatch]) -> None:
        """Count what the update on these batches is averaged over. All ranks call it together."""
        counts = [Counts.of(loss_mask(batch)) for batch in batches]
        longest = [lengths(batch).amax() for batch in batches]
        local = [torch.stack([c.tokens, c.sequences, most]) for c, most in zip(counts, longest, strict=True)]
        tokens, sequences, longest = self._accelerator.gather(torch.stack(local)).unbind(dim=1)
        self.counts = Counts(tokens=tokens.sum(), sequences=sequences.sum())
        self.longest = int(longest.max())

    def share(self, batch: RolloutBatch) -> Tensor:
        """The share of the update's tokens that a batch has; scalar."""
        return loss_mask(batch).sum() / self.counts.tokens.clamp(min=1)

    def split(self, batch: RolloutBatch, keep: Tensor) -> list[tuple[Tensor, RolloutBatch]]:
        """Micro-batches of the sequences to keep, each after its rows in the batch. All ranks call it together.

        What is longest comes first. Every rank gets as many as the busiest; in those that only make up
        the number no token counts.

        Args:
            batch: of this rank.
            keep: [B], bool, the sequences that go through the model.
        """
        groups = split_within(self._layout(batch), keep, self._budget)
        passes = max(1, len(groups))
        if self._accelerator.num_processes > 1:
            passes = int(self._accelerator.gather(torch.tensor([passes], device=keep.device)).max())
        shortest = lengths(batch).argmin().unsqueeze(0)
        idle = select(batch, shortest)
        idle["tool_mask"] = torch.zeros_like(idle["completion_mask"])
        return [(shortest, idle)] * (passes - len(groups)) + [(rows, select(batch, rows)) for rows in groups]

    @torch.no_grad()
    def log_probs(self, batch: RolloutBatch, score: Callable[[RolloutBatch], TokenBatch]) -> Tensor:
        """The log-probs of the sampled tokens, [B, C], 0 where none counts. All ranks call it together.

        Args:
            batch: of this rank.
            score: gives the tokens of a micro-batch as training computes them.
        """
        self.begin_update([batch])
        log_probs = torch.zeros_like(batch["sampling_per_token_logps"])
        for rows, part in self.split(batch, loss_mask(batch).bool().any(dim=1)):
            counted = loss_mask(part).bool()
            sampled = score(part)
            columns = log_probs[rows, : counted.shape[1]]
            log_probs[rows, : counted.shape[1]] = columns.masked_scatter(
                counted, sampled.logp[sampled.mask].to(columns)
            )
        return log_probs

    @torch.no_grad()
    def whole_update(self, batches: Sequence[RolloutBatch], score: Callable[[RolloutBatch], TokenBatch]) -> TokenBatch:
        """The tokens of the update over all ranks, in one row. All ranks call it together, after :meth:`begin_update`.

        Args:
            batches: of this rank.
            score: gives the tokens of a micro-batch as training computes them.
        """
        sampled = [
            score(part) for batch in batches for _, part in self.split(batch, loss_mask(batch).bool().any(dim=1))
        ]
        names = [
            "logp",
            "behavior_logp",
            "advantage",
            "mask",
            *(["old_logp"] if sampled[0].old_logp is not None else []),
        ]
        own = torch.cat([torch.stack([getattr(t, name)[t.mask] for name in names]) for t in sampled], dim=1)
        # Ranks have different numbers of tokens; the padding is masked, as it is 0 there.
        ranks = self._accelerator.gather(self._accelerator.pad_across_processes(own, dim=1).unsqueeze(0))
        tensors = dict(zip(names, ranks.transpose(0, 1).flatten(1).unsqueeze(1), strict=True))
        return TokenBatch(**tensors, anchor=sampled[0].anchor)

    def split_to_train(self, batch: RolloutBatch, keep: Tensor) -> list[RolloutBatch]:
        """The same without rows; what is left out counts as work that was saved (:meth:`take_work`)."""
        micro_batches = [micro_batch for _, micro_batch in self.split(batch, keep)]
        computed = sum(self._layout(part).positions(list(range(len(part["completion_ids"])))) for part in micro_batches)
        tokens = sum(int(lengths(part).sum()) for part in micro_batches)
        padded = batch["prompt_ids"].numel() + batch["completion_ids"].numel()
        shared = max(0, tokens - computed)
        self._work += torch.tensor([len(keep), len(keep) - int(keep.sum()), padded, computed, tokens, shared])
        return micro_batches

    def take_work(self) -> dict[str, float]:
        """Shares of sequences and of tokens left out since the last call, over all ranks; empty if nothing was trained on."""
        work = self._accelerator.gather(self._work.unsqueeze(0).to(self._accelerator.device)).sum(dim=0)
        self._work.zero_()
        sequences, dropped, padded, computed, tokens, shared = work.tolist()
        if not computed:
            return {}
        shares = {"work/dropped_sequences": dropped / sequences, "work/saved_tokens": 1 - computed / padded}
        return shares | ({"work/shared_tokens": shared / tokens} if shared else {})


class Layout(Protocol):
    """How the sequences of a batch go through the model."""

    def units(self, keep: Tensor) -> list[list[int]]:
        """The sequences to keep, those that are better not parted together; the longest first."""
        ...

    def positions(self, rows: list[int]) -> int:
        """How many positions these sequences have together."""
        ...


class PaddedRows:
    """A row of the model's input is a sequence.

    Args:
        batch: of the sequences.
        apart: whether prompts and completions are padded each by itself, as for TRL's LM head.
    """

    def __init__(self, batch: RolloutBatch, *, apart: bool = False) -> None:
        self._widths = widths(batch) if apart else lengths(batch).unsqueeze(1)

    def units(self, keep: Tensor) -> list[list[int]]:
        return [[row] for row in longest_first(self._widths.sum(dim=1), keep)]

    def positions(self, rows: list[int]) -> int:
        return len(rows) * int(self._widths[rows].amax(dim=0).sum())


def longest_first(sizes: Tensor, keep: Tensor) -> list[int]:
    """The indices to keep, [B] of bool, in order of their sizes."""
    kept = keep.nonzero().squeeze(1)
    return kept[sizes[kept].argsort(descending=True, stable=True)].tolist()


def split_within(layout: Layout, keep: Tensor, budget: int | None) -> list[Tensor]:
    """The indices of the sequences to keep, in as few groups of up to ``budget`` positions as their order allows.

    Args:
        layout: of a batch.
        keep: [B], bool.
        budget: positions; a longer sequence is a group of its own. None makes one group.
    """

    def fits(rows: list[int]) -> bool:
        return budget is None or layout.positions(rows) <= budget

    groups: list[list[int]] = []
    for unit in layout.units(keep):
        for rows in [unit] if fits(unit) else [[row] for row in unit]:
            if groups and fits(groups[-1] + rows):
                groups[-1] += rows
            else:
                groups.append(list(rows))
    return [torch.tensor(group, device=keep.device) for group in groups]
