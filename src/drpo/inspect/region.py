"""What the trust region of an objective hits, by token text, position, sign of the advantage and μ, and at which δ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from drpo.inspect.read import Rollouts
from drpo.metrics.effects import KINDS, UNCHANGED, counts_by_group
from drpo.objectives import Objective
from drpo.report.groups import GROUPINGS, SIGN, SIGN_GROUPS, Group, find_groups, make_groups
from drpo.report.tokens import COMPLETIONS_SHOWN, WeighedCompletion, most_hit
from drpo.tokens import TokenBatch

DELTAS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""What δ is tried at, beside the objective's own."""

TEXTS_OF_A_DELTA = 5

_TEXTS = "text and sign"


@dataclass(frozen=True)
class Hits:
    """What an objective makes of the tokens with A ≠ 0.

    Args:
        delta: of the objective; None if it has none.
        strength: Σ|A|·r·|w − 1| / Σ|A|·r, the part of the plain policy gradient that it takes away or adds.
        all: the tokens together.
        by: groups of them, by what makes the groups.
        texts: those that are outside the region most often; empty if the file has neither texts nor token ids.
        texts_by_sign: the same of the tokens of each sign of A, by its label.
    """

    delta: float | None
    strength: float
    all: Group
    by: dict[str, list[Group]]
    texts: list[Group]
    texts_by_sign: dict[str, list[Group]]


@dataclass(frozen=True)
class Region:
    """What the trust region of an objective hits.

    Args:
        objective: its name.
        outside: when a token is outside of the region.
        hyperparameters: of the objective.
        hits: with them.
        deltas: with other δ, in their order, its own among them; empty if it has no δ.
        completions: those with the weights farthest from 1.
    """

    objective: str
    outside: str
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
    *(f"outside most often, {sign}" for sign in SIGN_GROUPS.values()),
)


def delta_rows(region: Region) -> list[tuple[float | str, ...]]:
    """What each δ would do, under :data:`DELTA_COLUMNS`; a text has its share of the tokens outside, and how many of its own are."""
    rows: list[tuple[float | str, ...]] = []
    for hits in region.deltas:
        by_sign = {group.label: group for group in hits.by[SIGN]}
        outside = (by_sign[sign].outside if sign in by_sign else "–" for sign in SIGN_GROUPS.values())
        of_all = (hits.all.outside, *outside, hits.strength) if hits.all.tokens else ("–",) * 4
        texts = (_describe_texts(hits.texts_by_sign.get(sign, []), by_sign.get(sign)) for sign in SIGN_GROUPS.values())
        rows.append((hits.delta or 0.0, *of_all, *texts))
    return rows


def _describe_texts(texts: Sequence[Group], everything: Group | None) -> str:
    if everything is None or not everything.outside:
        return "–"
    in_all = everything.outside * everything.tokens
    counts = [(text, round(text.outside * text.tokens)) for text in texts[:TEXTS_OF_A_DELTA] if text.outside]
    return (
        ", ".join(f"{text.label!r} {count / in_all:.0%} ({count:,} of {text.tokens:,})" for text, count in counts)
        or "–"
    )


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
        group = find_groups(batch.advantage[steered], batch.against("sampler").anchor_prob[steered], position[steered])
        text = self._rollouts.text[places[steered]] if self._rollouts.texts else None
        size = (batch.advantage.abs() * batch.ratio)[steered]
        for hits in self._hits:
            weight = hits.objective.gradient_weight(batch)
            outside = hits.objective.is_outside(batch).expand_as(steered)[steered]
            hits.add(weight[steered], outside, size, group, text)
            if hits.objective == self._objective:
                change = (weight - 1).abs().masked_fill(~steered, 0.0)
                self._farthest[sequences] = change.amax(dim=1).float()

    def compute(self) -> Region:
        """What was counted, with the completions that have the farthest weights."""
        hits = [counter.compute() for counter in self._hits]
        own = next(h for h, c in zip(hits, self._hits, strict=True) if c.objective == self._objective)
        return Region(
            objective=self._name,
            outside=self._objective.region.outside if self._objective.region else "w ≤ 0",
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
        # The texts of tokens with A > 0, then those of tokens with A < 0.
        groups = {name: len(labels) for name, labels in GROUPINGS.items()} | {_TEXTS: len(SIGN_GROUPS) * len(texts)}
        self._counts = {name: torch.zeros(count, len(KINDS)).long() for name, count in groups.items()}
        self._outside = {name: torch.zeros(count).long() for name, count in groups.items()}
        self._plain = self._changed = 0.0

    def add(self, weight: Tensor, outside: Tensor, size: Tensor, group: dict[str, Tensor], text: Tensor | None) -> None:
        """Count tokens with A ≠ 0, [N]: their weights, whether they are outside, |A|·r, groups, and the places of their texts."""
        groups = group if text is None else group | {_TEXTS: group[SIGN] * len(self._texts) + text}
        for name, places in groups.items():
            count = len(self._counts[name])
            self._counts[name] += counts_by_group(places, weight, count)
            self._outside[name] += torch.bincount(places[outside], minlength=count)
        self._plain += size.sum(dtype=torch.float64).item()
        self._changed += (size * (weight - 1).abs()).sum(dtype=torch.float64).item()

    def compute(self) -> Hits:
        counts, outside = self._counts, self._outside
        everything = make_groups(["all"], counts[SIGN].sum(dim=0, keepdim=True), outside[SIGN].sum(dim=0, keepdim=True))
        text_counts = counts[_TEXTS].view(len(SIGN_GROUPS), -1, len(KINDS))
        text_outside = outside[_TEXTS].view(len(SIGN_GROUPS), -1)
        return Hits(
            delta=getattr(self.objective, field) if (field := delta_field(self.objective)) else None,
            strength=self._changed / (self._plain or 1),
            all=everything[0] if everything else Group("all", 0, dict.fromkeys(KINDS, 0.0), 0.0),
            by={name: make_groups(labels, counts[name], outside[name]) for name, labels in GROUPINGS.items()},
            texts=most_hit(self._texts, text_counts.sum(dim=0), text_outside.sum(dim=0)),
            texts_by_sign={
                sign: most_hit(self._texts, text_counts[place], text_outside[place])
                for place, sign in enumerate(SIGN_GROUPS.values())
            },
        )
