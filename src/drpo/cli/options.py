"""Options that several commands have, each described once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from drpo.errors import UserError
from drpo.evaluation.settings import ENGINE_NAMES, PRECISIONS, Settings
from drpo.redact import find_secret
from drpo.registry import unknown_name

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Samples = Annotated[int, typer.Option(help="Completions of each problem.", min=1, max=10_000)]
Reward = Annotated[str, typer.Option(help="What says whether a completion is right.")]
Template = Annotated[
    str | None,
    typer.Option(
        help="The text the model sees, with {prompt} where the problem goes; by default that of a run's recipe, else {prompt}.",
        show_default=False,
    ),
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help='What the chat template is told, such as {"enable_thinking": false}; by default what a run\'s recipe says.',
        show_default=False,
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Longest completion, in tokens.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Completions generated at once.", min=1)]
Temperature = Annotated[float, typer.Option(help="Of sampling.", min=1e-3)]
Seed = Annotated[int, typer.Option(help="Of all samples.", min=0)]
EngineName = Annotated[str, typer.Option("--engine", help="transformers or vllm.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the evaluation in the folder.")]
RecipeArgument = Annotated[
    Path | None,
    typer.Argument(help="A recipe in YAML, or a name of drpo recipes; arithmetic by default.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="[NAME.]FIELD=VALUE",
        help="Change a hyperparameter, of one objective or of all that have it. Repeatable.",
        show_default=False,
    ),
]


def check_settings(chat_template_kwargs: str | None, **options: Any) -> Settings:
    if options["engine"] not in ENGINE_NAMES:
        raise UserError(f"--engine: {unknown_name('engine', options['engine'], ENGINE_NAMES)}")
    if options["precision"] not in PRECISIONS:
        raise UserError(f"--precision: {unknown_name('precision', options['precision'], PRECISIONS)}")
    template_kwargs = _mapping(chat_template_kwargs)
    if option := find_secret({**options, "chat-template-kwargs": template_kwargs}):
        raise UserError(
            f"--{option.partition('.')[0]}: holds a secret, which would be written to the evaluation's folder; expected a "
            "token in the environment (HF_TOKEN)"
        )
    check_template(options["template"])
    from drpo.data.problems import BUILTIN_TASKS
    from drpo.rewards import load_reward

    load_reward(options["reward"])
    for source in options["data"]:
        if source not in BUILTIN_TASKS and not Path(source).is_file():
            raise UserError(
                f"--data {source}: no such file; expected a .jsonl or .parquet file, or {', '.join(BUILTIN_TASKS)}"
            )
    return Settings(chat_template_kwargs=template_kwargs, **options)


def check_template(template: str | None) -> None:
    if template is not None and "{prompt}" not in template:
        raise UserError(f"--template {template!r}: expected text with {{prompt}} in it")


def _mapping(text: str | None) -> dict[str, Any] | None:
    try:
        value = None if text is None else json.loads(text)
    except ValueError:
        value = text
    if value is not None and not isinstance(value, dict):
        raise UserError(f'--chat-template-kwargs {text}: expected a JSON object, such as {{"enable_thinking": false}}')
    return value


def run_evaluation(settings: Settings, path: Path, resume: bool, overwrite: bool) -> dict[str, Any]:
    from drpo.evaluation.evaluate import sample_and_score
    from drpo.evaluation.folder import EvaluationFolder

    try:
        return sample_and_score(settings, EvaluationFolder(path), resume=resume, overwrite=overwrite)
    except KeyboardInterrupt as error:
        typer.echo("interrupted; to go on: the same command with --resume", err=True)
        raise typer.Exit(130) from error
