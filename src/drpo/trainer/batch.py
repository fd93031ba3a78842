"""The sampled completions that go from a rollout through micro-batches to the loss."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

INPUT_WIDTH = 16
"""Numbers that a processor's vector unit takes at once: 16 in fp32 with AVX-512."""


class RolloutBatch(TypedDict, total=False):
    """B sequences of P prompt columns, padded on the left, and C completion columns, padded on the right. Log-probs are in nats.

    TRL makes the dict and names the keys of its first part; this library adds those of the second.
    """

    prompt_ids: Tensor  # [B, P], int64
    prompt_mask: Tensor  # [B, P], int64: 1 where there is no padding
    completion_ids: Tensor  # [B, C], int64
    completion_mask: Tensor  # [B, C], int64: 1 up to the token that ended the completion
    tool_mask: Tensor  # [B, C], int64: 0 for tokens that a tool wrote; absent without tools
    advantages: Tensor  # [B], fp32: TRL's, replaced by those of drpo.group_advantage
    num_items_in_batch: Tensor  # scalar: the rollout's tokens over all ranks
    sampling_per_token_logps: Tensor  # [B, C], fp32: log μ of the sampled tokens, recorded as they were drawn

    mean_lengths: Tensor  # [B], fp32: tokens that count of the average completion of its prompt, for prompt-mean
    rewards: Tensor  # [B], fp32: weighted sums over reward functions, NaN where none gave a score
    age: Tensor  # [B], int64: rollouts between the weights that sampled and the policy's; absent in evaluation
    old_per_token_logps: Tensor  # [B, C], fp32: log π when the rollout began, where anchor="old" or split_distance
    lagged_per_token_logps: Tensor  # [B, C], fp32: log π by the older weights that sampled, for split_distance
    top_k_ids: Tensor  # [B, C, K], int64: the sampler's likeliest tokens, for a top-k objective
    top_k_per_token_logps: Tensor  # [B, C, K], fp32: their log μ
    support_ids: Tensor  # [B, C, K], int64: tokens that could be drawn, then NOT_IN_SUPPORT, for replay_support
    kept_mass: Tensor  # [B, C], fp32: the probability that those had before the filters, for replay_support
    prompt_experts: Tensor  # [B, P, layers, K], uint8 or int16: those that the sampler's routers chose, of a mixture
    completion_experts: Tensor  # [B, C, layers, K], the same; 0 for the last token, which was not sampled after


def loss_mask(batch: RolloutBatch) -> Tensor:
    """Tokens of the completions that count, [B, C]: those of tools were not sampled."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def has_advantage(batch: RolloutBatch) -> Tensor:
    """The sequences with an advantage and a token that counts, [B], bool."""
    return loss_mask(batch).bool().any(dim=1) & (batch["advantages"] != 0)


def widths(batch: RolloutBatch) -> Tensor:
    """Tokens of each sequence's prompt and of its completion, [B, 2]."""
    return torch.stack([batch["prompt_mask"].sum(dim=1), batch["completion_mask"].sum(dim=1)], dim=1)


def lengths(batch: RolloutBatch) -> Tensor:
    """Tokens of each sequence, prompt and completion, [B]."""
    return widths(batch).sum(dim=1)


def select(batch: RolloutBatch, rows: Tensor) -> RolloutBatch:
    """The sequences in ``rows``, without the padding that none of them needs."""
    size, width = batch["completion_ids"].shape
    # At least one column each: an empty mask has no first one.
    prompt, completion = (max(1, int(longest)) for longest in widths(batch)[rows].amax(dim=0))
    chosen: dict[str, Any] = {}
    for name, tensor in cast(dict[str, Tensor], batch).items():
        if tensor.dim() and len(tensor) == size:
            tensor = tensor[rows]
            if name.startswith("prompt_"):
                tensor = tensor[:, -prompt:]
            elif tensor.dim() >= 2 and tensor.shape[1] == width:
                tensor = tensor[:, :completion]
        chosen[name] = tensor
    return cast(RolloutBatch, chosen)


def recorded_experts(batch: RolloutBatch) -> Tensor | None:
    """The experts of the sampler, of prompts and completions, [B, P + C, layers, K]; None where none were recorded."""
    if "prompt_experts" not in batch:
        return None
    return torch.cat([batch["prompt_experts"], batch["completion_experts"]], dim=1)


class LeftAligned(NamedTuple):
    """Sequences without the padding before and between prompt and completion.

    Attributes:
        ids: [B, L], from 2 tokens on.
        counted: [B, L], bool: the tokens that count; each row's keep their order.
        experts: [B, L, layers, K], of the sampler, where they were recorded.
    """

    ids: Tensor
    counted: Tensor
    experts: Tensor | None


def left_aligned(batch: RolloutBatch, longest: int) -> LeftAligned:
    """Token ids without the padding before and between prompt and completion, and the places of the tokens that count.

    Causal attention never looks right, where the padding is now: no attention mask is needed. A model's input is all
    tokens but the last; it is padded to a multiple of :data:`INPUT_WIDTH`, or to the longest sequence of the update.
    Attention kernels round the remainder of a row differently; with this padding a sequence gets the same log-probs in
    any micro-batch.

    Args:
        batch: with prompts padded on the left and completions on the right.
        longest: tokens of the longest sequence of the update, over its micro-batches and ranks.
    """
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).bool()
    counted = torch.cat([torch.zeros_like(batch["prompt_mask"]), loss_mask(batch)], dim=1).bool()
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(2, int(mask.sum(dim=1).amax()))]
    length = order.shape[1]
    missing = (0, max(0, min(longest - length, -(length - 1) % INPUT_WIDTH)))
    if (experts := recorded_experts(batch)) is not None:
        experts = pad(experts.take_along_dim(order[..., None, None], dim=1), (0, 0, 0, 0, *missing))
    return LeftAligned(pad(ids.gather(1, order), missing), pad(counted.gather(1, order), missing), experts)
