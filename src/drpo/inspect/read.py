"""Rollouts from a file: log-probs of both policies and advantages of every token that counts."""

from __future__ import annotations

import math
import reprlib
from array import array
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drpo.advantage import Advantage, group_advantage
from drpo.data.rows import converted, records
from drpo.errors import UserError
from drpo.inspect.columns import Columns, find_columns

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

    def padded(self, sequences: Tensor) -> dict[str, Tensor]:
        """Some sequences as [B, T]: every tensor that the file has, and the ``mask``."""
        starts, lengths = self._starts[sequences], self.lengths[sequences]
        position = torch.arange(int(lengths.max()))
        mask = position < lengths.unsqueeze(1)
        places = torch.where(mask, starts.unsqueeze(1) + position, 0)
        given = {"logp": self.logp, "behavior_logp": self.behavior_logp, "advantage": self.advantage}
        if self.old_logp is not None:
            given["old_logp"] = self.old_logp
        return {**{name: tensor[places] for name, tensor in given.items()}, "mask": mask}

    @cached_property
    def _starts(self) -> Tensor:
        return self.lengths.cumsum(0) - self.lengths


@dataclass
class _Collected:
    values: dict[str, array[float]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.frombuffer(self.values[name], dtype=np.float32).copy())


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
    collected = _Collected()

    def convert(record: dict[str, Any], number: int) -> dict[str, Any]:
        _refuse_later_columns(f"{path}, row {number}", record, columns, present, chosen)
        return _row(record, columns.names)

    for row in converted(path, records(path), convert):
        _add(collected, row)
    if not collected.values.get("logp"):
        raise UserError(f"{path}: has no token that counts")
    lengths = torch.tensor(collected.lengths)
    has_advantage = "advantage" in collected.values
    return Rollouts(
        columns=columns,
        advantage_from="advantage" if has_advantage else "reward",
        groups=len({*zip(collected.steps, collected.groups, strict=True)}) if not has_advantage else 0,
        lengths=lengths,
        logp=collected.tensor("logp"),
        behavior_logp=collected.tensor("behavior_logp"),
        old_logp=collected.tensor("old_logp") if "old_logp" in collected.values else None,
        advantage=collected.tensor("advantage")
        if has_advantage
        else _from_rewards(path, collected, advantage).float().repeat_interleave(lengths),
        step=torch.tensor(collected.steps),
        age=torch.tensor(collected.ages) if collected.ages else None,
    )


def _columns(path: Path, chosen: Mapping[str, str]) -> tuple[Columns, Set[str]]:
    """What the columns of the first row are, and all that it has."""
    first = next((record for record in records(path) if isinstance(record, dict)), None)
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


def _row(record: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A record with its numbers checked, those of tokens that do not count left out."""
    missing = next((name for name in names.values() if name not in record), None)
    if missing is not None:
        raise ValueError(f"has no {missing}, which the first row has; expected the same columns in every row")
    found = {field: (name, record[name]) for field, name in names.items()}
    logp = _numbers(*found["logp"])
    counted = _counted(found, len(logp))
    row: dict[str, Any] = {"length": int(counted.sum())}
    for which in ("logp", "behavior_logp", "old_logp"):
        if which in found:
            row[which] = _log_probs(found[which], logp if which == "logp" else _numbers(*found[which]), counted)
    if "advantage" in found:
        row["advantage"] = _of_tokens(found["advantage"], counted)
    else:
        name, reward = found["reward"]
        row["reward"] = math.nan if reward is None else float(np.sum(_of_tokens((name, reward), counted, spread=False)))
        row["group"] = _group(*found["group"]) if "group" in found else None
    for which in ("step", "age"):
        if which in found:
            row[which] = _whole(*found[which])
    return row


def _group(name: str, value: Any) -> str:
    # What every row lacks would make one group of all of them.
    if value is None:
        raise ValueError(f"{name} is null; expected what the completions of one prompt have in common")
    return repr(value)


def _counted(found: Mapping[str, tuple[str, Any]], size: int) -> np.ndarray:
    counted = np.ones(size, dtype=bool)
    if "mask" in found:
        name, mask = found["mask"]
        values = _numbers(name, mask)
        if len(values) != size or not np.isin(values, (0, 1)).all():
            raise ValueError(f"{name} has {len(values):,} values; expected {size:,} of 0 and 1, one for each log-prob")
        return values.astype(bool)
    if "length" in found:
        name, value = found["length"]
        length = _whole(name, value)
        if length > size:
            raise ValueError(f"{name} is {length:,}; expected at most {size:,}, as many as there are log-probs")
    elif "tokens" in found:
        name, tokens = found["tokens"]
        if not isinstance(tokens, list):
            raise ValueError(f"{name} is {reprlib.repr(tokens)}; expected a list of token ids")
        length = len(tokens)
        if length > size:
            raise ValueError(f"{name} has {length:,} tokens; expected at most {size:,}, one for each log-prob")
    else:
        length = size
    counted[length:] = False
    return counted


def _log_probs(column: tuple[str, Any], values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    name = column[0]
    if len(values) != len(counted):
        raise ValueError(
            f"{name} has {len(values):,} log-probs; expected {len(counted):,}, as many as the other policy's"
        )
    kept = values[counted]
    wrong = np.flatnonzero(~(np.isfinite(kept) & (kept <= 1e-2)))
    if len(wrong):
        raise ValueError(
            f"{name} is {kept[wrong[0]]:g} at token {np.flatnonzero(counted)[wrong[0]]}; expected a finite log-probability, at most 0"
        )
    return kept


def _of_tokens(column: tuple[str, Any], counted: np.ndarray, spread: bool = True) -> np.ndarray:
    name, value = column
    if isinstance(value, list):
        values = _numbers(name, value)
        if len(values) != len(counted):
            raise ValueError(
                f"{name} has {len(values):,} values; expected one, or {len(counted):,}, one for each log-prob"
            )
        kept = values[counted]
    else:
        kept = np.repeat(_numbers(name, [value]), int(counted.sum()) if spread else 1)
    if not np.isfinite(kept).all():
        raise ValueError(f"{name} is {kept[~np.isfinite(kept)][0]:g}; expected finite numbers")
    return kept


def _numbers(name: str, value: Any) -> np.ndarray:
    # numpy would read numbers from text, and nan from null.
    if not isinstance(value, list) or not set(map(type, value)) <= {float, int, bool}:
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected a list of numbers")
    try:
        return np.asarray(value, dtype=np.float32)
    except OverflowError as error:
        raise ValueError(f"{name} holds a number too large; expected a list of numbers") from error


def _whole(name: str, value: Any) -> int:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # In this order: a number that is too large has no float.
    if not is_number or not 0 <= value < 2**53 or not float(value).is_integer():
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected a whole number, at least 0")
    return int(value)


def _add(collected: _Collected, row: dict[str, Any]) -> None:
    for name in ("logp", "behavior_logp", "old_logp", "advantage"):
        if name in row:
            collected.values.setdefault(name, array("f")).frombytes(row[name].tobytes())
    collected.lengths.append(row["length"])
    collected.steps.append(row.get("step", 0))
    if "age" in row:
        collected.ages.append(row["age"])
    if "reward" in row:
        collected.rewards.append(row["reward"])
        collected.groups.append(row["group"])


def _from_rewards(path: Path, collected: _Collected, mode: Advantage) -> Tensor:
    """An advantage for each sequence, within the sequences of its step and group.

    A prompt may come again in another step, as many times as in the first. Where its rows are not as many in
    every step, they may as well be one group's that was trained on in several updates.
    """
    if collected.groups[0] is None:
        raise UserError(
            f"{path}: has rewards and no advantages, and nothing says which rows share a prompt; expected --column group=NAME"
        )
    members: dict[tuple[int, str], list[int]] = {}
    for index, key in enumerate(zip(collected.steps, collected.groups, strict=True)):
        members.setdefault(key, []).append(index)
    _refuse_spread_groups(path, members)
    rewards = torch.tensor(collected.rewards, dtype=torch.float64)
    advantages = torch.zeros_like(rewards)
    for rows in members.values():
        advantages[rows] = group_advantage(rewards[rows], len(rows), mode)
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
