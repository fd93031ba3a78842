"""An inspection as one page."""

from __future__ import annotations

from html import escape

from drpo.inspect import figures
from drpo.inspect.analyze import Inspection
from drpo.inspect.region import DELTA_COLUMNS, Region, delta_rows
from drpo.report.groups import groups_table
from drpo.report.html import Number, document, section, table
from drpo.report.tokens import LEGEND, texts_table

_MEASURED = {
    "divergence/mean": "|π − μ|, mean",
    "divergence/p50": "|π − μ|, median",
    "divergence/p99": "|π − μ|, 99 % quantile",
    "divergence/max": "|π − μ|, maximum",
    "log_ratio/p01": "log π − log μ, 1 % quantile, nats",
    "log_ratio/p99": "log π − log μ, 99 % quantile, nats",
    "ratio/mean": "π/μ, mean",
    "ratio/max": "π/μ, maximum",
    "kl/k3": "KL(μ‖π), estimate k3, nats",
    "effective_sample_size": "effective sample size, share",
}

_EFFECTS = ("zeroed", "reversed", "attenuated", "amplified")


def render(inspection: Inspection) -> str:
    """The page, as HTML."""
    # One step, or rollouts of one age, say nothing beyond the numbers of all tokens.
    over = {"step": inspection.by_step, "age": inspection.by_age}
    drawn = {key: figures.distances(measured, key) if len(measured) > 1 else "" for key, measured in over.items()}
    parts = [
        _overview(inspection),
        section(
            "How far apart the policies are",
            "The share of tokens whose |π − μ| is larger than so much.",
            figures.beyond(inspection),
        ),
        section("Where", "|π − μ| by the sign of the advantage and by μ of the token.", figures.groups(inspection)),
        section("Over steps", "|π − μ| of the tokens of each step.", drawn["step"]),
        section(
            "Age", "Rollouts between the policy that sampled a token and the one that trained on it.", drawn["age"]
        ),
        _deltas(inspection),
        _region(inspection.region),
        section(
            "What every objective would have done",
            "To these very tokens, by its gradient weight w: unchanged (w = 1), attenuated (0 < w < 1), zeroed (w = 0), reversed (w < 0) or amplified (w > 1); 0 and 1 to within 0.001.",
            figures.what_if(inspection),
        ),
        _objectives(inspection),
        _columns(inspection),
    ]
    return document(inspection.file, "drpo inspect", "".join(parts))


def _overview(inspection: Inspection) -> str:
    rows = [
        ["sequences", Number(f"{inspection.sequences:,}")],
        ["tokens that count", Number(f"{inspection.tokens:,}")],
        ["share of them with A ≠ 0", inspection.steered],
        ["share of them moved the way A pushes, A(r − 1) > 0", inspection.away],
        *([label, inspection.measured[name]] for name, label in _MEASURED.items() if name in inspection.measured),
    ]
    remarks = "".join(f"<p><strong>{escape(remark)}</strong></p>" for remark in inspection.remarks)
    return remarks + table(["measurement", "value"], rows)


def _deltas(inspection: Inspection) -> str:
    rows = [
        [f"{100 * share:g} %", f"none: fewer than {100 * share:g} % move away" if delta is None else delta]
        for share, delta in inspection.delta.items()
    ]
    note = "Of all tokens, so many have moved the way their advantage pushes and are at |π − μ| = δ or beyond: there DRPO's weight is 0 or pulls back, and DPPO masks."
    return section("δ for a share of tokens", note, table(["share", "δ"], rows))


def _region(region: Region) -> str:
    name = f"{region.objective}({', '.join(f'{field}={value:g}' for field, value in region.hyperparameters.items())})"
    hits = region.hits
    by = "".join(groups_table(title, groups) for title, groups in hits.by.items())
    by += texts_table(hits.texts)
    completions = "".join(completion.to_html() for completion in region.completions)
    parts = (
        section(
            f"Which δ for {region.objective}",
            f"Outside are the tokens with A ≠ 0 and {region.outside}. Strength: the part of the plain policy gradient that the objective takes away or adds. A text that is outside often: its share of the tokens outside, and how many of its own are.",
            figures.outside(region),
        ),
        table(DELTA_COLUMNS, delta_rows(region)),
        section(f"What {name} hits", "Shares of the tokens with A ≠ 0.", by),
        section(
            f"Completions that {name} changes most",
            "Those with the weights farthest from 1.",
            completions and LEGEND + completions,
        ),
    )
    return "".join(parts)


def _objectives(inspection: Inspection) -> str:
    rows = []
    for name, what_if in inspection.what_if.items():
        hyperparameters = ", ".join(f"{field}={value}" for field, value in what_if.hyperparameters.items())
        effects = [what_if.effects[effect] for effect in _EFFECTS]
        numbers = [what_if.scalars.get(scalar, "–") for scalar in ("weight/mean", "regulariser/strength")]
        rows.append([name, hyperparameters, *effects, *numbers, what_if.ratio])
    note = "Strength: Σ|A|·r·|w − 1| / Σ|A|·r, the part of the plain policy gradient that the objective takes away or adds."
    notes = {name: what_if.note for name, what_if in inspection.what_if.items() if what_if.note}
    remarks = [[name, remark] for name, remark in (notes | inspection.not_computed).items()]
    columns = ["objective", "with", *_EFFECTS, "mean w", "strength", "ratio"]
    return f"<p class=note>{note}</p>" + table(columns, rows) + table(["objective", "remark"], remarks)


def _columns(inspection: Inspection) -> str:
    note = f"Names as {inspection.format} has them, or as they were given. "
    if inspection.advantage_from == "advantage":
        note += "Advantages are the file's."
    else:
        note += f"Advantages are from the rewards, compared within {inspection.groups:,} groups, those of different steps apart."
    return section("Columns", note, table(["field", "column"], list(inspection.columns.items())))
