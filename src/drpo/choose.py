"""Objectives as a command line names them, with hyperparameters from ``--set``."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

from drpo.errors import UserError

if TYPE_CHECKING:
    from drpo.objectives import Objective

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="[NAME.]FIELD=VALUE",
        help="Change a hyperparameter, of one objective or of all that have it. Repeatable.",
        show_default=False,
    ),
]


def chosen_objectives(names: list[str], overrides: list[str]) -> dict[str, Objective]:
    """Objectives by name, with hyperparameters from ``[NAME.]FIELD=VALUE``."""
    from drpo.names import unknown_name
    from drpo.objectives import OBJECTIVES, make_objective

    for name in names:
        if name not in OBJECTIVES:
            raise UserError(unknown_name("objective", name, OBJECTIVES))
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
