"""The command line: parses and delegates."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from drpo import __version__
from drpo.cli.data import data
from drpo.cli.doctor import doctor
from drpo.cli.evaluate import compare, evaluate
from drpo.cli.inspect import inspect
from drpo.cli.lab import lab
from drpo.cli.objectives import objectives, weights
from drpo.cli.recipes import recipes
from drpo.cli.train import train
from drpo.errors import UserError
from drpo.redact import redact

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train language models with DRPO and its relatives, and see what the trust region did.",
)
app.command()(train)
app.command()(recipes)
app.add_typer(data, name="data")
app.command("eval")(evaluate)
app.command()(compare)
app.command()(objectives)
app.command()(weights)
app.command()(doctor)
app.command()(inspect)
app.add_typer(lab, name="lab")


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
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or logs of verl's logger file.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the page goes; by default RUN/report.html, beside a log, or report.html for several runs.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw one or several runs in one self-contained HTML page.

    Examples:

      drpo report runs/demo

      drpo report runs/drpo runs/ppo --output comparison.html

      drpo report my_project/my_experiment.jsonl   # of a run by python -m verl.trainer.main_ppo
    """
    from drpo.report.html import write_page
    from drpo.report.page import render
    from drpo.report.read import read_run
    from drpo.report.verl_log import read_verl_log
    from drpo.run.folder import RunFolder

    page = render([read_verl_log(path) if os.path.isfile(path) else read_run(RunFolder(path)) for path in runs])
    first = runs[0]
    beside = first.with_suffix(".html") if os.path.isfile(first) else RunFolder(first).report
    target = output or (beside if len(runs) == 1 else Path("report.html"))
    write_page(page, target)
    typer.echo(str(target))


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2, or a traceback with DRPO_DEBUG=1."""
    # torchao, which Transformers imports where it is installed, tells of every extension that is for other hardware.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        # Greek letters do not fit every encoding; a question mark is better than no answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, UserError) or os.environ.get("DRPO_DEBUG") == "1":
            # The message of a library's error may quote a request with its token.
            typer.echo(redact(traceback.format_exc()), err=True)
            sys.exit(1)
        for line in error.lines:
            typer.echo(f"error: {line}", err=True)
        sys.exit(2)
