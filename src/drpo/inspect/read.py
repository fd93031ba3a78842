"""Rollouts from a file: log-probs of both policies and advantages of every token that counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drpo.advantage import Advantage, group_advantage
from drpo.data.files import converted, records
from drpo.errors import UserError
from drpo.inspect.columns import Columns, find_columns
from drpo.inspect.rows import Row, checked_row
from drpo.tokens import Anchor, TokenBatch

NO_ADVANTAGE = 1e-18
"""An advantage of this size counts as 0: what divides by one that is much smaller overflows."""

TOKENS_AT_ONCE = 1 << 17
"""Padded tokens of a batch: what the measurements hold at a time follows from it."""


@dataclass
class Rollouts:
    """Sequences one after another, of the tokens that count alone.

    Args:
        columns: where they are from.
        advantage_from: ``advantage`` or ``reward``.
        groups: within which rewards were compared, those of different steps apart; 0 if the file has advantages.
        lengths: tokens of each sequence, [N].
        logp: log π, flat, fp32.
        behavior_logp: log μ, flat, fp32.
        old_logp: log π_old, flat, fp32; None if the file has none.
        advantage: flat, fp32.
        step: of each sequence, [N]; zeros if the file has none.
        age: of each sequence, [N]; None if the file has none.
        texts: the texts of tokens, each once; empty if the file has none.
        text: of each token, the place of its text among them, flat, int64.
    """

    columns: Columns
    advantage_from: str
    groups: int
    lengths: Tensor
    logp: Tensor
    behavior_logp: Tensor
    old_logp: Tensor | None
    advantage: Tensor
    step: Tensor
    age: Tensor | None
    texts: list[str]
    text: Tensor

    def batches(self, key: Tensor | None = None) -> Iterator[Tensor]:
        """Sequences that make a batch, by their indices: of about one length and, in its order, of one ``key``, [N]."""
        keys = torch.zeros_like(self.lengths) if key is None else key
        order = np.lexsort((-self.lengths.numpy(), keys.numpy()))
        values, lengths = keys.tolist(), self.lengths.tolist()
        group: list[int] = []
        for index in order.tolist():
            if not lengths[index]:
                continue
            is_full = group and (len(group) + 1) * lengths[group[0]] > TOKENS_AT_ONCE
            if group and (is_full or values[index] != values[group[0]]):
                yield torch.tensor(group)
                group = []
            group.append(index)
        if group:
            yield torch.tensor(group)

    def places(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens of some sequences are among all, [B, T], and which of these places are theirs, [B, T], bool."""
        starts, lengths = self._starts[sequences], self.lengths[sequences]
        position = torch.arange(int(lengths.max()))
        mask = position < lengths.unsqueeze(1)
        return torch.where(mask, starts.unsqueeze(1) + position, 0), mask

    def padded(self, sequences: Tensor, anchor: Anchor = "sampler") -> TokenBatch:
        """Some sequences as [B, T]; the sampler stands in for an old policy that the file does not have."""
        places, mask = self.places(sequences)
        return TokenBatch(
            logp=self.logp[places],
            behavior_logp=self.behavior_logp[places],
            advantage=self.advantage[places],
            mask=mask,
            old_logp=None if self.old_logp is None else self.old_logp[places],
            anchor="sampler" if self.old_logp is None else anchor,
        )

    @cached_property
    def _starts(self) -> Tensor:
        return self.lengths.cumsum(0) - self.lengths


def read_rollouts(path: Path, chosen: Mapping[str, str], advantage: Advantage) -> Rollouts:
    """The rollouts in a .jsonl or .parquet file, one sequence a row.

    Args:
        path: the file.
        chosen: columns that the user named, by field.
        advantage: how rewards become advantages, where the file has no advantages.

    Raises:
        UserError: a file that cannot be read, or that lacks what is needed.
        MalformedRowsError: the rows that are not what they should be.
    """
    columns, present = _columns(path, chosen)

    def convert(record: dict[str, Any], number: int) -> Row:
        _refuse_later_columns(f"{path}, row {number}", record, columns, present, chosen)
        return checked_row(record, columns.names)

    rows = list(converted(path, records(path), convert))
    lengths = torch.tensor([len(row.logp) for row in rows])
    if not lengths.any():
        raise UserError(f"{path}: has no token that counts")
    if has_advantage := "advantage" in columns.names:
        groups = {}
        advantages = _flat(rows, "advantage")
    else:
        groups = _groups(path, rows)
        advantages = _from_rewards(rows, groups, advantage).float().repeat_interleave(lengths)
    place: dict[str, int] = {}
    for row in rows:
        for text in row.text or ():
            place.setdefault(text, len(place))
    return Rollouts(
        columns=columns,
        advantage_from="advantage" if has_advantage else "reward",
        groups=len(groups),
        lengths=lengths,
        logp=_flat(rows, "logp"),
        behavior_logp=_flat(rows, "behavior_logp"),
        old_logp=_flat(rows, "old_logp") if "old_logp" in columns.names else None,
        advantage=torch.where(advantages.abs() > NO_ADVANTAGE, advantages, 0.0),
        step=torch.tensor([row.step for row in rows]),
        age=torch.tensor([row.age for row in rows]) if "age" in columns.names else None,
        texts=list(place),
        text=torch.tensor([place[text] for row in rows for text in row.text or ()], dtype=torch.long),
    )


def _flat(rows: Sequence[Row], field: str) -> Tensor:
    """A field of the tokens of all rows, one after another, fp32."""
    return torch.from_numpy(np.concatenate([getattr(row, field) for row in rows]))


def _columns(path: Path, chosen: Mapping[str, str]) -> tuple[Columns, Set[str]]:
    """What the columns of the first row are, and all that it has."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet"))
        example = f", such as {files[0]}" if files else ""
        raise UserError(f"{path}: is a folder; expected a .jsonl or .parquet file{example}")
    first = next((record for _, record in records(path) if isinstance(record, dict)), None)
    if first is None:
        # A file of other things than objects is refused row by row.
        list(converted(path, records(path), lambda record, _: record))
        raise UserError(f"{path}: has no rows")
    try:
        return find_columns(first, chosen), first.keys()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _refuse_later_columns(
    where: str, record: dict[str, Any], columns: Columns, present: Set[str], chosen: Mapping[str, str]
) -> None:
    # A column that the first row has not would be left out of the rows that have it.
    if record.keys() <= present:
        return
    names = find_columns([*present, *record], chosen).names
    added = next((name for field, name in names.items() if columns.names.get(field) != name), None)
    if added is not None:
        raise UserError(f"{where}: has {added}, which the first row has not; expected the same columns in every row")


def _groups(path: Path, rows: Sequence[Row]) -> dict[tuple[int, str], list[int]]:
    """The rows of each step and group, by their indices.

    A prompt may come again in another step, as many times as in the first. Where its rows are not as many in
    every step, they may as well be one group's that was trained on in several updates.
    """
    members: dict[tuple[int, str], list[int]] = {}
    for index, row in enumerate(rows):
        if row.group is None:
            raise UserError(
                f"{path}: has rewards and no advantages, and nothing says which rows share a prompt; expected --column group=NAME"
            )
        members.setdefault((row.step, row.group), []).append(index)
    _refuse_spread_groups(path, members)
    return members


def _from_rewards(rows: Sequence[Row], groups: Mapping[tuple[int, str], list[int]], mode: Advantage) -> Tensor:
    """An advantage for each row, within its step and group."""
    rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64)
    lengths = torch.tensor([len(row.logp) for row in rows])
    advantages = torch.zeros_like(rewards)
    for members in groups.values():
        advantages[members] = group_advantage(rewards[members], len(members), mode, lengths[members])
    return advantages


def _refuse_spread_groups(path: Path, members: Mapping[tuple[int, str], list[int]]) -> None:
    sizes: dict[str, dict[int, int]] = {}
    for (step, group), rows in members.items():
        sizes.setdefault(group, {})[step] = len(rows)
    for group, of_steps in sizes.items():
        if len(of_steps) > 1 and (len(set(of_steps.values())) > 1 or 1 in of_steps.values()):
            counted = ", ".join(f"{size} in step {step}" for step, size in sorted(of_steps.items())[:2])
            raise UserError(
                f"{path}: the rows of group {group[:40]} are spread over steps ({counted}), and rewards are compared within a "
                "group and step; expected advantages, or --column step=NAME of what all rows of a group share, such as the rollout"
            )
