"""The command ``drpo doctor``: parses and delegates."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console

from drpo.cli.options import RecipeArgument
from drpo.doctor.findings import show
from drpo.errors import UserError


def doctor(
    recipe: RecipeArgument = None,
    verl: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.yaml",
            help="A configuration of verl's trainer, or the name of one of drpo recipes.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a field of the recipe, or of verl's configuration as on verl's command line. Repeatable.",
            show_default=False,
        ),
    ] = None,
    rollout: Annotated[bool, typer.Option(help="Load the weights, make a small rollout and audit it.")] = True,
    workers: Annotated[bool, typer.Option(help="With --verl: start Ray and look for the loss in a worker.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say whether a run would compute what its configuration seems to ask for; exit code 1 if not.

    Examples:

      drpo doctor

      drpo doctor gsm8k --set task.train=gsm8k_train.jsonl --json

      drpo doctor --verl qwen3-4b-base

      drpo doctor --verl qwen3-4b-base --set objective=spo --no-workers --json
    """
    if recipe is not None and verl is not None:
        raise UserError(f"{recipe} and --verl {verl}: expected one of them")
    with _take_stdout() as stdout, Console(stderr=True, quiet=as_json).status("looking"):
        if verl is not None:
            from drpo.doctor.verl import examine_file

            findings = examine_file(verl, overrides or [], workers=workers)
        else:
            from drpo.doctor.examine import examine_recipe

            findings = examine_recipe(recipe, overrides or [], rollout=rollout)
        code = show(findings, stdout, as_json)
    raise typer.Exit(code)


def _take_stdout() -> TextIO:
    """Standard output for the findings alone. What anything else prints there until the process ends (rewards, C
    libraries, subprocesses) is on standard error."""
    sys.stdout.flush()
    stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace")
    os.dup2(2, 1)
    return stdout
