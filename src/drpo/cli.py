"""The command line: parses and delegates."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from drpo import __version__, commands
from drpo.choose import Overrides, chosen_objectives
from drpo.doctor.command import doctor
from drpo.errors import UserError
from drpo.inspect.command import inspect

if TYPE_CHECKING:
    from drpo.recipe import Recipe
    from drpo.run import RunFolder

ENGINES = ("trl", "verl")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train language models with DRPO and its relatives, and see what the trust region did.",
)
app.add_typer(commands.data, name="data")
app.command("eval")(commands.evaluate)
app.command("compare")(commands.compare)
app.command("doctor")(doctor)
app.command("inspect")(inspect)


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
    engine: Annotated[str, typer.Option(help="trl, or verl on Ray.")] = "trl",
    verl: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of verl's own trainer. Repeatable.", show_default=False),
    ] = None,
) -> None:
    """Train a model and write a run folder with its report.

    Examples:

      drpo train

      drpo train --set objective=ppo --set seed=1 --output runs/ppo-1

      drpo train recipes/gsm8k.yaml --set task.train=gsm8k_train.jsonl --set objective.delta=0.2

      drpo train --resume --output runs/ppo-1

      drpo train recipes/gsm8k.yaml --engine verl --verl trainer.n_gpus_per_node=8
    """
    from drpo.recipe import load_recipe
    from drpo.run import RunFolder

    _check_engine(engine, resume, verl or [])

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

    try:
        if engine == "verl":
            summary = _train_in_verl(asked, folder, verl or [], overwrite)
        else:
            summary = _train(asked, folder, resume, overwrite)
    except KeyboardInterrupt as error:
        again = "" if engine == "verl" else f"; to go on: drpo train --resume --output {folder}"
        typer.echo(f"interrupted{again}", err=True)
        raise typer.Exit(130) from error
    if summary:
        from drpo.report import write_report

        write_report([folder], folder.report)
        _print_summary(summary, folder.report)


def _train(recipe: Recipe, folder: RunFolder, resume: bool, overwrite: bool) -> dict[str, Any]:
    from drpo.rollout.audit import AuditError
    from drpo.train import train

    try:
        return train(recipe, folder, resume=resume, overwrite=overwrite)
    except AuditError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _train_in_verl(recipe: Recipe, folder: RunFolder, settings: list[str], overwrite: bool) -> dict[str, Any]:
    try:
        from drpo.integrations.verl.launch import VerlError, plan, train
    except ImportError as error:
        raise UserError(f"--engine verl: {error}") from error
    from drpo.doctor.verl import of_config

    planned = plan(recipe, folder, settings)
    for finding in of_config(planned.config):
        if finding.verdict == "stop":
            raise UserError(f"--engine verl: {finding.what}" + (f"; expected {finding.fix}" if finding.fix else ""))
        # The problems are written when the run begins.
        if finding.verdict == "warning" and not finding.what.startswith("data."):
            typer.echo(f"warning: {finding.what}", err=True)
    try:
        return train(planned, overwrite=overwrite)
    except VerlError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _check_engine(engine: str, resume: bool, settings: list[str]) -> None:
    from drpo.names import unknown_name

    if engine not in ENGINES:
        raise UserError(f"--engine: {unknown_name('engine', engine, ENGINES)}")
    if settings and engine != "verl":
        raise UserError(f"--verl {settings[0]}: expected with --engine verl")
    if resume and engine == "verl":
        raise UserError(
            "--resume: a run in verl goes on by verl's own trainer.resume_mode; expected without --engine verl"
        )


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
def objectives(
    name: Annotated[str | None, typer.Argument(help="One objective.", show_default=False)] = None,
    overrides: Overrides = None,
) -> None:
    """List the objectives: what each maximises, its hyperparameters, anchor and source; or all there is to say of one.

    Examples:

      drpo objectives

      drpo objectives drpo --set delta=0.2
    """
    from drpo.catalogue import overview, page

    console = Console(highlight=False)
    if name is None:
        if overrides:
            raise UserError(f"--set {overrides[0]}: expected with the NAME of an objective")
        console.print(overview())
    else:
        console.print(page(name, chosen_objectives([name], overrides or [])[name]))


@app.command()
def weights(
    names: Annotated[list[str], typer.Argument(help="Objectives.", show_default=False)],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="The picture, by its ending: .png, .svg or .pdf.")] = Path("weights.png"),
) -> None:
    """Draw the gradient weight of objectives against the ratio and against |π − μ|, for likely and for rare tokens.

    Examples:

      drpo weights drpo dppo_tv spo ppo --set drpo.delta=0.2

      drpo weights drpo --output drpo.svg
    """
    if output.suffix.lower() not in PICTURES:
        raise UserError(f"--output {output}: expected a name that ends in {', '.join(PICTURES)}")
    chosen = chosen_objectives(names, overrides or [])

    from drpo.report.weights import draw_weights

    figure = draw_weights(chosen)
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--output {output}: cannot be written ({getattr(error, 'strerror', None) or error})"
        ) from error
    typer.echo(str(output))


PICTURES = (".png", ".svg", ".pdf")


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    # TRL reports each trainer it builds; a run of this library talks to nobody but the model hub.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # torchao, which Transformers imports where it is installed, tells of every extension that is for other hardware.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        # Greek letters do not fit every encoding; a question mark is better than no answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except UserError as error:
        for line in error.lines:
            typer.echo(f"error: {line}", err=True)
        sys.exit(2)
