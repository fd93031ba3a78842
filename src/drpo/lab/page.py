"""The page of a lab's results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from drpo.errors import UserError
from drpo.lab import figures
from drpo.lab.grid import ARMS, SETTINGS, Run
from drpo.lab.runner import Lab, run_of
from drpo.lab.statistics import Estimate, area_under, estimate, has_collapsed, probability_of_improvement
from drpo.report.html import document, section, table, write_page

Row = dict[str, Any]

BASELINE = "ppo"
"""The arm that others are compared with: GRPO's objective."""


def write_lab_page(lab: Lab, target: Path) -> None:
    """Read the results of a lab and write their page.

    Raises:
        UserError: there are none.
    """
    rows = [row for row in lab.rows() if row["status"] == "finished"]
    if not rows:
        raise UserError(f"{lab.path}: has no results; expected a folder that drpo lab run has written")
    by_setting: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_setting[row["setting"]].append(row)
    body = "".join(_setting(name, by_setting[name]) for name in SETTINGS if name in by_setting)
    failed = len(lab.rows()) - len(rows)
    note = f"<p>{len(rows)} runs, {failed} failed. Intervals are over seeds, at 95 %.</p>"
    # A map of stability is a heatmap, which the script of other pages cannot draw.
    write_page(document("The paper in miniature", "lab", note + body, get_plotlyjs()), target)


def _setting(name: str, rows: Sequence[Row]) -> str:
    """The sections of a setting: the map, and of each number of updates and lag how the arms compare."""
    cells = cells_of(rows)
    parts = [f"<h2>{name}: {SETTINGS[name].description}</h2>"]
    if stable := _map(cells):
        parts.append(
            section(
                f"{name}: where each arm is stable",
                "Final accuracy; below it the share of seeds that collapsed: that ended below half of their best.",
                figures.stability_map(stable),
            )
        )
    for condition in sorted({(run.updates, run.lag, run.rollouts) for run in cells}):
        matching = {run: seeds for run, seeds in cells.items() if (run.updates, run.lag, run.rollouts) == condition}
        parts.append(_condition(name, matching))
    return "".join(parts)


def _condition(setting: str, cells: dict[Run, list[Row]]) -> str:
    """How arms compare that differ in their learning rates alone."""
    first = next(iter(cells))
    title = f"{setting}, {first.updates} updates a rollout" + (f", lag {first.lag}" if first.lag else "")
    by_arm = {
        arm: {run.learning_rate: seeds for run, seeds in cells.items() if run.arm == arm}
        for arm in ARMS
        if any(run.arm == arm for run in cells)
    }
    areas = {
        arm: {rate: [area_under(row["accuracy"]) for row in seeds] for rate, seeds in by_rate.items()}
        for arm, by_rate in by_arm.items()
    }
    chosen = {arm: _at_chosen_rate(by_rate) for arm, by_rate in by_arm.items()}
    areas_at_chosen = {arm: [area_under(row["accuracy"]) for row in seeds] for arm, (_, seeds) in chosen.items()}
    table_rows = []
    for arm, by_rate in by_arm.items():
        rate, seeds = chosen[arm]
        accuracies = [row["accuracy"] for seeds in by_rate.values() for row in seeds]
        final = [row["accuracy"][-1] for row in seeds]
        better = (
            probability_of_improvement(areas_at_chosen[BASELINE], areas_at_chosen[arm]) if BASELINE in areas else ""
        )
        rates = ", ".join(f"{rate:g} ({len(seeds)})" for rate, seeds in sorted(by_rate.items()))
        collapsed = f"{sum(map(has_collapsed, accuracies))}/{len(accuracies)}"
        area = str(estimate(areas_at_chosen[arm]))
        table_rows.append([arm, f"{rate:g}", area, str(estimate(final)), str(better), collapsed, rates])
    columns = [
        "arm",
        "rate chosen",
        "area under accuracy",
        "final accuracy",
        f"P(better than {BASELINE})",
        "collapsed",
        "rates (seeds)",
    ]
    parts = [f"<h2>{title}: each arm at the learning rate that its first seed chose</h2>", table(columns, table_rows)]
    if len(by_arm) > 1:
        parts += [
            section(
                f"{title}: area under accuracy at learning rate {rate:g}",
                "Interquartile mean over seeds.",
                figures.intervals(
                    {arm: estimate(rates[rate]) for arm, rates in areas.items() if rate in rates}, "area under accuracy"
                ),
            )
            + section(
                f"{title}: accuracy at learning rate {rate:g}",
                "Interquartile mean over seeds.",
                figures.curves(*_curves({arm: by_rate[rate] for arm, by_rate in by_arm.items() if rate in by_rate})),
            )
            for rate in sorted({run.learning_rate for run in cells})
        ]
    return "".join(parts)


def _at_chosen_rate(by_rate: dict[float, list[Row]]) -> tuple[float, list[Row]]:
    """The learning rate at which an arm's first seed did best, and its other seeds there, which had no part in the choice; the first alone if there are no others."""
    first = min(row["seed"] for seeds in by_rate.values() for row in seeds)
    tried = {
        rate: area_under(row["accuracy"]) for rate, seeds in by_rate.items() for row in seeds if row["seed"] == first
    }
    rate = max(tried, key=tried.__getitem__)
    return rate, [row for row in by_rate[rate] if row["seed"] != first] or by_rate[rate]


def cells_of(rows: Sequence[Row]) -> dict[Run, list[Row]]:
    """The rows of each cell of the grid, which are its seeds; a cell goes by its run of seed 0."""
    cells: dict[Run, list[Row]] = defaultdict(list)
    for row in rows:
        cells[run_of({**row, "seed": 0})].append(row)
    return cells


def _curves(arms: dict[str, list[Row]]) -> tuple[list[int], dict[str, list[Estimate]]]:
    """The rollouts of the evaluations, and of each arm an estimate of the accuracy at each."""
    at_rollout = next(iter(arms.values()))[0]["at_rollout"]
    return at_rollout, {
        arm: [estimate(values) for values in zip(*(row["accuracy"] for row in seeds), strict=True)]
        for arm, seeds in arms.items()
    }


def _map(cells: dict[Run, list[Row]]) -> dict[str, dict[tuple[float, int], tuple[float, float]]]:
    """By arm, the cells of a map; empty where there is one learning rate or one number of updates."""
    maps: dict[str, dict[tuple[float, int], tuple[float, float]]] = defaultdict(dict)
    for run, seeds in cells.items():
        if run.lag == 0:
            final = estimate([row["accuracy"][-1] for row in seeds]).value
            collapsed = sum(has_collapsed(row["accuracy"]) for row in seeds) / len(seeds)
            maps[run.arm][run.learning_rate, run.updates] = (final, collapsed)
    return {
        arm: maps[arm]
        for arm in ARMS
        if arm in maps and all(len(set(axis)) > 1 for axis in zip(*maps[arm], strict=True))
    }
