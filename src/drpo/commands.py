"""The commands on problems: ``drpo data``, ``drpo eval`` and ``drpo compare``; they parse and delegate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from drpo.errors import UserError
from drpo.evaluation.settings import ENGINE_NAMES, PRECISIONS, Settings
from drpo.names import unknown_name


class _DataGroup(TyperGroup):
    """``drpo data gsm8k`` is ``drpo data get gsm8k``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["get", *args])


data = typer.Typer(cls=_DataGroup, no_args_is_help=True, help="Fetch, check and filter mathematical problems.")

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
    from drpo.data.collect import collect, summary, write

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
    from drpo.data.passrate import keep, write_kept
    from drpo.data.rows import read_rows

    if least > most:
        raise UserError(f"--min {least:g}: expected at most --max, {most:g}")
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: expected a name that ends in .jsonl")
    if out.absolute() == path.absolute():
        raise UserError(f"--out {out}: is what is filtered; expected another file")
    if out.exists() and not (overwrite or resume):
        raise UserError(f"--out {out}: already exists; choose another, or give --overwrite")
    rows = read_rows(path)
    settings = _settings(
        model=model, data=(str(path),), samples=samples, reward=reward, template=template, max_tokens=max_tokens,
        batch_size=batch_size, temperature=temperature, seed=seed, engine=engine, precision=precision,
    )  # fmt: skip
    result = _evaluate(settings, out.with_suffix(".evaluation"), resume, overwrite)
    kept = keep(rows, result["problems_table"], least, most)
    report = {"from": str(path), "read": len(rows), "kept": len(kept), "min": least, "max": most, "model": model}
    write_kept(out, kept, report | {"samples": samples, "average": result["average"]})
    typer.echo(f"{len(kept):,} of {len(rows):,} problems kept, {out}")


@data.command("verl")
def for_verl(
    path: Annotated[
        str, typer.Argument(metavar="FILE", help="A file that drpo data made, or arithmetic.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The .jsonl file for verl.", show_default=False)],
    template: Template = Settings.template,
    problems: Annotated[int, typer.Option(help="Of the built-in task.", min=1)] = 10_000,
    heldout: Annotated[bool, typer.Option("--heldout", help="The built-in task's held-out problems.")] = False,
) -> None:
    """Write problems as verl's trainer reads them.

    Examples:

      drpo data verl data/dapo-math-filtered.jsonl --out data/verl/train.jsonl

      drpo data verl arithmetic --heldout --problems 250 --out data/verl/heldout.jsonl
    """
    from drpo.integrations.verl.data import write_rows
    from drpo.tasks import BUILTIN_TASKS, builtin_problems, read_problems

    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: expected a name that ends in .jsonl")
    if "{prompt}" not in template:
        raise UserError(f"--template {template!r}: expected text with {{prompt}} in it")
    if path in BUILTIN_TASKS:
        found = builtin_problems("heldout" if heldout else "train", problems, seed=0)
    else:
        found = read_problems(Path(path), prompt="prompt", answer="answer", template=template)
    typer.echo(f"{write_rows(found, out, Path(path).stem):,} problems, {out}")


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run folder, arithmetic, a folder or a name on the hub.", show_default=False)
    ],
    sources: Annotated[
        list[str], typer.Option("--data", help="A .jsonl file with prompt and answer, or arithmetic. Repeatable.")
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
    template: Template = Settings.template,
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

      drpo eval Qwen/Qwen3-4B-Base --data data/aime24.jsonl --data data/aime25.jsonl --samples 16 --max-tokens 8192
    """
    settings = _settings(
        model=model, data=tuple(sources), samples=samples, problems=problems, reward=reward, template=template,
        max_tokens=max_tokens, batch_size=batch_size, temperature=temperature, seed=seed, engine=engine,
        precision=precision,
    )  # fmt: skip
    from drpo.evaluation.folder import default_folder

    folder = out or default_folder(settings.model, settings.data)
    result = _evaluate(settings, folder, resume, overwrite)
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

    found = compared(first, second)
    typer.echo(f"first       {_shown(found['first'])}")
    typer.echo(f"second      {_shown(found['second'])}")
    typer.echo(f"difference  {_shown(found['difference'], '+')}")
    typer.echo(f"{found['problems']} problems, better on {found['better']}, worse on {found['worse']}")


def _settings(**given: Any) -> Settings:
    if given["engine"] not in ENGINE_NAMES:
        raise UserError(f"--engine: {unknown_name('engine', given['engine'], ENGINE_NAMES)}")
    if given["precision"] not in PRECISIONS:
        raise UserError(f"--precision: {unknown_name('precision', given['precision'], PRECISIONS)}")
    if "{prompt}" not in given["template"]:
        raise UserError(f"--template {given['template']!r}: expected text with {{prompt}} in it")
    from drpo.rewards import load_reward
    from drpo.tasks import BUILTIN_TASKS

    load_reward(given["reward"])
    for source in given["data"]:
        if source not in BUILTIN_TASKS and not Path(source).is_file():
            raise UserError(f"--data {source}: no such file; expected a .jsonl file or {', '.join(BUILTIN_TASKS)}")

    return Settings(**given)


def _evaluate(settings: Settings, path: Path, resume: bool, overwrite: bool) -> dict[str, Any]:
    from drpo.evaluation.folder import EvaluationFolder
    from drpo.evaluation.sampled import sample_and_score

    try:
        return sample_and_score(settings, EvaluationFolder(path), resume=resume, overwrite=overwrite)
    except KeyboardInterrupt as error:
        typer.echo("interrupted; to go on: the same command with --resume", err=True)
        raise typer.Exit(130) from error


def _shown(estimate: dict[str, float], sign: str = "") -> str:
    return f"{estimate['mean']:{sign}.3f}  95 % [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"
