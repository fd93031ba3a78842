"""The command ``drpo data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
    check_template,
    run_evaluation,
)
from drpo.errors import UserError
from drpo.evaluation.settings import Settings


class _DataGroup(TyperGroup):
    """``drpo data gsm8k`` is ``drpo data get gsm8k``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["get", *args])


data = typer.Typer(cls=_DataGroup, no_args_is_help=True, help="Fetch, check and filter mathematical problems.")


@data.command()
def get(
    name: Annotated[str, typer.Argument(help="The data set.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder for NAME.jsonl and its report NAME.json.")] = Path("data"),
    source: Annotated[
        Path | None,
        typer.Option("--from", help="A copy on disk, .jsonl or .parquet; else the hub.", show_default=False),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="A file of this command whose problems should not be in it. Repeatable.", show_default=False),
    ] = None,
    wrapper: Annotated[bool, typer.Option("--wrapper", help="Keep DAPO-Math's text around its problems.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Fetch a data set, check and de-duplicate it: dapo-math-17k, gsm8k, gsm8k-test, math500, aime24, aime25, amc23.

    Examples:

      drpo data aime24

      drpo data dapo-math-17k --from dapo-math-17k.parquet --against data/aime24.jsonl
    """
    from drpo.data.build import collect, summary, write

    collected = collect(name, source, wrapper=wrapper, against=against or [])
    path = write(collected, out, overwrite=overwrite)
    for line in [*summary(collected.report), str(path)]:
        typer.echo(line)


@data.command("filter")
def filter_(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A file that drpo data made.", show_default=False)],
    model: Annotated[str, typer.Option(help="A run folder, a folder or a name on the hub.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The .jsonl file for what is kept.", show_default=False)],
    least: Annotated[float, typer.Option("--min", help="Lowest pass rate that is kept.", min=0, max=1)] = 0.2,
    most: Annotated[float, typer.Option("--max", help="Highest pass rate that is kept.", min=0, max=1)] = 0.8,
    samples: Samples = 16,
    reward: Reward = Settings.reward,
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
    """Keep the problems that a model solves in a share of its samples.

    The samples go to a folder beside --out, from where an interrupted filter goes on with --resume.

    Examples:

      drpo data filter data/dapo-math-17k.jsonl --model Qwen/Qwen3-4B-Base --min 0.2 --max 0.8 --out data/dapo-13k.jsonl
    """
    from drpo.data.build import within_pass_rates
    from drpo.data.files import read_problems, write_with_report

    if least > most:
        raise UserError(f"--min {least:g}: expected at most --max, {most:g}")
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: expected a name that ends in .jsonl")
    if out.absolute() == path.absolute():
        raise UserError(f"--out {out}: is what is filtered; expected another file")
    if out.exists() and not (overwrite or resume):
        raise UserError(f"--out {out}: already exists; choose another, or give --overwrite")
    problems = read_problems(path)
    settings = check_settings(
        model=model, data=(str(path),), samples=samples, reward=reward, template=template, max_tokens=max_tokens,
        chat_template_kwargs=chat_template_kwargs, batch_size=batch_size, temperature=temperature, seed=seed,
        engine=engine, precision=precision,
    )  # fmt: skip
    result = run_evaluation(settings, out.with_suffix(".evaluation"), resume, overwrite)
    within = within_pass_rates(problems, result["problems_table"], least, most)
    report = {
        "from": str(path), "read": len(problems), "kept": len(within), "min": least, "max": most, "model": model,
        "samples": samples, "average": result["average"],
    }  # fmt: skip
    write_with_report(out, within, report)
    typer.echo(f"{len(within):,} of {len(problems):,} problems kept, {out}")


@data.command("verl")
def for_verl(
    path: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A file that drpo data made, or a built-in task: arithmetic, addition.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .jsonl or .parquet file for verl.", show_default=False)],
    template: Template = None,
    size: Annotated[int, typer.Option("--problems", help="Of a built-in task.", min=1)] = 10_000,
    heldout: Annotated[bool, typer.Option("--heldout", help="A built-in task's held-out problems.")] = False,
) -> None:
    """Write problems as verl's trainer reads them.

    Examples:

      drpo data verl data/dapo-math-filtered.jsonl --out data/verl/train.jsonl

      drpo data verl arithmetic --heldout --problems 250 --out data/verl/heldout.jsonl
    """
    from drpo.data.files import read_problems
    from drpo.data.problems import BUILTIN_TASKS, builtin_problems
    from drpo.integrations.verl.problems import write_rows

    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out {out}: expected a name that ends in .jsonl or .parquet")
    check_template(template)
    if path in BUILTIN_TASKS:
        problems = builtin_problems("heldout" if heldout else "train", size, 0, path)
    else:
        problems = read_problems(Path(path), template=template or "{prompt}")
    typer.echo(f"{write_rows(problems, out, Path(path).stem):,} problems, {out}")
