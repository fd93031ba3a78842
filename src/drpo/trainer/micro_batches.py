"""Which sequences of a batch are worth a forward pass, and which of them go together.

A sequence whose advantage is 0 has no gradient under an objective weighted by A; padding has none
under any. Both stay in the denominators of the loss, which are counted before.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

WIDTH = 16
"""Numbers that a processor's vector unit takes at once: 16 in fp32 with AVX-512."""


@dataclass
class Work:
    """What of a run's training phase was computed, and what was not, in sums.

    Attributes:
        sequences: sequences in the batches.
        dropped: those of them that were never computed.
        padded_tokens: tokens the batches hold as they come, padding included.
        computed_tokens: tokens that went through the model, padding included.
    """

    sequences: float = 0
    dropped: float = 0
    padded_tokens: float = 0
    computed_tokens: float = 0

    def sums(self) -> list[float]:
        return [getattr(self, field.name) for field in fields(self)]

    def metrics(self) -> dict[str, float]:
        """Shares of sequences and of tokens left out."""
        if not self.computed_tokens:
            return {}
        return {
            "work/dropped_sequences": self.dropped / self.sequences,
            "work/saved_tokens": 1 - self.computed_tokens / self.padded_tokens,
        }


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """Tokens of the completions that count, [B, C]: those of tools were not sampled."""
    mask = inputs["completion_mask"]
    return mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]


def widths(inputs: dict[str, Any]) -> Tensor:
    """Tokens of each sequence's prompt and of its completion, [B, 2]."""
    return torch.stack([inputs["prompt_mask"].sum(dim=1), inputs["completion_mask"].sum(dim=1)], dim=1)


def lengths(inputs: dict[str, Any]) -> Tensor:
    """Tokens of each sequence, prompt and completion, [B]."""
    return widths(inputs).sum(dim=1)


def split_by_length(sequence_widths: Tensor, keep: Tensor, budget: int | None) -> list[Tensor]:
    """The kept sequences, longest first, in as few groups as hold ``budget`` tokens with their padding.

    Args:
        sequence_widths: [B, parts], tokens of each part of a sequence that is padded by itself.
        keep: [B], bool.
        budget: tokens; a longer sequence is a group of its own. None makes one group.

    Returns:
        The indices of each group's sequences.
    """
    kept = keep.nonzero().squeeze(1)
    ordered = kept[sequence_widths[kept].sum(dim=1).argsort(descending=True, stable=True)]
    groups: list[list[int]] = []
    widest: list[int] = []
    for index, own in zip(ordered.tolist(), sequence_widths[ordered].tolist(), strict=True):
        together = [max(pair) for pair in zip(widest or own, own, strict=True)]
        if groups and (budget is None or (len(groups[-1]) + 1) * sum(together) <= budget):
            groups[-1].append(index)
            widest = together
        else:
            groups.append([index])
            widest = own
    return [torch.tensor(group, device=keep.device) for group in groups]


def select(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some sequences of a trainer's inputs, without the padding that none of them needs."""
    size = len(inputs["completion_ids"])
    chosen = {
        name: value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
        for name, value in inputs.items()
    }
    # At least one column each: an empty mask has no first one.
    prompt = int(chosen["prompt_mask"].sum(dim=1).amax().clamp(min=1))
    completion = int(chosen["completion_mask"].sum(dim=1).amax().clamp(min=1))
    width = inputs["completion_ids"].shape[1]
    for name, value in chosen.items():
        if name in ("prompt_ids", "prompt_mask"):
            chosen[name] = value[:, -prompt:]
        elif isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == (len(rows), width):
            chosen[name] = value[:, :completion]
    return chosen


def left_aligned(inputs: dict[str, Any], longest: int) -> tuple[Tensor, Tensor]:
    """Ids of prompt and completion without the padding between and before them, and the places of the tokens that count.

    Causal attention never looks right, where the padding is now: no attention mask is needed.
    All tokens but the last are a model's input, and theirs is a multiple of :data:`WIDTH` or the
    longest of the update: attention kernels treat what is left over of a row apart, and so round
    a sequence alike in every micro-batch it may be in.

    Args:
        inputs: a trainer's, with prompts padded on the left and completions on the right.
        longest: tokens of the longest sequence of the update, over its micro-batches and ranks.

    Returns:
        [B, L] ids and [B, L] bool, in which each row's tokens keep their order, from 2 tokens on.
    """
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
    counted = torch.cat([torch.zeros_like(inputs["prompt_mask"]), loss_mask(inputs)], dim=1).bool()
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(2, int(mask.sum(dim=1).amax()))]
    length = order.shape[1]
    missing = (0, max(0, min(longest - length, -(length - 1) % WIDTH)))
    return pad(ids.gather(1, order), missing), pad(counted.gather(1, order), missing)
