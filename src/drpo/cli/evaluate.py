"""The commands ``drpo eval`` and ``drpo compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from drpo.cli.options import (
    BatchSize,
    ChatTemplateKwargs,
    EngineName,
    MaxTokens,
    Overwrite,
    Precision,
    Resume,
    Reward,
    Samples,
    Seed,
    Temperature,
    Template,
    check_settings,
    run_evaluation,
)
from drpo.evaluation.settings import Settings


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run folder, arithmetic, a folder or a name on the hub.", show_default=False)
    ],
    sources: Annotated[
        list[str],
        typer.Option(
            "--data",
            help="A .jsonl or .parquet file with prompt and answer, or a built-in task: arithmetic, addition. Repeatable.",
        ),
    ],
    samples: Samples = Settings.samples,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder; by default RUN/evaluations/DATA or evals/MODEL-DATA.", show_default=False),
    ] = None,
    problems: Annotated[
        int | None, typer.Option(help="At most so many of each file.", min=1, show_default=False)
    ] = None,
    reward: Reward = Settings.reward,
    asked_as: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="RECIPE",
            help="Ask the model as this recipe, or run, does: its template, chat template and stop. By default as the run that trained it.",
            show_default=False,
        ),
    ] = None,
    template: Template = Settings.template,
    chat_template_kwargs: ChatTemplateKwargs = None,
    max_tokens: MaxTokens = Settings.max_tokens,
    batch_size: BatchSize = Settings.batch_size,
    temperature: Temperature = Settings.temperature,
    seed: Seed = Settings.seed,
    engine: EngineName = Settings.engine,
    precision: Precision = Settings.precision,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Sample completions of every problem and say how many are right, with intervals.

    Examples:

      drpo eval runs/demo --data arithmetic --reward exact_answer --samples 8 --max-tokens 20

      drpo eval HuggingFaceTB/SmolLM2-135M-Instruct --as smollm2-addition --data addition --reward exact_answer --max-tokens 4

      drpo eval Qwen/Qwen3-4B-Base --data data/aime24.jsonl --data data/aime25.jsonl --samples 16 --max-tokens 8192
    """
    settings = check_settings(
        model=model, data=tuple(sources), samples=samples, problems=problems, reward=reward, asked_as=asked_as, template=template,
        max_tokens=max_tokens, chat_template_kwargs=chat_template_kwargs, batch_size=batch_size, temperature=temperature, seed=seed, engine=engine,
        precision=precision,
    )  # fmt: skip
    from drpo.evaluation.folder import default_folder

    folder = out or default_folder(settings.model, settings.data)
    result = run_evaluation(settings, folder, resume, overwrite)
    typer.echo(f"average@{samples}  {_shown(result['average'])}")
    if samples > 1:
        typer.echo(f"pass@{samples}  {_shown(result['pass_at'][str(samples)])}")
        typer.echo(f"majority@{samples}  {_shown(result['majority'])}")
    typer.echo(f"truncated {result['truncated']:.3f}, without an answer {result['no_answer']:.3f}, {folder}")


def compare(
    first: Annotated[Path, typer.Argument(help="The folder of an evaluation.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="One of the same problems.", show_default=False)],
) -> None:
    """Say how much better the second model is than the first on the same problems.

    Examples:

      drpo compare evals/arithmetic-arithmetic runs/demo/evaluations/arithmetic
    """
    from drpo.evaluation.summary import compare as compared

    comparison = compared(first, second)
    typer.echo(f"first       {_shown(comparison['first'])}")
    typer.echo(f"second      {_shown(comparison['second'])}")
    typer.echo(f"difference  {_shown(comparison['difference'], '+')}")
    for name, (of_first, of_second) in comparison["asked_otherwise"].items():
        typer.echo(f"the models were not asked the same: {name} is {of_first!r} and {of_second!r}", err=True)
    typer.echo(f"{comparison['problems']} problems, better on {comparison['better']}, worse on {comparison['worse']}")


def _shown(estimate: dict[str, float], sign: str = "") -> str:
    return f"{estimate['mean']:{sign}.3f}  95 % [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"
