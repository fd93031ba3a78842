"""The objectives as text: all of them in short, or one on a page."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from drpo.objectives import CORRECTIONS, OBJECTIVES, SYMBOLS, Correction, Objective, TopKObjective
from drpo.objectives.regions import Operator, Region

ANCHORS = {"sampler": "the log-probs of the sampler", "old": "the trainer's policy when the rollout began"}


def overview() -> RenderableType:
    """Every objective: what it maximises, its fields, anchor and source; then the corrections."""
    table = Table.grid(padding=(0, 2))
    for name, objective in OBJECTIVES.items():
        table.add_row(Text(name, style="bold"), Text(objective.formula))
        table.add_row(
            "", Text(f"{_defaults(objective)}; r = π/{SYMBOLS[objective.anchor]}; {objective.source}", style="dim")
        )
        if objective.region is not None:
            table.add_row("", Text(describe_region(objective.region, objective.operator), style="dim"))
    corrections = Table.grid(padding=(0, 2))
    for name, correction in CORRECTIONS.items():
        corrections.add_row(Text(name, style="bold"), Text(f"{correction.formula}; {_defaults(correction)}"))
        described = f"between {correction.region.edge.name}; {describe_region(correction.region, correction.operator)}"
        corrections.add_row("", Text(described, style="dim"))
    return Group(
        "Maximised per token, with advantage A and r = π/μ, or π/π_old where it says so; more: drpo objectives NAME\n",
        table,
        "\nCorrections (correction=NAME in a recipe): a weight, by ρ = π_old/μ, for objectives with r = π/π_old; a mask, for any\n",
        corrections,
    )


def page(name: str, objective: Objective) -> RenderableType:
    """One objective: what it is, its formula, weight, bounds, anchor and fields."""
    kind = type(objective)
    low, high = objective.weight_bounds
    rows = {
        "maximises": kind.formula,
        "weight w": kind.weight,
        "w within": "no bounds" if math.isinf(low) and math.isinf(high) else f"[{_number(low)}, {_number(high)}]",
        "ratio r": f"π over {SYMBOLS[kind.anchor]}, {ANCHORS[kind.anchor]}",
        "where A = 0": "the token has a gradient too" if kind.acts_without_advantage else "no gradient",
    }
    if kind.corrects_mismatch:
        rows["needs"] = "log-probs of the sampler beside those of the trainer's old policy"
    if issubclass(kind, TopKObjective):
        rows["needs"] = "log-probs of the sampler's likeliest tokens; Transformers generation records them"
    if kind.region is not None:
        rows["region"] = describe_region(kind.region, kind.operator)
    rows["source"] = kind.source
    return _page(name, kind, rows, {field.name: getattr(objective, field.name) for field in fields(objective)})


def correction_page(name: str, kind: type[Correction]) -> RenderableType:
    """One correction: what it is, its formula, region and fields."""
    rows = {
        "weight": kind.formula,
        "between": kind.region.edge.name,
        "region": describe_region(kind.region, kind.operator),
        "for": "objectives anchored on π_old" if kind.operator == "weight" else "any objective but the top-K ones",
    }
    return _page(name, kind, rows, {field.name: field.default for field in fields(kind)})


def _page(name: str, kind: type, rows: dict[str, str], values: dict[str, Any]) -> RenderableType:
    table, hyperparameters = Table.grid(padding=(0, 2)), Table.grid(padding=(0, 2))
    for label, text in rows.items():
        table.add_row(Text(label, style="dim"), Text(text))
    described = describe_fields(kind)
    for field, value in values.items():
        hyperparameters.add_row(Text(f"{field} = {value}", style="bold"), Text(described[field]))
    description = _without_arguments(inspect.getdoc(kind) or "")
    title = Text.assemble((name, "bold"), f"  {kind.__module__}.{kind.__name__}")
    body: Sequence[RenderableType] = [title, "", Text(description), "", table, "", hyperparameters]
    return Group(*body) if values else Group(*body[:-2])


def describe_region(region: Region, operator: Operator) -> str:
    """A region in one line: what is done where, over which scope, to the tokens of which side."""
    return f"{operator} where {region.where}; scope: {region.scope.name}; side: {region.side.name}"


def describe_fields(kind: type) -> dict[str, str]:
    """What each field of a dataclass is for, from the Args section of its docstring and its bases'."""
    described: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, arguments = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")
        # A field stands indented by four; what it says goes on indented further.
        for name, text in re.findall(r"^    (\w+): (.*(?:\n      .*)*)", arguments, re.MULTILINE):
            described[name] = " ".join(text.replace("``", "").split())
    return described


def _without_arguments(doc: str) -> str:
    paragraphs = re.split(r"\n\s*\n", doc.partition("\nArgs:\n")[0].replace("``", ""))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).strip()


def _defaults(kind: type) -> str:
    return ", ".join(f"{field.name}={field.default}" for field in fields(kind)) or "no hyperparameters"


def _number(value: float) -> str:
    return ("−" if value < 0 else "") + ("∞" if math.isinf(value) else f"{abs(value):.4g}")
