"""The tables and pictures of docs/findings.md, from the committed results of the lab.

    python scripts/findings.py         # writes the tables into the page, and docs/images/lab*.png

To go on with the grid: copy docs/results/lab_runs.jsonl to FOLDER/runs.jsonl, `drpo lab run --preset ... --output FOLDER`,
copy it back, and run this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from drpo.files import iterate_jsonl
from drpo.lab.grid import (
    BESIDE,
    COMPARED,
    CORE,
    DELTAS,
    LEARNING_RATES,
    PRESETS,
    SETTINGS,
    TUNING_RATES,
    Run,
    best_rate,
    tuned,
)
from drpo.lab.runner import run_of
from drpo.lab.statistics import area_under, estimate, has_collapsed, probability_of_improvement
from drpo.metrics.histograms import WEIGHT_EDGES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "lab_runs.jsonl"
PAGE = ROOT / "docs" / "findings.md"
IMAGES = ROOT / "docs" / "images"

RATES = LEARNING_RATES[1:4]
UPDATES = 16
SEEDS = 5
ROLLOUTS = 60
DELTA_RATE = LEARNING_RATES[2]
ZERO_BIN = int(torch.searchsorted(WEIGHT_EDGES, 0.0))
EDGE = float(WEIGHT_EDGES[ZERO_BIN])
"""The upper end of the bin of weights that has 0 in it."""
WITHOUT_REGION = ("pg", "spo", "drpo(12.5)")
"""Arms whose gradient weight does not reach zero at these settings, but for less than a hundred tokens in a million of spo's."""

Row = dict[str, Any]
Cells = dict[tuple[str, float, int], list[Row]]


def read_runs(path: Path = RESULTS) -> dict[Run, Row]:
    """The runs with their results.

    Raises:
        ValueError: one failed, of which the tables would have to say something.
    """
    rows = list(iterate_jsonl(path))
    if failed := [run_of(row) for row in rows if row["status"] != "finished"]:
        raise ValueError(f"{path}: {len(failed)} runs failed, {failed[0]} among them; expected none")
    return {run_of(row): row for row in rows}


def read_cells(path: Path = RESULTS) -> Cells:
    """The runs of the setting ``fp32`` without lag, over all rollouts and of seeds 0 to 4, by arm, learning rate and updates a rollout."""
    cells: Cells = defaultdict(list)
    for run, row in read_runs(path).items():
        if (run.setting, run.lag, run.rollouts) == ("fp32", 0, ROLLOUTS) and run.seed < SEEDS:
            cells[run.arm, run.learning_rate, run.updates].append(row)
    return cells


def areas(cells: Cells, arm: str, rate: float, updates: int = UPDATES) -> list[float]:
    """The mean accuracy over each run of a cell."""
    return [area_under(row["accuracy"]) for row in cells[arm, rate, updates]]


def training_table(cells: Cells) -> str:
    """Mean accuracy over the run and collapsed runs, by arm and learning rate."""
    lines = [_header("arm", [f"{rate:g}" for rate in RATES])]
    lines += [f"| {arm} | {' | '.join(_describe(cells[arm, rate, UPDATES]) for rate in RATES)} |" for arm in CORE]
    return "\n".join(lines)


def improvement_table(cells: Cells) -> str:
    """The probability that a run of an arm has a higher mean accuracy than one of pg, and of ppo."""
    lines = [_header("arm", [f"{rate:g}, over {arm}" for arm in ("pg", "ppo") for rate in RATES])]
    for arm in CORE[1:]:
        columns = []
        for baseline in ("pg", "ppo"):
            for rate in RATES:
                better = probability_of_improvement(areas(cells, baseline, rate), areas(cells, arm, rate))
                columns.append("" if arm == baseline else f"{better.value:.2f} [{better.low:.2f}, {better.high:.2f}]")
        lines.append(f"| {arm} | {' | '.join(columns)} |")
    return "\n".join(lines)


def delta_table(cells: Cells) -> str:
    """Mean accuracy, collapsed runs and the share of trained tokens with hardly a gradient, by δ, of drpo and dppo_tv."""
    kinds = ("drpo", "dppo_tv")
    lines = [_header("δ", [text for kind in kinds for text in (kind, f"{kind}: weight < {EDGE:.2f}")])]
    for delta in DELTAS:
        columns = []
        for kind in kinds:
            arm = f"{kind}({delta:g})"
            histograms = [row["weight_histogram"] for row in cells[arm, DELTA_RATE, UPDATES]]
            counts = torch.tensor(histograms).sum(dim=0)
            columns.append(_describe(cells[arm, DELTA_RATE, UPDATES]))
            columns.append(f"{counts[: ZERO_BIN + 1].sum() / counts.sum():.1%}")
        lines.append(f"| {delta:g} | {' | '.join(columns)} |")
    return "\n".join(lines)


def ablations_table(runs: dict[Run, Row]) -> str:
    """The ablations beside their controls, by learning rate, and the probability that a run of an arm is better than one of drpo(0.2)."""
    plan = PRESETS["arms"]({})
    rates = sorted({run.learning_rate for run in plan})
    names = [f"{rate:g}" for rate in rates]
    lines = [_header("arm", [*names, *(f"{name}, over drpo(0.2)" for name in names)])]
    rows: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for run in plan:
        if run in runs:
            rows[run.arm, run.learning_rate].append(runs[run])
    for arm in dict.fromkeys(run.arm for run in plan):
        cells = [_describe(rows[arm, rate]) for rate in rates]
        for rate in rates:
            control, ours = ([area_under(row["accuracy"]) for row in rows[name, rate]] for name in ("drpo(0.2)", arm))
            better = probability_of_improvement(control, ours)
            cells.append("" if arm == "drpo(0.2)" else f"{better.value:.2f} [{better.low:.2f}, {better.high:.2f}]")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def settings_tables(runs: dict[Run, Row]) -> str:
    """Of each setting whose tuning is complete: every arm's tuning, and its other seeds so far at the rate that was chosen."""
    means = {run: area_under(row["accuracy"]) for run, row in runs.items()}
    parts = []
    for name, setting in SETTINGS.items():
        if any(best_rate(name, arm, means) is None for arm in (*COMPARED, *BESIDE)):
            continue
        columns = [f"{rate:g}, seed 0" for rate in TUNING_RATES] + ["rate chosen", "other seeds", "over ppo"]
        lines = [f"{setting.description[0].upper()}{setting.description[1:]} (`{name}`):", "", _header("arm", columns)]
        chosen = {arm: _other_seeds(name, arm, means, runs) for arm in (*COMPARED, *BESIDE)}
        for arm, (rate, rows) in chosen.items():
            tuning = [runs[Run(name, arm, rate)] for rate in TUNING_RATES]
            ours, ppo = ([area_under(row["accuracy"]) for row in of_arm] for of_arm in (rows, chosen["ppo"][1]))
            cells = [f"{area_under(row['accuracy']):.2f}{_mark(row)}" for row in tuning]
            cells += [f"{rate:g}", _describe(rows) if rows else ""]
            better = probability_of_improvement(ppo, ours) if ppo and ours and arm != "ppo" else None
            cells += [f"{better.value:.2f} [{better.low:.2f}, {better.high:.2f}]" if better else ""]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _other_seeds(setting: str, arm: str, means: dict[Run, float], runs: dict[Run, Row]) -> tuple[float, list[Row]]:
    """The learning rate that seed 0 chose for an arm, and the runs of other seeds at it."""
    rate = best_rate(setting, arm, means)
    assert rate is not None
    return rate, [runs[run] for run in tuned(setting, means) if run.arm == arm and run.seed and run in runs]


def _mark(row: Row) -> str:
    return " †" if has_collapsed(row["accuracy"]) else ""


def _describe(rows: Sequence[Row]) -> str:
    """Mean accuracy over the run with its interval, and how many of the runs collapsed."""
    mean = estimate([area_under(row["accuracy"]) for row in rows])
    collapsed = sum(has_collapsed(row["accuracy"]) for row in rows)
    return f"{mean.value:.2f} [{mean.low:.2f}, {mean.high:.2f}] {collapsed}/{len(rows)}"


def _header(first: str, others: Sequence[str]) -> str:
    names = [first, *others]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


TABLES: dict[str, Callable[[Cells], str]] = {
    "training": training_table,
    "improvement": improvement_table,
    "delta": delta_table,
}


def with_tables(page: str, path: Path = RESULTS) -> str:
    """The page with each table between its markers made anew.

    Raises:
        ValueError: a marker is missing.
    """
    cells = read_cells(path)
    runs = read_runs(path)
    tables = {name: make(cells) for name, make in TABLES.items()}
    tables |= {"settings": settings_tables(runs), "ablations": ablations_table(runs)}
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        start, stop = page.index(begin) + len(begin), page.index(end)
        page = page[:start] + table + page[stop:]
    return page


def curves(cells: Cells) -> Figure:
    """Held-out accuracy over rollouts at each learning rate: arms with a trust region, and those without."""
    figure = Figure(figsize=(11, 3.3), layout="constrained")
    panels = figure.subplots(1, len(RATES), sharey=True)
    colors = {
        **dict(zip((arm for arm in CORE if arm not in WITHOUT_REGION), ("C2", "C0", "C9", "C4"), strict=True)),
        **dict(zip(WITHOUT_REGION, ("C3", "C1", "C8"), strict=True)),
    }
    for panel, rate in zip(panels, RATES, strict=True):
        for arm in CORE:
            rows = cells[arm, rate, UPDATES]
            at, points = rows[0]["at_rollout"], zip(*(row["accuracy"] for row in rows), strict=True)
            values, low, high = zip(*map(estimate, points), strict=True)
            dashes = "--" if arm in WITHOUT_REGION else "-"
            panel.plot(at, values, dashes, color=colors[arm], label=arm)
            panel.fill_between(at, low, high, color=colors[arm], alpha=0.12, linewidth=0)
        panel.set_title(f"learning rate {rate:g}")
        panel.set_xlabel("rollout")
        panel.set_ylim(0, 1)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def deltas(cells: Cells) -> Figure:
    """Mean accuracy over δ of drpo and dppo_tv, between those of the surrogate and of ppo."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    panel = figure.subplots()
    for arm, color in (("pg", "C3"), ("ppo", "C0")):
        mean = estimate(areas(cells, arm, DELTA_RATE))
        panel.axhspan(mean.low, mean.high, color=color, alpha=0.1, linewidth=0)
        panel.axhline(mean.value, color=color, linestyle="--", linewidth=1, label=arm)
    for kind, color in (("drpo", "C4"), ("dppo_tv", "C2")):
        means = [estimate(areas(cells, f"{kind}({delta:g})", DELTA_RATE)) for delta in DELTAS]
        values, low, high = zip(*means, strict=True)
        panel.plot(DELTAS, values, "o-", color=color, label=kind)
        panel.fill_between(DELTAS, low, high, color=color, alpha=0.15, linewidth=0)
    panel.set_xscale("log")
    panel.set_xticks(DELTAS, [f"{delta:g}" for delta in DELTAS])
    panel.minorticks_off()
    panel.set_xlabel("δ")
    panel.set_ylabel("mean held-out accuracy over a run")
    panel.set_ylim(0, 1)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="lower left", ncols=2)
    return figure


PICTURES: dict[str, Callable[[Cells], Figure]] = {"lab.png": curves, "lab_delta.png": deltas}


def main() -> None:
    cells = read_cells()
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for name, picture in PICTURES.items():
        picture(cells).savefig(IMAGES / name, dpi=150)
    print(PAGE, *(IMAGES / name for name in PICTURES), sep="\n")


if __name__ == "__main__":
    main()
