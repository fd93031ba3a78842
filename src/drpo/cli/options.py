"""Options that several commands have, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from drpo.errors import UserError
from drpo.evaluation.settings import ENGINE_NAMES, PRECISIONS, Settings
from drpo.registry import unknown_name

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Samples = Annotated[int, typer.Option(help="Completions of each problem.", min=1, max=10_000)]
Reward = Annotated[str, typer.Option(help="What says whether a completion is right.")]
Template = Annotated[str, typer.Option(help="The text the model sees, with {prompt} where the problem goes.")]
MaxTokens = Annotated[int, typer.Option(help="Longest completion, in tokens.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Completions generated at once.", min=1)]
Temperature = Annotated[float, typer.Option(help="Of sampling.", min=1e-3)]
Seed = Annotated[int, typer.Option(help="Of all samples.", min=0)]
EngineName = Annotated[str, typer.Option("--engine", help="transformers or vllm.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the evaluation in the folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="[NAME.]FIELD=VALUE",
        help="Change a hyperparameter, of one objective or of all that have it. Repeatable.",
        show_default=False,
    ),
]


def check_settings(**given: Any) -> Settings:
    if given["engine"] not in ENGINE_NAMES:
        raise UserError(f"--engine: {unknown_name('engine', given['engine'], ENGINE_NAMES)}")
    if given["precision"] not in PRECISIONS:
        raise UserError(f"--precision: {unknown_name('precision', given['precision'], PRECISIONS)}")
    if "{prompt}" not in given["template"]:
        raise UserError(f"--template {given['template']!r}: expected text with {{prompt}} in it")
    from drpo.data.problems import BUILTIN_TASKS
    from drpo.rewards import load_reward

    load_reward(given["reward"])
    for source in given["data"]:
        if source not in BUILTIN_TASKS and not Path(source).is_file():
            raise UserError(f"--data {source}: no such file; expected a .jsonl file or {', '.join(BUILTIN_TASKS)}")

    return Settings(**given)


def run_evaluation(settings: Settings, path: Path, resume: bool, overwrite: bool) -> dict[str, Any]:
    from drpo.evaluation.evaluate import sample_and_score
    from drpo.evaluation.folder import EvaluationFolder

    try:
        return sample_and_score(settings, EvaluationFolder(path), resume=resume, overwrite=overwrite)
    except KeyboardInterrupt as error:
        typer.echo("interrupted; to go on: the same command with --resume", err=True)
        raise typer.Exit(130) from error
