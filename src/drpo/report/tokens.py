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
from drpo.report.groups import GROUPINGS, Group, count_halted, find_groups, groups_table, make_groups

COMPLETIONS_SHOWN = 8
TEXTS_SHOWN = 20


def most_hit(texts: Sequence[str], counts: Tensor, outside: Tensor, at_most: int = TEXTS_SHOWN) -> list[Group]:
    """The texts that are outside most often, then those that are changed most often; none that is neither. Arguments as :func:`make_groups`'s."""
    changed = counts[:, 1:].sum(dim=1)
    # Stable, so that the second order decides among equals of the first.
    order = changed.argsort(descending=True, stable=True)
    order = order[outside[order].argsort(descending=True, stable=True)]
    order = order[(changed + outside)[order] > 0][:at_most]
    return make_groups([texts[int(place)] for place in order], counts[order], outside[order])


def texts_table(texts: Sequence[Group]) -> str:
    """The table of texts of tokens, with their spaces and what cannot be printed."""
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
        by: groups of those with A ≠ 0, by what makes the groups.
        texts: those that it hit most often.
        completions: those with the weights farthest from 1, farthest first.
    """

    by: dict[str, list[Group]]
    texts: list[Group]
    completions: list[WeighedCompletion]


def read_trained_tokens(rows: Iterable[dict[str, Any]]) -> TrainedTokens:
    """What the rows of a ``rollouts.jsonl`` say, read once.

    Sequences without an advantage have no policy gradient that a weight could change.
    """
    place: dict[str, int] = {}
    codes, weights = array("q"), array("f")
    advantages, log_probs, positions = array("f"), array("f"), array("q")
    farthest: list[tuple[float, int, dict[str, Any]]] = []
    for number, row in enumerate(rows):
        if not row.get("advantage") or not row.get("weight"):
            continue
        codes.extend(place.setdefault(text, len(place)) for text in row["text"])
        weights.extend(row["weight"])
        advantages.extend([row["advantage"]] * len(row["weight"]))
        log_probs.extend(row["behavior_logp"])
        positions.extend(range(1, len(row["weight"]) + 1))
        change = max(abs(1 - weight) for weight in row["weight"])
        if change > UNCHANGED:
            # The number decides between equals, the earlier row first.
            heapq.heappush(farthest, (change, -number, row))
            if len(farthest) > COMPLETIONS_SHOWN:
                heapq.heappop(farthest)
    weight = torch.tensor(weights)
    group = find_groups(torch.tensor(advantages), torch.tensor(log_probs).exp(), torch.tensor(positions))
    by = {}
    for name, labels in GROUPINGS.items():
        counts = counts_by_group(group[name], weight, len(labels))
        by[name] = make_groups(labels, counts, count_halted(counts))
    counts = counts_by_group(torch.tensor(codes, dtype=torch.long), weight, len(place))
    completions = [_weighed(row) for *_, row in sorted(farthest, key=lambda entry: entry[:2], reverse=True)]
    return TrainedTokens(by, most_hit(list(place), counts, count_halted(counts)), completions)


def _weighed(row: dict[str, Any]) -> WeighedCompletion:
    title = f"Rollout {row['rollout']}, reward {row['reward']:.3g}, advantage {row['advantage']:.3g}"
    return WeighedCompletion(title, row["prompt"], *(row[name] for name in ("text", "weight", "logp", "behavior_logp")))
