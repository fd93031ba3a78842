"""The commands ``drpo lab``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

lab = typer.Typer(no_args_is_help=True, help="The paper in miniature: a grid of runs, its results and their page.")

Folder = Annotated[Path, typer.Option("--output", help="The folder of results.")]
Preset = Annotated[str, typer.Option(help="Which runs; drpo lab presets lists them.")]


@lab.command()
def run(
    preset: Preset = "smoke",
    output: Folder = Path("lab"),
    setting: Annotated[
        list[str] | None, typer.Option(help="Only the runs of this setting; may be repeated.", show_default=False)
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time, a thread each; all cores by default.", min=1, show_default=False)
    ] = None,
) -> None:
    """Make the runs of a preset that are missing, and the page of all results.

    Each is a run of DRPOTrainer. To go on after an interruption: the same command; what was not finished is run again.

    Examples:

      drpo lab run --preset smoke

      drpo lab run --preset settings --setting bf16 --output lab --jobs 2
    """
    from drpo.lab.grid import only, plan_of
    from drpo.lab.page import write_lab_page
    from drpo.lab.runner import Lab

    folder = Lab(output)
    plan = plan_of(preset) if setting is None else only(setting, plan_of(preset))
    try:
        folder.run(plan, jobs or os.cpu_count() or 1)
    except KeyboardInterrupt as error:
        typer.echo("interrupted; to go on: the same command", err=True)
        raise typer.Exit(130) from error
    write_lab_page(folder, output / "lab.html")
    typer.echo(str(output / "lab.html"))


@lab.command()
def report(output: Folder = Path("lab")) -> None:
    """Write the page of the results that there are."""
    from drpo.lab.page import write_lab_page
    from drpo.lab.runner import Lab

    write_lab_page(Lab(output), output / "lab.html")
    typer.echo(str(output / "lab.html"))


@lab.command()
def exact(
    seeds: Annotated[int, typer.Option(help="Vocabularies that are drawn.", min=1)] = 20,
    output: Annotated[Path | None, typer.Option(help="A file for the table, in CSV.", show_default=False)] = None,
) -> None:
    """Bias and deviation of each objective's gradient over a long-tailed vocabulary, summed exactly; takes half a minute.

    Both are over the norm of the policy gradient. Shares are of the estimate's second moment, by the probability μ of
    the token.
    """
    import csv

    from rich.console import Console
    from rich.table import Table

    from drpo.files import replacing
    from drpo.lab.exact import MU_EDGES, study

    buckets = [f"μ≤{edge:g}" for edge in (*MU_EDGES, 1.0)]
    columns = ["mismatch", "arm", "bias", "deviation", "cosine", *buckets]
    results = [
        (mismatch, arm.name, [*result[:3], *result.second_moment_share]) for mismatch, arm, result in study(seeds=seeds)
    ]
    table = Table(*columns, box=None)
    for mismatch, arm, values in results:
        table.add_row(mismatch, arm, *(f"{value:.3f}" for value in values))
    Console().print(table)
    if output is not None:
        with replacing(output, "--output") as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(
                [mismatch, arm, *(f"{value:.5f}" for value in values)] for mismatch, arm, values in results
            )


@lab.command()
def presets(output: Folder = Path("lab")) -> None:
    """List the presets: how many runs each has, and how many of them are missing.

    The preset settings, and with it paper, has more of them once the learning rate of an arm is chosen.
    """
    from rich.console import Console
    from rich.table import Table

    from drpo.lab.grid import PRESETS
    from drpo.lab.runner import Lab

    folder = Lab(output)
    table = Table("preset", "runs", "missing", "settings", "arms")
    areas = folder.areas()
    for name, plan in PRESETS.items():
        runs = plan(areas)
        settings, arms = {run.setting for run in runs}, {run.arm for run in runs}
        table.add_row(name, str(len(runs)), str(len(folder.missing(runs))), ", ".join(sorted(settings)), str(len(arms)))
    Console().print(table)
