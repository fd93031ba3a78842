"""The command ``drpo doctor``: parses and delegates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from drpo.doctor.findings import Finding, show
from drpo.doctor.quiet import nothing_more_on_stdout, nothing_on_stdout
from drpo.errors import UserError


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe in YAML; the built-in one by default.", show_default=False)
    ] = None,
    verl: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG.yaml", help="A configuration of verl's trainer.", show_default=False),
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

      drpo doctor recipes/gsm8k.yaml --set task.train=gsm8k_train.jsonl --json

      drpo doctor --verl recipes/verl/qwen3-4b-base.yaml

      drpo doctor --verl recipes/verl/qwen3-4b-base.yaml --set objective=spo --no-workers --json
    """
    if recipe is not None and verl is not None:
        raise UserError(f"{recipe} and --verl {verl}: expected one of them")
    # The libraries that are imported here may speak too.
    with nothing_on_stdout():
        findings = (
            _of_verl(verl, overrides or [], workers) if verl else _of_recipe(recipe, overrides or [], rollout, as_json)
        )
    code = show(findings, as_json)
    nothing_more_on_stdout()
    raise typer.Exit(code)


def _of_recipe(recipe: Path | None, overrides: list[str], rollout: bool, as_json: bool) -> list[Finding]:
    with Console(stderr=True, quiet=as_json).status("loading") as status:
        from drpo.doctor.examine import examine

        return examine(recipe, overrides, rollout=rollout, begin=status.update)


def _of_verl(config: Path, overrides: list[str], workers: bool) -> list[Finding]:
    from drpo.doctor.verl import examine

    return examine(config, overrides, workers=workers)
