"""Dynamic sampling: groups without an advantage make way for those of further prompts (DAPO, arXiv 2503.14476, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import gather, gather_object
from torch import Tensor
from torch.nn.functional import pad

from drpo.rollout.recorder import NOT_IN_SUPPORT
from drpo.trainer.batch import RolloutBatch, has_advantage, loss_mask
from drpo.trainer.config import DRPOConfig

Sample = Callable[[list[dict[str, Any]]], RolloutBatch]
"""From this rank's rows of the data set, one a completion, to their part of a rollout; all ranks call it together."""


class DynamicSampling:
    """Fills a rollout with groups that have an advantage, as far as its budget goes.

    In each round every rank samples as many prompts as the rank with the most groups to replace has. A rank discards new
    groups that have no advantage either, and those that it does not need. Groups that are still without one when the
    budget is spent stay, and have no gradient.

    Args:
        args: the trainer's options.
        dataset: further prompts are rows of it, each once before any comes again.
        rank: of this process.

    Attributes:
        counts: of the last rollout: rounds, and the groups of all ranks that were replaced.
    """

    def __init__(self, args: DRPOConfig, dataset: Any, rank: int) -> None:
        assert args.num_generations is not None
        self.counts: dict[str, int] = {}
        self._group_size, self._rounds, self._seed = args.num_generations, args.dynamic_sampling_rounds, args.seed
        self._dataset, self._rank, self._ranks = dataset, rank, args.world_size
        self._drawn = 0

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"drawn": self._drawn, "counts": dict(self.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._drawn, self.counts = state_dict["drawn"], dict(state_dict["counts"])

    def metrics(self) -> dict[str, float]:
        """What the last rollout took, if anything is ever replaced."""
        return {f"dynamic_sampling/{name}": float(count) for name, count in self.counts.items()}

    def fill(self, batch: RolloutBatch, sample: Sample, metrics: dict[str, list[float]]) -> RolloutBatch:
        """The rollout with other groups in the places of those without an advantage; all ranks call it together.

        Args:
            batch: of this rank.
            sample: makes rollouts of further prompts.
            metrics: what ``sample`` adds to them is removed: of prompts chosen by their rewards it says nothing of the policy.
        """
        if not self._rounds:
            return batch
        replaced = rounds = 0
        idle = (~self._groups_with_advantage(batch)).nonzero().flatten()
        while rounds < self._rounds and (prompts := max(gather_object([len(idle)]))):
            with _keeping(metrics):
                fresh = sample(self._draw(prompts))
            useful = self._groups_with_advantage(fresh).nonzero().flatten()[: len(idle)]
            places, idle = idle[: len(useful)], idle[len(useful) :]
            batch = replace_rows(batch, self._rows(places), fresh, self._rows(useful))
            replaced += sum(gather_object([len(useful)]))
            rounds += 1
        self.counts = {"rounds": rounds, "replaced": replaced}
        return batch

    def _groups_with_advantage(self, batch: RolloutBatch) -> Tensor:
        return has_advantage(batch).view(-1, self._group_size).any(dim=1).cpu()

    def _rows(self, groups: Tensor) -> Tensor:
        return (groups[:, None] * self._group_size + torch.arange(self._group_size)).flatten()

    def _draw(self, prompts: int) -> list[dict[str, Any]]:
        """The next rows for this rank, each as often as its group is large."""
        size = len(self._dataset)
        first = self._drawn + self._rank * prompts
        self._drawn += self._ranks * prompts
        permutations = range(first // size, (first + prompts - 1) // size + 1)
        order = torch.cat([self._permutation(number) for number in permutations])[first % size :][:prompts]
        return [row for place in order.tolist() for row in [self._dataset[place]] * self._group_size]

    def _permutation(self, number: int) -> Tensor:
        # Far from the seeds of the rollouts' own prompts, which would come again.
        generator = torch.Generator().manual_seed((1 << 32) + self._seed + number)
        return torch.randperm(len(self._dataset), generator=generator)


@contextmanager
def _keeping(metrics: dict[str, list[float]]) -> Iterator[None]:
    lengths = {name: len(values) for name, values in metrics.items()}
    yield
    for name in list(metrics):
        del metrics[name][lengths.get(name, 0) :]
        if not metrics[name]:
            del metrics[name]


def replace_rows(batch: RolloutBatch, places: Tensor, fresh: RolloutBatch, rows: Tensor) -> RolloutBatch:
    """``batch`` with sequences of ``fresh`` in some places; the number of its tokens is counted anew over all ranks.

    Args:
        batch: B sequences.
        places: [n], where in it.
        fresh: any number of sequences.
        rows: [n], which of them.
    """
    merged: dict[str, Any] = {}
    if "tool_mask" in {*batch, *fresh}:
        batch, fresh = _with_tool_mask(batch), _with_tool_mask(fresh)
    for name, old in cast(dict[str, Tensor], batch).items():
        new = cast(dict[str, Tensor], fresh)[name]
        if not old.dim():
            merged[name] = old
            continue
        shape = [max(sizes) for sizes in zip(old.shape[1:], new.shape[1:], strict=True)]
        old, new = (_widened(tensor, shape, name) for tensor in (old, new))
        merged[name] = old.index_copy(0, places.to(old.device), new[rows.to(new.device)].to(old.dtype))
    filled = cast(RolloutBatch, merged)
    filled["num_items_in_batch"] = cast(Tensor, gather(loss_mask(filled).sum())).sum()
    return filled


def _with_tool_mask(batch: RolloutBatch) -> RolloutBatch:
    """What a rollout without tools has not."""
    return {"tool_mask": torch.ones_like(batch["completion_mask"]), **batch}


def _widened(tensor: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """The tensor of a key of the batch with so many columns and more dimensions, padded where the key has its padding."""
    missing = [width - size for width, size in zip(shape, tensor.shape[1:], strict=True)]
    # From the last dimension backwards.
    sides = [side for size in reversed(missing) for side in ((size, 0) if name.startswith("prompt") else (0, size))]
    return pad(tensor, sides, value=NOT_IN_SUPPORT if name == "support_ids" else 0)
