"""The command ``drpo inspect``: parses and delegates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from drpo.cli.objectives import Overrides, chosen_objectives
from drpo.errors import UserError


def inspect(
    rollouts: Annotated[
        Path,
        typer.Argument(metavar="ROLLOUTS", help="A .jsonl or .parquet file, one sequence a row.", show_default=False),
    ],
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="FIELD=NAME",
            help="What a column is, where its name does not say: logp, behavior_logp, advantage, ... Repeatable.",
            show_default=False,
        ),
    ] = None,
    share: Annotated[float, typer.Option(help="The share of tokens for which δ is wanted.", min=1e-9, max=1.0)] = 0.01,
    advantage: Annotated[
        str,
        typer.Option(
            help="How rewards become advantages where there are none: mean, mean-std, leave-one-out, max-rl or length-weighted."
        ),
    ] = "mean",
    objective: Annotated[
        str, typer.Option(help="The objective whose region is looked at by token text, position, sign of A and μ.")
    ] = "drpo",
    choose_delta: Annotated[
        bool, typer.Option("--choose-delta", help="Print what that objective would hit at each of several δ.")
    ] = False,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the page goes; by default ROLLOUTS with .html.", show_default=False)
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Where the numbers go, as a .json file.", show_default=False)
    ] = None,
) -> None:
    """Measure rollouts of any framework: |π − μ|, and what every objective would have made of them.

    Each row has the log-probs of both policies, lists with one number a token, and an advantage or a reward. The names
    of this library, of verl and of TRL are recognised.

    Examples:

      drpo inspect runs/demo/rollouts.jsonl

      drpo inspect runs/demo/rollouts.jsonl --choose-delta --objective ipo

      drpo inspect dump.parquet --column logp=pi --column behavior_logp=mu --share 0.001 --json dump.json
    """
    from drpo.advantage import Advantage
    from drpo.inspect.analyze import analyse, why_not_computed
    from drpo.inspect.region import DELTA_COLUMNS, delta_field, delta_rows
    from drpo.objectives import ELSEWHERE, OBJECTIVES
    from drpo.registry import unknown_name

    if advantage not in get_args(Advantage):
        raise UserError(f"--advantage: {unknown_name('advantage', advantage, get_args(Advantage))}")
    objectives = chosen_objectives(list(OBJECTIVES), overrides or [])
    if objective not in objectives:
        raise UserError(f"--objective: {unknown_name('objective', objective, objectives, ELSEWHERE)}")
    if choose_delta and delta_field(objectives[objective]) is None:
        others = ", ".join(name for name, o in objectives.items() if delta_field(o) and not why_not_computed(o, True))
        raise UserError(f"--choose-delta: {objective} has no delta; expected --objective with one of {others}")
    page = output or rollouts.with_suffix(".html")
    for option, path, ending in (("--output", page, ".html"), ("--json", json, ".json")):
        if path is None:
            continue
        if path.suffix != ending:
            raise UserError(f"{option} {path}: expected a name that ends in {ending}")
        if reason := _why_not_writable(path):
            raise UserError(f"{option} {path}: cannot be written ({reason})")
    chosen = {}
    for column in columns or []:
        field, separator, name = column.partition("=")
        if not separator or not name:
            raise UserError(f"--column {column}: expected FIELD=NAME")
        if field in chosen:
            raise UserError(f"--column {column}: {field} is {chosen[field]} already; expected one column for a field")
        chosen[field] = name

    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from drpo.files import replacing, write_json
    from drpo.inspect.page import render
    from drpo.inspect.read import read_rollouts
    from drpo.report.html import write_page

    tokens = read_rollouts(rollouts, chosen, cast(Advantage, advantage))
    found = analyse(rollouts.name, tokens, objectives, share, objective)
    write_page(render(found), page)
    if json is not None:
        with replacing(json, "--json") as partial:
            write_json(partial, found.to_json())
    delta = found.delta[share]
    reached = "no δ is reached by" if delta is None else f"δ = {delta:.3g} is reached by"
    typer.echo(
        f"{found.tokens:,} tokens of {found.sequences:,} sequences ({found.format}'s columns): |π − μ| mean "
        f"{found.measured['divergence/mean']:.3g}, p99 {found.measured['divergence/p99']:.3g}, "
        f"max {found.measured['divergence/max']:.3g}; {reached} {100 * share:g} % of tokens"
    )
    if choose_delta:
        *numbers, of_positive, of_negative = DELTA_COLUMNS
        table = Table(
            *numbers,
            Column(of_positive, overflow="fold"),
            Column(of_negative, overflow="fold"),
            box=None,
            title=f"What {objective} hits, by δ: shares of the tokens with A ≠ 0; outside is {found.region.outside}",
        )
        for row in delta_rows(found.region):
            table.add_row(*(f"{value:.3g}" if isinstance(value, float) else Text(str(value)) for value in row))
        Console().print(table)
    for remark in found.remarks:
        typer.echo(remark, err=True)
    typer.echo(str(page))


def _why_not_writable(path: Path) -> str | None:
    """Known before either file is written, so that both are or none is."""
    try:
        if not path.parent.is_dir():
            return f"there is no folder {path.parent}"
        if path.is_dir():
            return "it is a folder"
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            return "permission denied"
    except (OSError, ValueError) as error:  # a name that the system does not take
        return getattr(error, "strerror", None) or str(error)
    return None
