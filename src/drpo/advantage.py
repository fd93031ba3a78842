"""From rewards to advantages, within the group of completions of one prompt."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from drpo.registry import unknown_name

Advantage = Literal["mean", "mean-std", "leave-one-out", "max-rl", "length-weighted"]


def group_advantage(
    rewards: Tensor, group_size: int, mode: Advantage = "mean", lengths: Tensor | None = None
) -> Tensor:
    """Advantages [N] of rewards [N] in which each run of ``group_size`` shares a prompt.

    A group whose rewards are all equal, but for their own rounding, gets exact zeros. NaN marks a completion
    that could not be scored: it counts in no mean and gets 0.

    Args:
        rewards: [N], any floating-point dtype; computed in fp32, or fp64 if it comes in fp64.
        group_size: completions a prompt; N must be a multiple. A group of one gets 0.
        mode: ``mean``, minus the group's mean (the paper's); ``mean-std``, that divided by the
            group's standard deviation (GRPO's); ``leave-one-out``, minus the mean of the others
            (RLOO's); ``max-rl``, minus the group's mean and divided by it (arXiv 2602.02710, Algorithm 1, made
            for rewards of 0 and 1); ``length-weighted``, minus the mean weighted by length, which has the least variance
            where completions have orthogonal gradients as large as they are long (OPO, arXiv 2505.23585; verl's ``opo``).
        lengths: [N], tokens that count, which ``length-weighted`` needs; one without any gets 0 there.

    Raises:
        ValueError: an unknown mode, ``length-weighted`` without lengths, an infinite reward or advantage, a negative reward under ``max-rl``, or an N that is not whole groups.
    """
    if mode not in get_args(Advantage):
        raise ValueError(unknown_name("advantage", mode, get_args(Advantage)))
    if rewards.dim() != 1 or group_size < 1 or rewards.numel() % group_size:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}; expected one dimension, a multiple of group_size={group_size}"
        )
    weights = torch.ones_like(rewards)
    if mode == "length-weighted":
        if lengths is None or lengths.shape != rewards.shape:
            shape = None if lengths is None else tuple(lengths.shape)
            raise ValueError(f"lengths has shape {shape}; length-weighted needs {tuple(rewards.shape)}, as rewards has")
        weights = lengths
    if rewards.isinf().any():
        row = int(rewards.isinf().nonzero()[0])
        raise ValueError(
            f"reward of completion {row} is {rewards[row].item()}; expected a finite number, or NaN if it could not be scored"
        )
    groups = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group_size)
    weights = weights.view(-1, group_size).to(groups)
    scored = ~groups.isnan() & (weights > 0)
    size = scored.sum(dim=1, keepdim=True)
    lowest = torch.where(scored, groups, torch.inf).amin(dim=1, keepdim=True)
    highest = torch.where(scored, groups, -torch.inf).amax(dim=1, keepdim=True)
    largest = torch.maximum(highest.abs(), lowest.abs())
    # Squares and sums of rewards beyond 1e19 overflow fp32. A power of two is divided by and multiplied with exactly.
    unit = largest.log2().floor().clamp(-126, 127).exp2()
    advantage = groups / unit
    total, weight = (torch.where(scored, part, 0.0).sum(dim=1, keepdim=True) for part in (advantage * weights, weights))
    mean = total / weight.clamp(min=1)
    advantage = advantage - mean
    # A reward is a sum of parts, rounded on the way: in fp32 0.6 + 0.3 exceeds 0.9, and mean-std makes ±1 of the difference.
    rounding = 4 * torch.finfo(rewards.dtype).eps * largest
    advantage = torch.where(scored & (highest - lowest > rounding), advantage, 0.0)
    if mode == "mean-std":
        std = (advantage.square().sum(dim=1, keepdim=True) / (size - 1).clamp(min=1)).sqrt()
        return torch.where(std > 0, advantage / std, 0.0).flatten()
    if mode == "max-rl":
        refused = (groups < 0) & (advantage != 0).any(dim=1, keepdim=True)
        if refused.any():
            row = int(refused.flatten().nonzero()[0])
            raise ValueError(
                f"reward of completion {row} is {rewards[row].item():g}; max-rl divides by a group's mean, expected at least 0"
            )
        return torch.where(advantage != 0, advantage / mean, 0.0).flatten()
    if mode == "leave-one-out":
        advantage = advantage * size / (size - 1).clamp(min=1)
    advantage = advantage * unit
    if advantage.isinf().any():
        raise ValueError(
            f"advantages of rewards up to {largest.max().item():g} exceed {groups.dtype}; make rewards smaller"
        )
    return advantage.flatten()
