"""The command ``drpo train``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drpo.cli.options import RecipeArgument
from drpo.errors import TrainingInterruptedError, TrainingStoppedError, UserError

if TYPE_CHECKING:
    from drpo.report.read import RunData
    from drpo.run.folder import RunFolder
    from drpo.run.recipe import Recipe


ENGINES = ("trl", "verl", "verl-cpu")


def train(
    recipe: RecipeArgument = None,
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
    engine: Annotated[
        str, typer.Option(help="trl, verl on Ray, or verl-cpu to try that on a CPU; of a run that is resumed, its own.")
    ] = "trl",
    verl: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of verl's own trainer. Repeatable.", show_default=False),
    ] = None,
) -> None:
    """Train a model and write a run folder with its report.

    Examples:

      drpo train

      drpo train --set objective=ppo --set seed=1 --output runs/ppo-1

      drpo train gsm8k --set task.train=gsm8k_train.jsonl --set objective.delta=0.2

      drpo train --resume --output runs/ppo-1

      drpo train gsm8k --engine verl --verl trainer.n_gpus_per_node=8
    """
    from drpo.run.folder import RunFolder, decisive_fields
    from drpo.run.recipe import load_recipe

    folder = RunFolder(output or Path("runs") / (recipe.stem if recipe else "arithmetic"))
    if resume and folder.verl_settings is not None:
        engine = "verl"
    _check_engine(engine, verl or [])
    if engine == "verl-cpu":
        from drpo.integrations.verl.cpu.settings import overrides as on_cpu

        engine, verl = "verl", [*on_cpu(), *(verl or [])]
    if resume and overwrite:
        raise UserError("--resume and --overwrite: expected one of them")
    if resume:
        begun = folder.check_resumable()
        # Without a recipe file, --set speaks of the run's own.
        chosen = load_recipe(recipe or folder.recipe, overrides or [])
        if chosen.train_precision == "auto":
            chosen = chosen.model_copy(update={"train_precision": begun.train_precision})
        now, then = decisive_fields(chosen), decisive_fields(begun)
        if field := next((name for name in then if now[name] != then[name]), None):
            raise UserError(
                f"--resume: {field} is {getattr(chosen, field)!r}, but the run in {folder} has {getattr(begun, field)!r}"
            )
    else:
        chosen = load_recipe(recipe, overrides or [])
        # The first process creates the folder, perhaps before another one looks.
        if os.environ.get("RANK", "0") == "0":
            folder.check_free(overwrite)

    try:
        if engine == "verl":
            summary = _train_in_verl(chosen, folder, verl or [], resume, overwrite)
        else:
            summary = _train(chosen, folder, resume, overwrite)
    except (KeyboardInterrupt, TrainingInterruptedError) as error:
        if folder.is_run:
            typer.echo(f"interrupted; to go on: drpo train --resume --output {folder}", err=True)
        else:
            typer.echo("interrupted before the first update; nothing was kept", err=True)
        if isinstance(error, TrainingInterruptedError):
            raise
        raise typer.Exit(130) from error
    if summary:
        from drpo.report import write_report
        from drpo.report.read import read_run

        write_report([folder], folder.report)
        typer.echo(f"{summary['rollouts']} rollouts, {summary['train_seconds']:.0f} s, {folder.report}")
        for line in describe_run(read_run(folder)):
            typer.echo(line)


def _train(recipe: Recipe, folder: RunFolder, resume: bool, overwrite: bool) -> dict[str, Any]:
    from drpo.run.train import train

    try:
        return train(recipe, folder, resume=resume, overwrite=overwrite)
    except TrainingStoppedError as error:
        if os.environ.get("DRPO_DEBUG") == "1":
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _train_in_verl(
    recipe: Recipe, folder: RunFolder, settings: list[str], resume: bool, overwrite: bool
) -> dict[str, Any]:
    try:
        from drpo.integrations.verl.train import VerlError, plan, train
    except ImportError as error:
        raise UserError(f"--engine verl: {error}") from error
    from drpo.doctor.verl import examine_config

    if resume and folder.verl_settings is None:
        raise UserError(f"--resume: the run in {folder} is TRL's; expected without --engine verl")
    planned = plan(recipe, folder, settings, resume=resume)
    for finding in examine_config(planned.config):
        if finding.verdict == "stop":
            raise UserError(f"--engine verl: {finding.what}" + (f"; expected {finding.fix}" if finding.fix else ""))
        if finding.verdict == "warning":
            typer.echo(f"warning: {finding.what}", err=True)
    try:
        return train(planned, overwrite=overwrite)
    except VerlError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _check_engine(engine: str, settings: list[str]) -> None:
    from drpo.registry import unknown_name

    if engine not in ENGINES:
        raise UserError(f"--engine: {unknown_name('engine', engine, ENGINES)}")
    if settings and engine == "trl":
        raise UserError(f"--verl {settings[0]}: expected with --engine verl")


def describe_run(run: RunData) -> Iterator[str]:
    """Lines that say whether a run got better, and what its trust region did."""
    from drpo.report.page import show_interval

    summary = run.summary
    if evaluations := run.evaluations:
        accuracies = " -> ".join(show_interval(evaluations[place]["accuracy"]) for place in (0, -1))
        yield f"held-out accuracy {accuracies}, 95 % intervals over {evaluations[-1]['problems']} problems"
    last = run.metrics[-1]
    if "divergence/mean" in last and "regulariser/strength" in last:
        yield (
            f"|π - μ| of the last update: mean {last['divergence/mean']:.2g}, 99 % quantile {last['divergence/p99']:.2g}; "
            f"{summary['objective']} changed {last['regulariser/strength']:.0%} of the plain gradient"
        )
    if summary["untrained"]:
        yield summary["untrained"]
