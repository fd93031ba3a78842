"""An inspection as one page."""

from __future__ import annotations

from html import escape

from drpo.inspect import figures
from drpo.inspect.analyze import Inspection
from drpo.report.html import document, section, table

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


MOST_AGES = 50
"""Rows of the table of ages."""


def render(found: Inspection) -> str:
    """The page, as HTML."""
    sections = [
        section(
            "How far apart the policies are",
            "The share of tokens whose |π − μ| is larger than so much.",
            figures.beyond(found),
        ),
        section("Where", "|π − μ| by the sign of the advantage and by μ of the token.", figures.groups(found)),
    ]
    if len(found.by_step) > 1:
        note = f"|π − μ| of the tokens of each step. {_stretched(len(found.by_step), figures.MOST_STEPS)}"
        sections.append(section("Over steps", note, figures.steps(found)))
    what_if = section(
        "What every objective would have done",
        "To these very tokens, by its gradient weight w: unchanged (w = 1), attenuated (0 < w < 1), zeroed (w = 0), reversed (w < 0) or amplified (w > 1); 0 and 1 to within 0.001.",
        figures.what_if(found),
    )
    body = [_overview(found), *sections, _ages(found), _deltas(found), what_if, _objectives(found), _columns(found)]
    return document(found.file, "drpo inspect", "".join(body))


def _overview(found: Inspection) -> str:
    rows = [
        ["sequences", f"{found.sequences:,}"],
        ["tokens that count", f"{found.tokens:,}"],
        ["share of them with A ≠ 0", found.steered],
        ["share of them moved the way A pushes, A(r − 1) > 0", found.away],
        *([label, found.measured[name]] for name, label in _MEASURED.items() if name in found.measured),
    ]
    remarks = "".join(f"<p><strong>{escape(remark)}</strong></p>" for remark in found.remarks)
    return remarks + table(["measurement", "value"], rows)


def _ages(found: Inspection) -> str:
    if not found.by_age:
        return ""
    rows = [
        [str(age.first) if age.first == age.last else f"{age.first} to {age.last}", age.mean, age.p99, age.largest]
        for age in figures.stretches(found.by_age, MOST_AGES)
    ]
    note = "Rollouts between the policy that sampled a token and the one that trained on it. "
    note += _stretched(len(found.by_age), MOST_AGES)
    return f"<h2>Age</h2><p class=note>{note}</p>" + table(["age", "|π − μ| mean", "99 % quantile", "maximum"], rows)


def _stretched(count: int, most: int) -> str:
    size = figures.steps_a_point(count, most)
    if size == 1:
        return ""
    return (
        f"There are {count:,}, and {size:,} neighbouring ones are taken together: the mean of their means, the largest of "
        "their 99 % quantiles and of their maxima."
    )


def _deltas(found: Inspection) -> str:
    rows = [
        [f"{100 * share:g} %", f"none: fewer than {100 * share:g} % move away" if delta is None else delta]
        for share, delta in found.delta.items()
    ]
    note = "Of all tokens, so many have moved the way their advantage pushes and are at |π − μ| = δ or beyond: there DRPO's weight is 0 or pulls back, and DPPO masks."
    return f"<h2>δ for a share of tokens</h2><p class=note>{note}</p>" + table(["share", "δ"], rows)


def _objectives(found: Inspection) -> str:
    rows = []
    for name, what in found.what_if.items():
        hyperparameters = ", ".join(f"{field}={value}" for field, value in what.hyperparameters.items())
        strength = what.scalars.get("regulariser/strength", "–")
        effects = [what.effects[effect] for effect in ("zeroed", "reversed", "attenuated", "amplified")]
        rows.append([name, hyperparameters, *effects, what.scalars.get("weight/mean", "–"), strength, what.ratio])
    columns = ["objective", "with", "zeroed", "reversed", "attenuated", "amplified", "mean w", "strength", "ratio"]
    note = "Strength: Σ|A|·r·|w − 1| / Σ|A|·r, the part of the plain policy gradient that the objective takes away or adds."
    said = {name: what.note for name, what in found.what_if.items() if what.note} | found.not_computed
    remarks = [[name, remark] for name, remark in said.items()]
    return (
        f"<p class=note>{note}</p>"
        + table(columns, rows)
        + (table(["objective", "remark"], remarks) if remarks else "")
    )


def _columns(found: Inspection) -> str:
    rows = [[field, name] for field, name in found.columns.items()]
    note = f"Names as {found.format} has them, or as they were given. "
    if found.advantage_from == "advantage":
        note += "Advantages are the file's."
    else:
        note += (
            f"Advantages are from the rewards, compared within {found.groups:,} groups, those of different steps apart."
        )
    return f"<h2>Columns</h2><p class=note>{escape(note)}</p>" + table(["field", "column"], rows)
