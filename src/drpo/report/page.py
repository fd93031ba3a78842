"""One self-contained HTML page: no network, nothing from a run taken for markup or script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from drpo.errors import UserError
from drpo.recipe import dump_recipe
from drpo.report import figures
from drpo.report.read import RunData, read_run
from drpo.run import RunFolder

SAMPLES_SHOWN = 12

_DRAW = """
for (const holder of document.querySelectorAll(".figure")) {
  const figure = JSON.parse(holder.querySelector("script").textContent);
  const target = document.createElement("div");
  holder.append(target);
  Plotly.newPlot(target, figure.data, figure.layout, {responsive: true, displaylogo: false, displayModeBar: "hover"});
}
"""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem }
p { margin: .25rem 0 .5rem; max-width: 46rem } .note { color: #555 }
table { border-collapse: collapse; width: 100%; font-size: 14px } th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
pre, code { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere } pre { background: #f6f6f6; padding: .8rem; }
details { margin: .5rem 0 }
"""

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
)


def write_report(folders: Sequence[RunFolder], target: Path) -> None:
    """Read run folders and write their page."""
    page = render([read_run(folder) for folder in folders])
    if target.suffix != ".html":
        raise UserError(f"--output {target}: expected a name that ends in .html")
    try:
        target.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--output {target}: cannot be written ({error.strerror})") from error


def render(runs: Sequence[RunData]) -> str:
    """The page of one or several runs, as HTML."""
    plotly = get_plotlyjs()
    sections = "".join(_section(title, note, draw(runs)) for title, note, draw in _FIGURES)
    names = escape(", ".join(run.name for run in runs))
    policy = f"default-src 'none'; script-src 'sha256-{_digest(plotly)}' 'sha256-{_digest(_DRAW)}'; style-src 'unsafe-inline'; img-src data: blob:"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{names} - drpo report</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{names}</h1>{_overview(runs)}{_measured(runs)}{sections}{_samples(runs)}{_configuration(runs)}\n"
        f"<script>{plotly}</script>\n<script>{_DRAW}</script>\n</body></html>\n"
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _section(title: str, note: str, figure: go.Figure) -> str:
    # Inside a script element nothing but its end tag is markup, and without "<" there is none.
    data = str(figure.to_json()).replace("<", "\\u003c")
    return (
        f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p>\n'
        f'<div class="figure"><script type="application/json">{data}</script></div>\n'
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any, tag: str) -> str:
        is_number = isinstance(value, (int, float))
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return f"<{tag}{' class=number' if is_number else ''}>{escape(text)}</{tag}>"

    head = "".join(cell(column, "th") for column in columns)
    body = "".join(f"<tr>{''.join(cell(value, 'td') for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


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
    return _table(columns, rows) + "".join(_audit(run) for run in runs)


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
    table = _table([*columns, "no answer", "engine"], rows)
    return f'<h2>Evaluations</h2><p class="note">{note}</p>\n{table}'


def _interval(estimate: dict[str, Any]) -> str:
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**estimate) if estimate else "–"


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
            parts.append(_table(["prompt", "completion", "reference", "reward"], rows))
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
