"""The command line: parses and delegates."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from drpo import __version__
from drpo.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train language models with DRPO and its relatives, and see what the trust region did.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"drpo {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe in YAML; the built-in one by default.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a field of the recipe; dots reach inside. Repeatable.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The run folder; runs/NAME by default.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder, from its last checkpoint.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
) -> None:
    """Train a model and write a run folder with its report.

    Examples:

      drpo train

      drpo train --set objective=ppo --set seed=1 --output runs/ppo-1

      drpo train recipes/gsm8k.yaml --set task.train=gsm8k_train.jsonl --set objective.delta=0.2

      drpo train --resume --output runs/ppo-1
    """
    from drpo.recipe import load_recipe
    from drpo.run import RunFolder

    folder = RunFolder(output or Path("runs") / (recipe.stem if recipe else "arithmetic"))
    if resume and overwrite:
        raise UserError("--resume and --overwrite: expected one of them")
    if resume:
        asked = folder.check_resumable()
        # Without a recipe file, --set speaks of the run's own.
        if (given := load_recipe(recipe or folder.recipe, overrides or [])) != asked:
            field = next(name for name in type(asked).model_fields if getattr(given, name) != getattr(asked, name))
            raise UserError(
                f"--resume: {field} is {getattr(given, field)!r}, but the run in {folder} has {getattr(asked, field)!r}"
            )
    else:
        asked = load_recipe(recipe, overrides or [])
        # The first process creates the folder, perhaps before another one looks.
        if os.environ.get("RANK", "0") == "0":
            folder.check_free(overwrite)

    from drpo.rollout.audit import AuditError
    from drpo.train import train as run

    try:
        summary = run(asked, folder, resume=resume, overwrite=overwrite)
    except AuditError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo(f"interrupted; to go on: drpo train --resume --output {folder}", err=True)
        raise typer.Exit(130) from error
    if summary:
        from drpo.report import write_report

        write_report([folder], folder.report)
        _print_summary(summary, folder.report)


def _print_summary(summary: dict[str, Any], report: Path) -> None:
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    accuracy = f"held-out accuracy {before:.3f} -> {after:.3f}, " if before is not None else ""
    typer.echo(f"{accuracy}{summary['rollouts']} rollouts, {summary['train_seconds']:.0f} s, {report}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the page goes; by default RUN/report.html, or report.html for several runs.", show_default=False
        ),
    ] = None,
) -> None:
    """Draw one or several runs in one self-contained HTML page.

    Examples:

      drpo report runs/demo

      drpo report runs/drpo runs/ppo --output comparison.html
    """
    from drpo.report import write_report
    from drpo.run import RunFolder

    folders = [RunFolder(path) for path in runs]
    target = output or (folders[0].report if len(folders) == 1 else Path("report.html"))
    write_report(folders, target)
    typer.echo(str(target))


@app.command()
def objectives() -> None:
    """List the objectives: what each maximises per token, its hyperparameters and their defaults, its source.

    Example:

      drpo objectives
    """
    from drpo.objectives import OBJECTIVES

    table = Table.grid(padding=(0, 2))
    for name, objective in OBJECTIVES.items():
        hyperparameters = ", ".join(f"{field.name}={field.default}" for field in fields(objective))
        table.add_row(Text(name, style="bold"), "maximises", objective.formula)
        table.add_row("", "weight w", objective.weight)
        table.add_row("", "fields", hyperparameters or "none")
        table.add_row("", "source", objective.source)
        table.add_row()
    Console(highlight=False).print(
        "Per token, with r = π/μ and advantage A; the gradient is ∂loss/∂log π = −A·r·w.\n", table
    )


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    # TRL reports each trainer it builds; a run of this library talks to nobody but the model hub.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
