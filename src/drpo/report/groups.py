"""Groups of trained tokens, by the sign of A, by μ and by position, and what an objective makes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from drpo.metrics.effects import EFFECTS, KINDS, SIGNS
from drpo.metrics.groups import BUCKETS, find_bucket
from drpo.report.html import table

SIGN_GROUPS = dict(zip(SIGNS, ("A > 0", "A < 0"), strict=True))
MU_GROUPS = {
    name: f"μ {low:g} to {high:g}" for (name, high), low in zip(BUCKETS.items(), [0, *BUCKETS.values()], strict=False)
}

_POSITION_ENDS = tuple(4**power for power in range(1, 9))
"""Tokens of a completion are grouped by their position, up to each of these and beyond the last."""

SIGN, MU, POSITION = "sign of the advantage", "probability of the token", "position among the tokens that count"
GROUPINGS = {
    SIGN: tuple(SIGN_GROUPS.values()),
    MU: tuple(MU_GROUPS.values()),
    POSITION: (
        "1 to 4",
        *(f"{low + 1:,} to {high:,}" for low, high in pairwise(_POSITION_ENDS)),
        f"beyond {_POSITION_ENDS[-1]:,}",
    ),
}
"""The labels of the groups, by what makes them."""

_HALTED = [KINDS.index("zeroed"), KINDS.index("reversed")]


@dataclass(frozen=True)
class Group:
    """Tokens with A ≠ 0 that have something in common.

    Args:
        label: what they have in common.
        tokens: how many they are.
        shares: of them, by :data:`drpo.metrics.effects.KINDS`.
        outside: the share that is outside of the objective's region, or, of a run's record, zeroed or reversed.
    """

    label: str
    tokens: int
    shares: dict[str, float]
    outside: float


def find_groups(advantage: Tensor, behavior_prob: Tensor, position: Tensor) -> dict[str, Tensor]:
    """The place of each token's group among the labels of :data:`GROUPINGS`, [N] each.

    Args:
        advantage: of each token, [N], not 0.
        behavior_prob: its μ, [N].
        position: 1 for the first of a completion's tokens that count, [N].
    """
    return {
        SIGN: (advantage < 0).long(),
        MU: find_bucket(behavior_prob).long(),
        POSITION: torch.bucketize(position, torch.tensor(_POSITION_ENDS)),
    }


def count_halted(counts: Tensor) -> Tensor:
    """How many tokens of each group are zeroed or reversed, [groups]; ``counts`` as in :func:`make_groups`."""
    return counts[:, _HALTED].sum(dim=1)


def make_groups(labels: Sequence[str], counts: Tensor, outside: Tensor) -> list[Group]:
    """The groups that have tokens.

    Args:
        labels: of the groups.
        counts: tokens of each group and kind, [groups, kinds].
        outside: how many of a group are, [groups].
    """
    groups = []
    for label, row, beyond in zip(labels, counts.tolist(), outside.tolist(), strict=True):
        if tokens := sum(row):
            shares = {kind: count / tokens for kind, count in zip(KINDS, row, strict=True)}
            groups.append(Group(label, tokens, shares, beyond / tokens))
    return groups


def groups_table(title: str, groups: Sequence[Group]) -> str:
    """As HTML: how many tokens a group has, and what share of them the objective hits, and how."""
    rows = [[group.label, group.tokens, group.outside, *(group.shares[e] for e in EFFECTS)] for group in groups]
    return table([title, "tokens", "outside", *EFFECTS], rows)
