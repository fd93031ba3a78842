"""The page of one or several runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from drpo.metrics.effects import EFFECTS
from drpo.report import figures, off_policy
from drpo.report.html import document, section, table, write_page
from drpo.report.read import RunData, read_run
from drpo.report.tokens import marked_completion
from drpo.run.folder import RunFolder
from drpo.run.recipe import dump_recipe

SAMPLES_SHOWN = 12

_FIGURES = (
    (
        "Reward and held-out accuracy",
        "The mean reward of each rollout's samples, and the share of held-out samples that are right.",
        figures.learning,
    ),
    (
        "Distance from the behaviour policy",
        "|π − μ| of the sampled tokens at the last update of each rollout, where π has moved furthest from the policy that sampled them.",
        figures.divergence,
    ),
    (
        "Gradient weights",
        "The weight w that the objective gave to the policy gradient of each token, ∂loss/∂log π = −A·r·w, over the whole run.",
        figures.weight_distribution,
    ),
    (
        "What the objective did to tokens",
        "The share of tokens attenuated (0 < w < 1), zeroed (w = 0), reversed (w < 0) or amplified (w > 1) at the last update of each rollout; 0 and 1 to within 0.001.",
        figures.effects,
    ),
    ("Ratio", "π/μ of the sampled tokens at the last update of each rollout.", figures.ratio),
    (
        "Where the distance comes from",
        "Of the engine: the weights that sampled, computed by the sampler and by the trainer. Of age: what the weights changed by before the rollout began. Of updates: what those on the rollout changed since. At the last update of each rollout.",
        off_policy.origins,
    ),
    (
        "Distance by the sign of the advantage",
        "|π − μ| at the last update of each rollout.",
        off_policy.by_sign,
    ),
    (
        "Distance by the probability of the token",
        "|π − μ| at the last update of each rollout, by μ.",
        off_policy.by_mu,
    ),
    (
        "Strength of the regulariser",
        "The part of the plain policy gradient that the objective takes away or adds, at the last update of each rollout.",
        off_policy.strength,
    ),
)
"""Heading, note and figure; a figure that has nothing to show is left out."""


def write_report(folders: Sequence[RunFolder], target: Path) -> None:
    """Read run folders and write their page."""
    page = render([read_run(folder) for folder in folders])
    write_page(page, target)


def render(runs: Sequence[RunData]) -> str:
    """The page of one or several runs, as HTML."""
    drawn = ((title, note, draw(runs)) for title, note, draw in _FIGURES)
    sections = "".join(section(title, note, figure) for title, note, figure in drawn if figure is not None)
    names = ", ".join(run.name for run in runs)
    body = (
        f"{_overview(runs)}{_measured(runs)}{_origins(runs)}{sections}"
        f"{_changed_tokens(runs)}{_samples(runs)}{_configuration(runs)}"
    )
    return document(names, "drpo report", body)


def _overview(runs: Sequence[RunData]) -> str:
    columns = [
        "run",
        "objective",
        "accuracy before",
        "accuracy after",
        "rollouts",
        "updates a rollout",
        "seconds",
        "seed",
    ]
    rows = []
    for run in runs:
        accuracies = [row["accuracy"] for row in run.evaluations] or ["not measured"]
        done = run.metrics[-1]["rollout"] if run.metrics else 0
        rollouts = run.recipe.rollouts if run.summary else f"{done} of {run.recipe.rollouts}"
        rows.append(
            [
                run.name,
                _objective(run),
                accuracies[0],
                accuracies[-1],
                rollouts,
                run.recipe.updates_per_rollout,
                run.summary.get("train_seconds", "not finished"),
                run.recipe.seed,
            ]
        )
    return table(columns, rows) + "".join(_audit(run) for run in runs)


def _objective(run: RunData) -> str:
    recipe = run.recipe
    parts = [(recipe.objective.name, run.summary.get("objective_kwargs", recipe.objective.hyperparameters))]
    if recipe.correction is not None:
        parts.append((recipe.correction.name, asdict(recipe.correction.make())))
    said = [f"{name}({', '.join(f'{field}={value}' for field, value in fields.items())})" for name, fields in parts]
    return " × ".join(said) + (f", anchor: {recipe.anchor}" if recipe.anchor else "")


def _audit(run: RunData) -> str:
    audit = run.summary.get("audit")
    if not audit:
        return ""
    note = (
        f"{run.name}: before the first update, |log π − log μ| was "
        f"{audit['mean']:.2g} on average and {audit['maximum']:.2g} at most."
    )
    return f'<p class="note">{escape(note)}</p>'


def _measured(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        for name, found in run.measured.items():
            k, engine = found.get("samples"), found.get("engine_description") or {}
            estimates = [found["average"], found["pass_at"].get(str(k), {}), found["majority"]]
            shares = [found.get("truncated"), found.get("no_answer")]
            said = f"{engine.get('name')} {engine.get('version')}, {engine.get('precision')}"
            rows.append(
                [run.name, name, len(found.get("problems_table", ())), k, *map(_interval, estimates), *shares, said]
            )
    if not rows:
        return ""
    columns = ["run", "problems of", "problems", "samples K", "average@K", "pass@K", "majority@K", "truncated"]
    note = "By drpo eval, of the trained model; intervals at 95 % by bootstrap over problems."
    shown = table([*columns, "no answer", "engine"], rows)
    return f'<h2>Evaluations</h2><p class="note">{note}</p>\n{shown}'


def _origins(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        for part, origin in off_policy.ORIGINS.items():
            _, means = run.series(f"{part}/divergence/mean")
            if means:
                p99, largest = (run.series(f"{part}/divergence/{name}")[1] for name in ("p99", "max"))
                rows.append([run.name, origin, means[0], means[-1], p99[-1], max(largest)])
    if not rows:
        return ""
    note = "|π − μ| at the last update of each rollout, by what makes the two differ."
    columns = ["run", "origin", "mean, first rollout", "mean, last rollout", "99 % quantile, last rollout", "largest"]
    return f'<h2>Distance by origin</h2><p class="note">{note}</p>\n{table(columns, rows)}'


def _interval(estimate: dict[str, Any]) -> str:
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**estimate) if estimate else "–"


def _changed_tokens(runs: Sequence[RunData]) -> str:
    legend = ", ".join(f'<mark class="{effect}">{effect}</mark>' for effect in EFFECTS)
    parts = [
        "<h2>Tokens that the objective changed most</h2>"
        f'<p class="note">In the completions with the weights farthest from 1: {legend}.</p>'
    ]
    for run in runs:
        parts += [f"<h3>{escape(run.name)}</h3>", *map(marked_completion, run.changed)] if run.changed else []
    return "".join(parts) if len(parts) > 1 else ""


def _samples(runs: Sequence[RunData]) -> str:
    parts = ["<h2>Held-out completions</h2>"]
    for run in runs:
        for evaluation in [
            row["rollout"] for row in run.evaluations if row in (run.evaluations[0], run.evaluations[-1])
        ]:
            first_of_prompt = {row["prompt"]: row for row in reversed(run.samples) if row["rollout"] == evaluation}
            chosen = list(reversed(first_of_prompt.values()))[:SAMPLES_SHOWN]
            rows = [[row["prompt"], row["completion"], row["answer"], float(row["reward"])] for row in chosen]
            parts.append(f"<p>{escape(run.name)}, after {escape(str(evaluation))} rollouts:</p>")
            parts.append(table(["prompt", "completion", "reference", "reward"], rows))
    return "".join(parts)


def _configuration(runs: Sequence[RunData]) -> str:
    parts = ["<h2>Configuration</h2>"]
    for run in runs:
        parts.append(
            f"<details open><summary>{escape(run.name)}: recipe</summary><pre>{escape(dump_recipe(run.recipe))}</pre></details>"
        )
        info = escape(json.dumps(run.info, indent=2))
        parts.append(f"<details><summary>{escape(run.name)}: versions</summary><pre>{info}</pre></details>")
    return "".join(parts)
