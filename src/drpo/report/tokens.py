"""Which tokens an objective hit: their texts, and the completions in which it changed a token's gradient most."""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import torch
from torch import Tensor

from drpo.metrics.effects import EFFECTS, KINDS, UNCHANGED, counts_by_group, kinds
from drpo.report.html import table

COMPLETIONS_SHOWN = 8
TEXTS_SHOWN = 20

_OUTSIDE = [KINDS.index("zeroed"), KINDS.index("reversed")]


@dataclass(frozen=True)
class Group:
    """Tokens with A ≠ 0 that have something in common.

    Args:
        label: what they have in common.
        tokens: how many they are.
        shares: of them, by :data:`drpo.metrics.effects.KINDS`.
        outside: the share that the objective does not let move on: zeroed or reversed.
    """

    label: str
    tokens: int
    shares: dict[str, float]
    outside: float


def make_groups(labels: Sequence[str], counts: Tensor) -> list[Group]:
    """The groups that have tokens.

    Args:
        labels: of the groups.
        counts: tokens of each group and kind, [groups, kinds].
    """
    groups = []
    for label, row in zip(labels, counts.tolist(), strict=True):
        if tokens := sum(row):
            shares = {kind: count / tokens for kind, count in zip(KINDS, row, strict=True)}
            groups.append(Group(label, tokens, shares, sum(row[kind] for kind in _OUTSIDE) / tokens))
    return groups


def most_hit(texts: Sequence[str], counts: Tensor, at_most: int = TEXTS_SHOWN) -> list[Group]:
    """The texts that are outside the region most often, then those that are attenuated most often; none that is unchanged."""
    outside, changed = counts[:, _OUTSIDE].sum(dim=1), counts[:, 1:].sum(dim=1)
    # Stable, so that the second order decides among equals of the first.
    order = changed.argsort(descending=True, stable=True)
    order = order[outside[order].argsort(descending=True, stable=True)]
    order = order[changed[order] > 0][:at_most]
    return make_groups([texts[int(place)] for place in order], counts[order])


def groups_table(title: str, groups: Sequence[Group]) -> str:
    """As HTML: how many tokens a group has, and what share of them the objective hits, and how."""
    rows = [[group.label, group.tokens, group.outside, *(group.shares[e] for e in EFFECTS)] for group in groups]
    return table([title, "tokens", "outside", *EFFECTS], rows)


def texts_table(texts: Sequence[Group]) -> str:
    """The same of texts of tokens, with their spaces and what cannot be printed."""
    return groups_table("token", [replace(text, label=repr(text.label)) for text in texts])


@dataclass(frozen=True)
class WeighedCompletion:
    """A completion with the gradient weight of each token that was trained on.

    Args:
        title: where it is from.
        prompt: its text; empty where that is not known.
        text: of each token.
        weight: of each token.
        logp: log π of each token.
        behavior_logp: log μ of each token.
    """

    title: str
    prompt: str
    text: list[str]
    weight: list[float]
    logp: list[float]
    behavior_logp: list[float]

    def to_html(self) -> str:
        """The title, the prompt, and the tokens, each with its numbers where the objective changed it."""
        kind = kinds(torch.tensor(self.weight)).tolist()
        tokens = zip(self.text, kind, self.weight, self.logp, self.behavior_logp, strict=True)
        body = "".join(_marked_token(*token) for token in tokens)
        prompt = f"{escape(self.prompt)}\n\n" if self.prompt else ""
        return f"<p>{escape(self.title)}:</p><pre>{prompt}{body}</pre>"


def _marked_token(text: str, kind: int, weight: float, logp: float, behavior_logp: float) -> str:
    if not kind:
        return escape(text)
    numbers = f"w = {weight:.3g}, π = {math.exp(logp):.3g}, μ = {math.exp(behavior_logp):.3g}"
    return f'<mark class="{KINDS[kind]}" title="{escape(numbers)}">{escape(text)}</mark>'


LEGEND = "<p>" + ", ".join(f'<mark class="{effect}">{effect}</mark>' for effect in EFFECTS) + "</p>"


@dataclass(frozen=True)
class TrainedTokens:
    """What the objective of a run did to the tokens it was trained on.

    Args:
        texts: those that it hit most often.
        completions: those with the weights farthest from 1, farthest first.
    """

    texts: list[Group]
    completions: list[WeighedCompletion]


def read_trained_tokens(rows: Iterable[dict[str, Any]]) -> TrainedTokens:
    """What the rows of a ``rollouts.jsonl`` say, read once.

    Sequences without an advantage have no policy gradient that a weight could change.
    """
    place: dict[str, int] = {}
    codes, weights = array("q"), array("f")
    farthest: list[tuple[float, int, dict[str, Any]]] = []
    for number, row in enumerate(rows):
        if not row.get("advantage") or not row.get("weight"):
            continue
        codes.extend(place.setdefault(text, len(place)) for text in row["text"])
        weights.extend(row["weight"])
        change = max(abs(1 - weight) for weight in row["weight"])
        if change > UNCHANGED:
            # The number decides between equals, the earlier row first.
            heapq.heappush(farthest, (change, -number, row))
            if len(farthest) > COMPLETIONS_SHOWN:
                heapq.heappop(farthest)
    counts = counts_by_group(torch.tensor(codes, dtype=torch.long), torch.tensor(weights), len(place))
    completions = [_weighed(row) for *_, row in sorted(farthest, key=lambda entry: entry[:2], reverse=True)]
    return TrainedTokens(most_hit(list(place), counts), completions)


def _weighed(row: dict[str, Any]) -> WeighedCompletion:
    title = f"Rollout {row['rollout']}, reward {row['reward']:.3g}, advantage {row['advantage']:.3g}"
    return WeighedCompletion(title, row["prompt"], *(row[name] for name in ("text", "weight", "logp", "behavior_logp")))
