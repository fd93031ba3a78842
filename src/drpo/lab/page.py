"""The page of a lab's results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drpo.errors import UserError
from drpo.lab import figures
from drpo.lab.grid import ARMS, SETTINGS, Run
from drpo.lab.runner import Lab, run_of
from drpo.lab.statistics import Estimate, area_under, estimate, has_collapsed
from drpo.report.html import document, section, table, write_page

Row = dict[str, Any]


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
    write_page(document("The paper in miniature", "lab", note + body), target)


def _setting(name: str, rows: Sequence[Row]) -> str:
    """The sections of a setting: what each arm reached at its best rate, the map, the curves at each rate."""
    cells = cells_of(rows)
    parts = [f"<h2>{name}: {SETTINGS[name].description}</h2>", _best_rates(cells)]
    if stable := _map(cells):
        parts.append(
            section(
                f"{name}: where each arm is stable",
                "Final accuracy; below it the share of seeds that collapsed: that ended below half of their best.",
                figures.stability_map(stable),
            )
        )
    conditions = dict.fromkeys((run.learning_rate, run.updates, run.lag, run.rollouts) for run in cells)
    for rate, updates, lag, rollouts in sorted(conditions):
        arms = {
            run.arm: seeds
            for run, seeds in cells.items()
            if (run.learning_rate, run.updates, run.lag, run.rollouts) == (rate, updates, lag, rollouts)
        }
        if len(arms) > 1:
            at_rollout = next(iter(arms.values()))[0]["at_rollout"]
            lines = {arm: _curve(arms[arm]) for arm in ARMS if arm in arms}
            title = f"{name}: learning rate {rate:g}, {updates} updates a rollout" + (f", lag {lag}" if lag else "")
            seeds = sorted({len(rows) for rows in arms.values()})
            note = f"{'-'.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds an arm."
            parts.append(section(title, note, figures.curves(at_rollout, lines)))
    return "".join(parts)


def cells_of(rows: Sequence[Row]) -> dict[Run, list[Row]]:
    """The rows of each cell of the grid, which are its seeds; a cell goes by its run of seed 0."""
    cells: dict[Run, list[Row]] = defaultdict(list)
    for row in rows:
        cells[run_of({**row, "seed": 0})].append(row)
    return cells


def _curve(seeds: Sequence[Row]) -> list[Estimate]:
    return [estimate(values) for values in zip(*(row["accuracy"] for row in seeds), strict=True)]


def _best_rates(cells: dict[Run, list[Row]]) -> str:
    """A row an arm and number of updates: the learning rate with the largest area under accuracy, and what was tried."""
    tried: dict[tuple[str, int, int], dict[float, list[Row]]] = defaultdict(dict)
    for run, seeds in cells.items():
        tried[run.arm, run.updates, run.lag][run.learning_rate] = seeds
    rows = []
    for (arm, updates, lag), by_rate in tried.items():
        areas = {rate: estimate([area_under(row["accuracy"]) for row in seeds]) for rate, seeds in by_rate.items()}
        best = max(areas, key=lambda rate: areas[rate].value)
        final = estimate([row["accuracy"][-1] for row in by_rate[best]])
        collapsed = [has_collapsed(row["accuracy"]) for seeds in by_rate.values() for row in seeds]
        rates = ", ".join(f"{rate:g} ({len(seeds)})" for rate, seeds in sorted(by_rate.items()))
        rows.append(
            [arm, updates, lag, f"{best:g}", str(areas[best]), str(final), f"{sum(collapsed)}/{len(collapsed)}", rates]
        )
    columns = [
        "arm",
        "updates",
        "lag",
        "best rate",
        "area under accuracy",
        "final accuracy",
        "collapsed, all rates",
        "rates (seeds)",
    ]
    return table(columns, rows)


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
