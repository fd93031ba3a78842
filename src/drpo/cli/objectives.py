"""The commands ``drpo objectives`` and ``drpo weights``, which take hyperparameters from ``--set``."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from drpo.cli.options import Overrides
from drpo.errors import UserError

if TYPE_CHECKING:
    from drpo.objectives import Objective


def chosen_objectives(names: list[str], overrides: list[str]) -> dict[str, Objective]:
    """Objectives by name, with hyperparameters from ``[NAME.]FIELD=VALUE``."""
    from drpo.objectives import ELSEWHERE, OBJECTIVES, make_objective
    from drpo.registry import unknown_name

    for name in names:
        if name not in OBJECTIVES:
            raise UserError(unknown_name("objective", name, OBJECTIVES, ELSEWHERE))
    known = {name: [field.name for field in fields(OBJECTIVES[name])] for name in names}
    chosen: dict[str, dict[str, int | float]] = {name: {} for name in names}
    for override in overrides:
        target, _, text = override.partition("=")
        of, dot, field = target.rpartition(".")
        if not re.fullmatch(r"-?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?|nan|inf", text):
            raise UserError(f"--set {override}: expected [NAME.]FIELD=NUMBER")
        value = int(text) if text.lstrip("-").isdecimal() else float(text)
        if dot and of not in names:
            raise UserError(f"--set {override}: {unknown_name('objective', of, names)}")
        concerned = [of] if of else [name for name in names if field in known[name]]
        if not concerned or field not in known[concerned[0]]:
            choices = dict.fromkeys(known_field for name in ([of] if of else names) for known_field in known[name])
            raise UserError(f"--set {override}: {unknown_name('hyperparameter', field, choices)}")
        for name in concerned:
            chosen[name][field] = value
    made = {}
    for name, hyperparameters in chosen.items():
        try:
            made[name] = make_objective(name, **hyperparameters)
        except ValueError as error:
            raise UserError(f"--set {name}.{error}") from error
    return made


def objectives(
    name: Annotated[str | None, typer.Argument(help="One objective or correction.", show_default=False)] = None,
    overrides: Overrides = None,
) -> None:
    """List the objectives: what each maximises, its hyperparameters, anchor and source; or all there is to say of one.

    Examples:

      drpo objectives

      drpo objectives drpo --set delta=0.2
    """
    from drpo.cli.catalogue import correction_page, overview, page
    from drpo.objectives import CORRECTIONS

    console = Console(highlight=False)
    if name is None:
        if overrides:
            raise UserError(f"--set {overrides[0]}: expected with the NAME of an objective")
        console.print(overview())
    elif name in CORRECTIONS and not overrides:
        console.print(correction_page(name, CORRECTIONS[name]))
    else:
        console.print(page(name, chosen_objectives([name], overrides or [])[name]))


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
    for name, objective in chosen.items():
        if objective.over_updates:
            raise UserError(
                f"{name} weighs a token by all tokens of its update, and has no weight of single tokens to draw"
            )

    from drpo.files import replacing
    from drpo.report.weights import draw_weights

    figure = draw_weights(chosen)
    with replacing(output, "--output") as partial:
        figure.savefig(partial, dpi=150)
    typer.echo(str(output))


PICTURES = (".png", ".svg", ".pdf")
