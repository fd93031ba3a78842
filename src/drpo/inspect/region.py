"""What the trust region of an objective hits, by token text, position, sign of the advantage and μ, and at which δ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor

from drpo.inspect.read import Rollouts
from drpo.metrics.effects import KINDS, UNCHANGED, counts_by_group
from drpo.metrics.groups import find_bucket
from drpo.objectives import Objective
from drpo.report.figures import MU_GROUPS, SIGN_GROUPS
from drpo.report.tokens import COMPLETIONS_SHOWN, Group, WeighedCompletion, make_groups, most_hit
from drpo.tokens import TokenBatch

DELTAS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""What δ is tried at, beside the objective's own."""

TEXTS_OF_A_DELTA = 5

_POSITION_ENDS = tuple(4**power for power in range(1, 9))
"""Tokens of a completion are grouped by their position, up to each of these and beyond the last."""

_SIGN = "sign of the advantage"
_LABELS = {
    _SIGN: tuple(SIGN_GROUPS.values()),
    "probability of the token": tuple(MU_GROUPS.values()),
    "position among the tokens that count": (
        "1 to 4",
        *(f"{low + 1:,} to {high:,}" for low, high in pairwise(_POSITION_ENDS)),
        f"beyond {_POSITION_ENDS[-1]:,}",
    ),
}


@dataclass(frozen=True)
class Hits:
    """What an objective makes of the tokens with A ≠ 0.

    Args:
        delta: of the objective; None if it has none.
        strength: Σ|A|·r·|w − 1| / Σ|A|·r, the part of the plain policy gradient that it takes away or adds.
        all: the tokens together.
        by: groups of them, by what makes the groups.
        texts: those that are outside the region most often; empty if the file has neither texts nor token ids.
    """

    delta: float | None
    strength: float
    all: Group
    by: dict[str, list[Group]]
    texts: list[Group]


@dataclass(frozen=True)
class Region:
    """What the trust region of an objective hits.

    Args:
        objective: its name.
        hyperparameters: of the objective.
        hits: with them.
        deltas: with other δ, in their order, its own among them; empty if it has no δ.
        completions: those with the weights farthest from 1.
    """

    objective: str
    hyperparameters: dict[str, float]
    hits: Hits
    deltas: list[Hits]
    completions: list[WeighedCompletion]


def delta_field(objective: Objective) -> str | None:
    """The hyperparameter that bounds the region of an objective as δ does; None if it has none."""
    names = [field.name for field in fields(objective) if field.name.endswith("delta")]
    bound = objective.region.high if objective.region is not None else None
    return bound.field if bound and bound.field in names else next(iter(names), None)


DELTA_COLUMNS = (
    "δ",
    "outside",
    *(f"of {sign}" for sign in SIGN_GROUPS.values()),
    "strength",
    "tokens outside most often",
)


def delta_rows(region: Region) -> list[tuple[float | str, ...]]:
    """What each δ would do, under :data:`DELTA_COLUMNS`; a text has how many of its tokens are outside."""
    rows: list[tuple[float | str, ...]] = []
    for hits in region.deltas:
        outside = {group.label: group.outside for group in hits.by[_SIGN]}
        texts = [
            f"{text.label!r} {round(text.outside * text.tokens):,} of {text.tokens:,}"
            for text in hits.texts[:TEXTS_OF_A_DELTA]
            if text.outside
        ]
        by_sign = (outside.get(sign, "–") for sign in SIGN_GROUPS.values())
        of_all = (hits.all.outside, *by_sign, hits.strength) if hits.all.tokens else ("–",) * 4
        rows.append((hits.delta or 0.0, *of_all, ", ".join(texts) or "–"))
    return rows


class RegionCounter:
    """Counts what an objective does to tokens, at its own δ and at others.

    Args:
        name: of the objective.
        objective: what weighs tokens.
        rollouts: where the tokens are from.
    """

    def __init__(self, name: str, objective: Objective, rollouts: Rollouts) -> None:
        self._name = name
        self._objective = objective
        self._rollouts = rollouts
        tried = [objective]
        if field := delta_field(objective):
            deltas = {*DELTAS, getattr(objective, field)}
            tried = [replace(objective, **{field: delta}) for delta in sorted(deltas)]
        self._hits = [_HitCounter(objective, rollouts.texts) for objective in tried]
        self._farthest = torch.zeros(len(rollouts.lengths))

    def add(self, sequences: Tensor, batch: TokenBatch) -> None:
        """Count the tokens of some sequences, given by their indices, [B]; ``batch`` has them, [B, T], with its anchor."""
        steered = batch.mask & (batch.advantage != 0)
        places, _ = self._rollouts.places(sequences)
        position = torch.arange(batch.mask.shape[1]).expand_as(batch.mask) + 1
        group = {
            _SIGN: (batch.advantage < 0).long()[steered],
            "probability of the token": find_bucket(batch.against("sampler")).view_as(batch.mask)[steered].long(),
            "position among the tokens that count": torch.bucketize(position[steered], torch.tensor(_POSITION_ENDS)),
        }
        text = self._rollouts.text[places[steered]] if self._rollouts.texts else None
        size = (batch.advantage.abs() * batch.ratio)[steered]
        for hits in self._hits:
            weight = hits.objective.gradient_weight(batch)
            hits.add(weight[steered], size, group, text)
            if hits.objective == self._objective:
                change = (weight - 1).abs().masked_fill(~steered, 0.0)
                self._farthest[sequences] = change.amax(dim=1).float()

    def compute(self) -> Region:
        """What was counted, with the completions that have the farthest weights."""
        hits = [counter.compute() for counter in self._hits]
        own = next(h for h, c in zip(hits, self._hits, strict=True) if c.objective == self._objective)
        return Region(
            objective=self._name,
            hyperparameters=asdict(self._objective),
            hits=own,
            deltas=hits if own.delta is not None else [],
            completions=self._completions(),
        )

    def _completions(self) -> list[WeighedCompletion]:
        if not self._rollouts.texts:
            return []
        farthest = self._farthest.sort(descending=True, stable=True)
        shown = farthest.indices[farthest.values > UNCHANGED][:COMPLETIONS_SHOWN]
        return [self._weighed(sequence) for sequence in shown.tolist()]

    def _weighed(self, sequence: int) -> WeighedCompletion:
        batch = self._rollouts.padded(torch.tensor([sequence]), self._objective.anchor)
        places, _ = self._rollouts.places(torch.tensor([sequence]))
        advantages = batch.advantage[0].unique().tolist()
        advantage = f"{advantages[0]:.3g}" if len(advantages) == 1 else f"{advantages[0]:.3g} to {advantages[-1]:.3g}"
        return WeighedCompletion(
            title=f"Row {sequence + 1:,}, advantage {advantage}",
            prompt="",
            text=[self._rollouts.texts[place] for place in self._rollouts.text[places[0]].tolist()],
            weight=self._objective.gradient_weight(batch)[0].tolist(),
            logp=batch.logp[0].tolist(),
            behavior_logp=batch.behavior_logp[0].tolist(),
        )


class _HitCounter:
    def __init__(self, objective: Objective, texts: Sequence[str]) -> None:
        self.objective = objective
        self._texts = texts
        self._counts = {by: torch.zeros(len(labels), len(KINDS)).long() for by, labels in _LABELS.items()}
        self._text_counts = torch.zeros(len(texts), len(KINDS)).long()
        self._plain = self._changed = 0.0

    def add(self, weight: Tensor, size: Tensor, group: dict[str, Tensor], text: Tensor | None) -> None:
        """Count tokens with A ≠ 0, [N]: their weights, |A|·r, groups, and the places of their texts."""
        for by, counts in self._counts.items():
            counts += counts_by_group(group[by], weight, len(counts))
        if text is not None:
            self._text_counts += counts_by_group(text, weight, len(self._texts))
        self._plain += size.sum(dtype=torch.float64).item()
        self._changed += (size * (weight - 1).abs()).sum(dtype=torch.float64).item()

    def compute(self) -> Hits:
        by = {name: make_groups(_LABELS[name], counts) for name, counts in self._counts.items()}
        everything = self._counts[_SIGN].sum(dim=0, keepdim=True)
        return Hits(
            delta=getattr(self.objective, field) if (field := delta_field(self.objective)) else None,
            strength=self._changed / (self._plain or 1),
            all=next(iter(make_groups(["all"], everything)), Group("all", 0, dict.fromkeys(KINDS, 0.0), 0.0)),
            by=by,
            texts=most_hit(self._texts, self._text_counts),
        )
