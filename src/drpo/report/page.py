"""The page of one or several runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from drpo.metrics.untrained import describe_untrained
from drpo.report import figures
from drpo.report.figures import over_rollouts
from drpo.report.groups import MU_GROUPS, SIGN_GROUPS, groups_table
from drpo.report.html import Number, document, section, table, write_page
from drpo.report.read import RunData, read_run
from drpo.report.tokens import LEGEND, texts_table
from drpo.run.folder import RunFolder
from drpo.run.recipe import dump_recipe

Draw = Callable[[Sequence[RunData]], go.Figure]

SAMPLES_SHOWN = 12

_ORIGINS = {"engine": "engine", "staleness": "age", "drift": "updates"}
"""What the parts of the distance are called."""


def _mean_distances(metrics: Mapping[str, str]) -> Draw:
    return partial(over_rollouts, metrics=metrics, y_title="|π − μ|, mean", log=True)


_FIGURES: tuple[tuple[str, str, Draw], ...] = (
    (
        "Reward and held-out accuracy",
        "The mean reward of each rollout's samples, and the share of held-out samples that are right, with its interval at 95 %.",
        figures.learning,
    ),
    (
        "Validation by verl",
        "What verl measured on its validation files, whose completions its log does not have.",
        figures.validation,
    ),
    (
        "Distance from the behaviour policy",
        "|π − μ| of the sampled tokens at the last update of each rollout, where π has moved furthest from the policy that sampled them.",
        figures.divergence,
    ),
    (
        "Gradient weights",
        "The weight w that the objective gave to the policy gradient of each token, ∂loss/∂log π = −A·r·w, over the whole run. 1: the plain policy gradient; 0: no gradient; below 0: pulled back.",
        figures.weight_distribution,
    ),
    (
        "What the objective did to tokens",
        "The share of tokens attenuated (0 < w < 1), zeroed (w = 0), reversed (w < 0) or amplified (w > 1) at the last update of each rollout; 0 and 1 to within 0.001.",
        figures.effects,
    ),
    (
        "Ratio",
        "π/μ of the sampled tokens at the last update of each rollout.",
        partial(over_rollouts, metrics={"ratio/mean": "mean", "ratio/max": "maximum"}, y_title="ratio π/μ", log=True),
    ),
    (
        "Where the distance comes from",
        "Of the engine: the weights that sampled, computed by the sampler and by the trainer. Of age: what the weights changed by before the rollout began. Of updates: what those on the rollout changed since. At the last update of each rollout.",
        _mean_distances({f"{part}/divergence/mean": label for part, label in _ORIGINS.items()}),
    ),
    (
        "Experts that differ",
        "Before the updates on each rollout: the share of sampled tokens that the policy would send to another expert than the sampler did in one layer at least, and the mean share of a token's experts.",
        partial(
            over_rollouts,
            metrics={"routing/other_tokens": "tokens", "routing/other_experts": "experts"},
            y_title="share that differs",
        ),
    ),
    (
        "Distance by the sign of the advantage",
        "|π − μ| at the last update of each rollout.",
        _mean_distances({f"divergence/mean_{group}": label for group, label in SIGN_GROUPS.items()}),
    ),
    (
        "Distance by the probability of the token",
        "|π − μ| at the last update of each rollout, by μ.",
        _mean_distances({f"divergence/mean_{group}": label for group, label in MU_GROUPS.items()}),
    ),
    (
        "Strength of the regulariser",
        "The part of the plain policy gradient that the objective takes away or adds, at the last update of each rollout.",
        partial(over_rollouts, metrics={"regulariser/strength": "strength"}, y_title="Σ|A|·r·|w − 1| / Σ|A|·r"),
    ),
)
"""Heading, note and figure; a figure that has nothing to show is left out."""


def write_report(folders: Sequence[RunFolder], target: Path) -> None:
    """Read run folders and write their page."""
    page = render([read_run(folder) for folder in folders])
    write_page(page, target)


def render(runs: Sequence[RunData]) -> str:
    """The page of one or several runs, as HTML."""
    parts = [
        _overview(runs),
        _evaluations(runs),
        _origins(runs),
        *(section(title, _caption(note, runs), draw(runs)) for title, note, draw in _FIGURES),
        _trained_tokens(runs),
        _samples(runs),
        _configuration(runs),
    ]
    return document(", ".join(run.name for run in runs), "drpo report", "".join(parts))


def _overview(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        accuracies = [show_interval(row["accuracy"]) for row in run.evaluations] or ["not measured"]
        heldout = "–"
        if run.evaluations:
            heldout = "{completions:,} of {problems:,} problems".format(**run.evaluations[-1])
        done = run.metrics[-1]["rollout"] if run.metrics else 0
        seconds = run.summary.get("train_seconds", "not finished")
        if recipe := run.recipe:
            rollouts = recipe.rollouts if run.summary else f"{done} of {recipe.rollouts}"
            settings = [rollouts, recipe.updates_per_rollout, seconds, recipe.seed]
        else:
            settings = [done, "not logged", seconds, "not logged"]
        rows.append([run.name, _objective(run), accuracies[0], accuracies[-1], Number(heldout), *settings])
    columns = ["run", "objective", "accuracy before", "accuracy after", "held-out samples", "rollouts"]
    note = '<p class="note">Accuracies have their interval at 95 %, by bootstrap over problems.</p>'
    return table([*columns, "updates a rollout", "seconds", "seed"], rows) + note + "".join(map(_notes, runs))


def _objective(run: RunData) -> str:
    recipe = run.recipe
    if recipe is None:
        return "not logged"
    factors = [(recipe.objective.name, run.summary.get("objective_kwargs", recipe.objective.hyperparameters))]
    if recipe.correction is not None:
        factors.append((recipe.correction.name, asdict(recipe.correction.make())))
    calls = [f"{name}({', '.join(f'{field}={value}' for field, value in fields.items())})" for name, fields in factors]
    return " × ".join(calls) + (f", anchor: {recipe.anchor}" if recipe.anchor else "")


def _is_of_verl(run: RunData) -> bool:
    return "verl" in run.info.get("engine", {})


def _caption(note: str, runs: Sequence[RunData]) -> str:
    """What a figure says of its rows, which are the means of a rollout's updates where verl's trainer made them."""
    if not all(map(_is_of_verl, runs)):
        return note
    return note.replace("t the last update of each rollout", "s the mean over the updates of each rollout")


def _notes(run: RunData) -> str:
    """What the audit found, whether there was anything to train on, and what a row of the log is where that differs."""
    notes = []
    if _is_of_verl(run):
        notes.append(
            "verl logs the updates of a rollout together: what is captioned as of the last update is the mean over all of "
            "them, and a maximum their largest."
        )
    if audit := run.summary.get("audit"):
        notes.append(
            f"Before the first update, |log π − log μ| was {audit['mean']:.2g} on average and {audit['maximum']:.2g} at most."
        )
    if run.metrics and (untrained := describe_untrained(run.metrics[-1])):
        notes.append(untrained)
    return "".join(f'<p class="note">{escape(f"{run.name}: {note}")}</p>' for note in notes)


def _evaluations(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        for name, evaluation in run.measured.items():
            k, engine = evaluation.get("samples"), evaluation.get("engine_description") or {}
            estimates = [evaluation["average"], evaluation["pass_at"].get(str(k)), evaluation["majority"]]
            rows.append(
                [
                    run.name,
                    name,
                    len(evaluation.get("problems_table", ())),
                    k,
                    *map(show_interval, estimates),
                    evaluation.get("truncated"),
                    evaluation.get("no_answer"),
                    f"{engine.get('name')} {engine.get('version')}, {engine.get('precision')}",
                ]
            )
    columns = ["run", "problems of", "problems", "samples K", "average@K", "pass@K", "majority@K", "truncated"]
    note = "By drpo eval, of the trained model; intervals at 95 % by bootstrap over problems."
    return section("Evaluations", note, table([*columns, "no answer", "engine"], rows))


def show_interval(estimate: Mapping[str, Any] | None) -> Number:
    """A mean with its interval; a dash for none."""
    return Number("{mean:.3f} [{low:.3f}, {high:.3f}]".format(**estimate) if estimate else "–")


def _origins(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        for part, origin in _ORIGINS.items():
            mean, p99, largest = (run.series(f"{part}/divergence/{name}")[1] for name in figures.STATISTICS)
            if mean:
                rows.append([run.name, origin, mean[0], mean[-1], p99[-1], max(largest)])
    note = "|π − μ| at the last update of each rollout, by what makes the two differ."
    columns = ["run", "origin", "mean, first rollout", "mean, last rollout", "99 % quantile, last rollout", "largest"]
    return section("Distance by origin", note, table(columns, rows))


def _trained_tokens(runs: Sequence[RunData]) -> str:
    parts = [
        f"<h3>{escape(run.name)}</h3>"
        + "".join(groups_table(title, groups) for title, groups in run.trained.by.items())
        + texts_table(run.trained.texts)
        + "".join(completion.to_html() for completion in run.trained.completions)
        for run in runs
        if run.trained.texts
    ]
    note = "Of the tokens with A ≠ 0 in all rollouts: shares by group, those that the objective zeroed or reversed (outside) or attenuated most often, and the completions with the weights farthest from 1."
    return section("Tokens that the objective changed most", note, LEGEND + "".join(parts) if parts else "")


def _samples(runs: Sequence[RunData]) -> str:
    parts = []
    for run in runs:
        for evaluation in dict.fromkeys(row["rollout"] for row in run.evaluations[:1] + run.evaluations[-1:]):
            first_of_prompt = {row["prompt"]: row for row in reversed(run.samples) if row["rollout"] == evaluation}
            chosen = list(reversed(first_of_prompt.values()))[:SAMPLES_SHOWN]
            rows = [[row["prompt"], row["completion"], row["answer"], float(row["reward"])] for row in chosen]
            parts.append(f"<p>{escape(run.name)}, after {evaluation} rollouts:</p>")
            parts.append(table(["prompt", "completion", "reference", "reward"], rows))
    return section("Held-out completions", "One of each prompt, before and after training.", "".join(parts))


def _configuration(runs: Sequence[RunData]) -> str:
    parts = []
    for run in runs:
        if run.recipe is None:
            continue
        name, recipe, info = (escape(t) for t in (run.name, dump_recipe(run.recipe), json.dumps(run.info, indent=2)))
        parts.append(f"<details open><summary>{name}: recipe</summary><pre>{recipe}</pre></details>")
        parts.append(f"<details><summary>{name}: versions</summary><pre>{info}</pre></details>")
    return section("Configuration", "What the runs were started with, and where.", "".join(parts))
