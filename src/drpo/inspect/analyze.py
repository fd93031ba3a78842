"""What rollouts say: how far π has gone from μ, and what every objective would have made of these very tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from drpo.errors import UserError
from drpo.inspect.read import Rollouts
from drpo.inspect.region import Region, RegionCounter
from drpo.metrics import TrustRegionMetrics, effects
from drpo.objectives import SYMBOLS, Objective, TopKObjective
from drpo.tokens import LOG_RATIO_BOUND, TokenBatch

SHARES = (0.001, 0.01, 0.05, 0.1)
"""Shares of tokens for which δ is given beside the one asked for."""


@dataclass(frozen=True)
class WhatIf:
    """What an objective would have made of the tokens.

    Args:
        hyperparameters: of the objective.
        ratio: what was taken for its ratio, such as ``π/μ``.
        note: where that is not what it is defined with; else empty.
        scalars: those of :func:`drpo.metrics.effects.scalars`.
        effects: of the tokens with A ≠ 0, the share unchanged and with each effect.
        weight_histogram: between :data:`drpo.metrics.histograms.WEIGHT_EDGES`, of the tokens with A ≠ 0.
    """

    hyperparameters: dict[str, float]
    ratio: str
    note: str
    scalars: dict[str, float]
    effects: dict[str, float]
    weight_histogram: list[int]


@dataclass(frozen=True)
class Inspection:
    """What was found in a file of rollouts.

    Args:
        file: its name.
        format: of its columns, and which column is what.
        advantage_from: ``advantage`` or ``reward``.
        groups: within which rewards were compared; 0 if the file has advantages.
        sequences: with at least one token that counts.
        tokens: that count.
        steered: the share of them with A ≠ 0.
        away: the share of them that moved the way their advantage pushes: A(r − 1) > 0.
        measured: the scalars of :class:`drpo.TrustRegion` that need no objective, over all tokens.
        divergence_histogram: of |π − μ| over all tokens.
        by_step: those of each step that are not by group of tokens, if the file has steps.
        by_age: the same of each age in rollouts, if the file has ages.
        what_if: of every objective that could be computed.
        not_computed: why the others could not.
        delta: for a share of the tokens, the δ that so many of them reach: A(r − 1) > 0 and
            |π − μ| ≥ δ; None where fewer move away at all.
        region: what one objective's trust region hits.
        remarks: what makes the numbers doubtful, a sentence each.
    """

    file: str
    format: str
    columns: dict[str, str]
    advantage_from: str
    groups: int
    sequences: int
    tokens: int
    steered: float
    away: float
    measured: dict[str, float]
    divergence_histogram: list[int]
    by_step: dict[int, dict[str, float]]
    by_age: dict[int, dict[str, float]]
    what_if: dict[str, WhatIf]
    not_computed: dict[str, str]
    delta: dict[float, float | None]
    region: Region
    remarks: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def analyse(
    file: str, rollouts: Rollouts, objectives: Mapping[str, Objective], share: float, region_of: str
) -> Inspection:
    """Measure rollouts and weigh them by objectives.

    Args:
        file: what to call them.
        rollouts: the tokens.
        objectives: by name.
        share: of tokens, for which δ is wanted.
        region_of: the name of the objective whose region is looked at, token by token.

    Raises:
        UserError: an objective whose region the file does not say enough for.
    """
    total = TrustRegionMetrics()
    sums: dict[str, dict[str, Tensor]] = {}
    distances = []
    why_not = {
        name: reason for name, o in objectives.items() if (reason := why_not_computed(o, rollouts.old_logp is not None))
    }
    if region_of in why_not:
        raise UserError(f"{region_of} cannot be computed: {why_not[region_of]}")
    region = RegionCounter(region_of, objectives[region_of], rollouts)
    for sequences in rollouts.batches():
        batches: dict[str, TokenBatch] = {anchor: rollouts.padded(sequences, anchor) for anchor in ("sampler", "old")}
        sampled = batches["sampler"]
        total.update(sampled)
        moves_away = sampled.mask & (sampled.advantage * sampled.excess > 0)
        distances.append(sampled.shift.abs()[moves_away])
        region.add(sequences, batches[objectives[region_of].anchor])
        for name, objective in objectives.items():
            if name not in why_not:
                batch = batches[objective.anchor]
                found = effects.sums(batch, objective.gradient_weight(batch), torch.float64)
                before = sums.get(name, {})
                sums[name] = {key: before.get(key, 0) + value for key, value in found.items()}
    away = torch.cat(distances).sort(descending=True).values
    measured = total.compute()
    tokens = len(rollouts.logp)
    steered = int((rollouts.advantage != 0).sum())
    return Inspection(
        file=file,
        format=rollouts.columns.format,
        columns=dict(rollouts.columns.names),
        advantage_from=rollouts.advantage_from,
        groups=rollouts.groups,
        sequences=int((rollouts.lengths > 0).sum()),
        tokens=tokens,
        steered=steered / tokens,
        away=len(away) / tokens,
        measured=measured.scalars,
        divergence_histogram=measured.divergence_histogram,
        by_step=_measured_by(rollouts, rollouts.step) if "step" in rollouts.columns.names else {},
        by_age=_measured_by(rollouts, rollouts.age) if rollouts.age is not None else {},
        what_if={name: _what_if(objectives[name], sums[name], rollouts.old_logp is not None) for name in sums},
        not_computed=why_not,
        delta={part: _delta(away, part, tokens) for part in sorted({*SHARES, share})},
        region=region.compute(),
        remarks=_remarks(rollouts),
    )


def _remarks(rollouts: Rollouts) -> list[str]:
    names = rollouts.columns.names
    if not rollouts.advantage.any():
        return ["no token has an advantage other than 0, so that no objective weighed by it does anything"]
    if torch.equal(rollouts.logp, rollouts.behavior_logp):
        return [
            f"π and μ are equal at every token; is {names['logp']} a copy of {names['behavior_logp']}, as verl's "
            "old_log_probs are in bypass mode?"
        ]
    bounded = int(((rollouts.logp - rollouts.behavior_logp).abs() > LOG_RATIO_BOUND).sum())
    if bounded:
        return [
            f"|log π − log μ| is beyond {LOG_RATIO_BOUND:g} at {bounded:,} of the tokens and is taken as {LOG_RATIO_BOUND:g} "
            "there, so that |π − μ| may be larger than it says; are both policies' log-probs of the same tokens?"
        ]
    return []


def why_not_computed(objective: Objective, has_old: bool) -> str:
    """Why a file of rollouts says too little for an objective, without or with π_old; "" where it says enough."""
    if isinstance(objective, TopKObjective):
        return "it needs log-probs of the sampler's likeliest tokens, which the file does not have"
    if objective.corrects_mismatch and not has_old:
        return "it weighs tokens by π_old/μ, and the file has no column for old_logp"
    if objective.over_updates:
        return "it weighs a token by all tokens of its update, and which these were the file does not say"
    return ""


def _what_if(objective: Objective, sums: dict[str, Tensor], has_old: bool) -> WhatIf:
    histogram = sums["weight_histogram"].long().tolist()
    total = {name: value.item() for name, value in sums.items() if name != "weight_histogram"}
    steered = total["tokens_positive"] + total["tokens_negative"]
    shares = {e: sum(total[f"{e}_{sign}"] for sign in effects.SIGNS) / (steered or 1) for e in effects.EFFECTS}
    is_moved = objective.anchor == "old" and not has_old
    return WhatIf(
        hyperparameters=asdict(objective),
        ratio=f"π/{SYMBOLS['sampler' if is_moved else objective.anchor]}",
        note="its ratio is against π_old, which the file does not have; μ stands in for it" if is_moved else "",
        scalars=effects.scalars(total),
        effects={"unchanged": max(0.0, 1 - sum(shares.values())), **shares},
        weight_histogram=histogram,
    )


def _measured_by(rollouts: Rollouts, key: Tensor) -> dict[int, dict[str, float]]:
    """Those of the sequences of each ``key``, [N], that are not by group of tokens."""
    measured = {}
    for value, batches in groupby(rollouts.batches(key), lambda sequences: int(key[sequences[0]])):
        metrics = TrustRegionMetrics(by_group=False)
        for sequences in batches:
            metrics.update(rollouts.padded(sequences))
        measured[value] = metrics.compute().scalars
    return measured


def _delta(away: Tensor, share: float, tokens: int) -> float | None:
    """The distance that ``share`` of all tokens are at or beyond; ``away`` has those that move away, farthest first."""
    wanted = max(1, round(share * tokens))
    return away[wanted - 1].item() if wanted <= len(away) else None
