"""A user's mistake is one line on standard error, exit code 2, and nothing written."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from drpo import __version__
from drpo.cli import main as cli
from drpo.files import write_json
from drpo.objectives import CORRECTIONS, OBJECTIVES
from drpo.recipes import FOLDER
from drpo.run.folder import RunFolder
from drpo.run.recipe import load_recipe
from test_recipe import MALFORMED, NOT_RECIPES, RECIPE

DRPO = str(Path(sys.executable).parent / "drpo")
GSM8K = str(FOLDER / "gsm8k.yaml")


def contents(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder of a user without network."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "COLUMNS": "240"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture
def drpo(here, monkeypatch, capfd):
    """Run the command in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["drpo", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture
def refusal(here, drpo):
    """The line that a command with a mistake in it ends with."""

    def run(*arguments: str) -> str:
        before = contents(here)
        code, out, err = drpo(*arguments)
        assert code == 2, err
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: ")
        assert contents(here) == before
        return err.removeprefix("error: ").removesuffix("\n")

    return run


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([DRPO, *arguments], capture_output=True, text=True, timeout=120, check=False)


def make_run(path: Path, *overrides: str, checkpoint: bool = True) -> RunFolder:
    folder = RunFolder(path)
    folder.create(load_recipe(None, overrides))
    if checkpoint:
        (folder.checkpoints / "checkpoint-4").mkdir(parents=True)
        write_json(folder.checkpoints / "checkpoint-4" / "trainer_state.json", {})
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "malformed.yaml"], "malformed.yaml: seed: got 'soon'; expected an integer"),
        (["train", "missing.yaml"], "missing.yaml: no such file"),
        (["train", "--set", "learning_rate=fast"], "the built-in recipe: learning_rate: got 'fast'; expected a number"),
        (["train", "--output", "mine"], "--output mine: already exists; choose another, or give --resume or --overwrite"),
        (["train", GSM8K], "task.train: /"),
        (["train", "--set", "model=./missing"], "model: cannot load './missing'"),
        (["report", "mine"], "mine: is not a run folder"),
    ],
    ids=lambda value: " ".join(Path(part).name for part in value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2_and_changes_nothing(here, refusal, arguments, expected):
    (here / "malformed.yaml").write_text(RECIPE.replace("seed: 0", "seed: soon"))
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").write_text("mine")
    assert refusal(*arguments).startswith(expected)


def test_a_mistake_is_one_line_of_the_program_too(here):
    before = contents(here)
    result = command("train", "--set", "model=./missing")
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: model: cannot load './missing'")
    assert len(result.stderr.splitlines()) == 1
    assert contents(here) == before


@pytest.mark.parametrize(("text", "expected"), MALFORMED)
def test_a_malformed_recipe_is_refused(here, refusal, text, expected):
    (here / "recipe.yaml").write_text(text)
    assert expected in refusal("train", "recipe.yaml")


@pytest.mark.parametrize(("content", "expected"), NOT_RECIPES)
def test_a_file_that_is_no_recipe_is_refused(here, refusal, content, expected):
    (here / "recipe.yaml").write_bytes(content)
    assert expected in refusal("train", "recipe.yaml", "--output", "run")


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=["", "--overwrite"])
@pytest.mark.parametrize("name", ["file", "full", "link to a run", "dangling link"])
def test_an_output_that_is_no_run_is_left_alone(here, refusal, name, flags):
    (here / "file").touch()
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("mine")
    make_run(here / "run")
    (here / "link to a run").symlink_to("run")
    (here / "dangling link").symlink_to("nowhere")
    assert refusal("train", "--output", name, *flags).startswith(f"--output {name}: ")


def test_a_run_is_left_alone_without_overwrite(here, refusal):
    make_run(here / "runs" / "arithmetic")
    assert "already exists; choose another, or give --resume or --overwrite" in refusal("train")


@pytest.mark.parametrize("name", ["n" * 300, "file/run", "link to an empty folder"])
def test_an_output_that_cannot_be_created_is_refused(here, refusal, name):
    (here / "file").touch()
    (here / "empty").mkdir()
    (here / "link to an empty folder").symlink_to("empty")
    assert refusal("train", "--set", "rollouts=1", "--set", "task.heldout=null", "--output", name).startswith(
        "--output "
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--output", "missing"], "--output missing: holds no run to resume"),
        (["--output", "fresh"], "--output fresh: holds no checkpoint to resume from"),
        (["--output", "done"], "--output done: this run is complete"),
        (["--output", "stopped", "--overwrite"], "--resume and --overwrite: expected one of them"),
        (["--output", "stopped", "--set", "seed=3"], "--resume: seed is 3, but the run in stopped has 0"),
        (["--output", "stopped", "--set", "task.train=x.jsonl"], "--resume: task is "),
        (["--output", "stopped", "--set", "objective=ppo"], "--resume: objective is "),
        (["recipe.yaml", "--output", "stopped"], "--resume: rollouts is 4, but the run in stopped has 100"),
        # The run was made with another number of rollouts, too; the user changed the seed.
        (["--output", "other", "--set", "seed=3"], "--resume: seed is 3, but the run in other has 0"),
        (["--output", "stopped", "--set", "sede=3"], "unknown field 'sede'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_that_cannot_go_on_as_asked_is_refused(here, refusal, arguments, expected):
    (here / "recipe.yaml").write_text(RECIPE)
    make_run(here / "fresh", checkpoint=False)
    make_run(here / "stopped")
    make_run(here / "other", "rollouts=7")
    write_json(make_run(here / "done").summary, {})
    assert expected in refusal("train", "--resume", *arguments)


@pytest.mark.parametrize("arguments", [[], ["--set", "seed=0"], ["recipe.yaml"]], ids=" ".join)
def test_a_stopped_run_goes_on_with_its_own_recipe(here, drpo, monkeypatch, arguments):
    folder = make_run(here / "stopped")
    (here / "recipe.yaml").write_bytes(folder.recipe.read_bytes())
    asked = []
    monkeypatch.setattr(
        "drpo.run.train.train", lambda recipe, folder, resume, overwrite: asked.append((recipe, str(folder), resume))
    )
    code, _, err = drpo("train", *arguments, "--resume", "--output", "stopped")
    assert (code, err) == (0, "")
    assert asked == [(load_recipe(), "stopped", True)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+', "rows.jsonl, row 2: is not JSON in UTF-8"),
        ("null\n", "rows.jsonl, row 1: is a NoneType; expected an object"),
        ('{"promt": "1+1=", "answer": "2"}\n', "rows.jsonl, row 1: has no field 'prompt'; did you mean 'promt'?"),
        ('{"prompt": "\\ud800", "answer": "2"}\n', "rows.jsonl, row 1: prompt has a lone surrogate"),
        ("", "rows.jsonl: has no rows"),
        ('{"prompt": "1+1=", "answer": "2"}\n', "rows.jsonl has 1 rows; prompts_per_rollout 16 needs as many"),
    ],
)
def test_malformed_data_is_refused(here, refusal, rows, expected):
    (here / "rows.jsonl").write_text(rows)
    message = refusal("train", "--set", "task.train=rows.jsonl")
    assert message.startswith("task.train: ")
    assert expected in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task.train=missing.jsonl"], "missing.jsonl: no such file"),
        (["task.heldout=missing.jsonl"], "missing.jsonl: no such file"),
        (["task.train=rows.csv"], "task.train: rows.csv: expected a file that ends in .jsonl or .parquet"),
        (
            ["task.train=arithmatic"],
            "arithmatic: expected a file that ends in .jsonl or .parquet, or one of arithmetic",
        ),
        (["reward=exact_anwser"], "reward: unknown reward 'exact_anwser'; did you mean 'exact_answer'?"),
        (["reward=missing:score"], "reward: cannot load 'missing:score'"),
        (["reward=os:sep"], "reward: 'os:sep' is a str; expected a function"),
        (["model=./missing"], "model: cannot load './missing'"),
        (["model=empty"], "/empty': expected arithmetic"),
        (["model=broken"], "/broken': expected arithmetic"),
        (["model=damaged"], "/damaged': expected arithmetic"),
        (["model=nobody/no-such-model"], "model: cannot load 'nobody/no-such-model'"),
        (["trainer.max_grad_nrom=1"], "trainer: unknown option 'max_grad_nrom'; did you mean 'max_grad_norm'?"),
        (
            ["trainer.num_generations=4"],
            "the built-in recipe: trainer: has 'num_generations', which belongs at the top",
        ),
        (["trainer.max_steps=4"], "trainer: has 'max_steps'; expected rollouts at the top of the recipe"),
        (
            ["trainer.eval_strategy=steps"],
            "trainer: has 'eval_strategy'; it follows from the recipe and its run folder",
        ),
        (
            ["trainer.reward_weights=[1.0, 2.0]"],
            "trainer: has 'reward_weights'; expected reward: [{name: ..., weight: 1.0}, ...] at the top",
        ),
        (["task.stop='+-'"], "task.stop: '+-' is 2 tokens of the model; expected one"),
        (["trainer.adam_beta1=5"], "trainer.adam_beta1: got 5.0; expected a number of at least 0, below 1"),
        (
            ["trainer.generation_kwargs={temperature: .nan}"],
            "the built-in recipe: trainer.generation_kwargs.temperature: got nan; expected a finite number",
        ),
        (["trainer.generation_kwargs={top_k: 5}"], "trainer.generation_kwargs: has 'top_k'"),
        (
            ["lora={target_modules: nonexistent}"],
            "lora: NoMatchingPeftModuleError: Target modules nonexistent",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_a_run_needs_is_checked_before_anything_is_written(here, refusal, overrides, expected):
    from drpo.data.problems import MODEL_PATH

    (here / "empty").mkdir()
    (here / "broken").mkdir()
    (here / "broken" / "config.json").write_text("{")
    (here / "damaged").mkdir()
    for file in MODEL_PATH.iterdir():
        size = 1000 if file.suffix == ".safetensors" else None
        (here / "damaged" / file.name).write_bytes(file.read_bytes()[:size])
    options = [part for override in overrides for part in ("--set", override)]
    assert expected in refusal("train", *options, "--output", "run")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["missing"], "missing: is not a run folder"),
        (["run", "full"], "full: is not a run folder"),
        (["run", "--output", "page.pdf"], "--output page.pdf: expected a name that ends in .html"),
        (["run", "--output", "missing/page.html"], "--output missing/page.html: cannot be written"),
        (["run", "--output", "folder.html"], "--output folder.html: cannot be written"),
        (["damaged"], "damaged/metrics.jsonl, line 1: is damaged"),
        (["n" * 300], "n"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_report_that_cannot_be_made_is_refused(here, refusal, arguments, expected):
    make_run(here / "run")
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("mine")
    (here / "folder.html").mkdir()
    make_run(here / "damaged").metrics.write_text("{\n{}\n")
    assert refusal("report", *arguments).startswith(expected)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tain"],
        ["train", "--outptu", "x"],
        ["train", "a.yaml", "b.yaml"],
        ["train", "--set"],
        ["report"],
        ["objectives", "drpo", "ppo"],
    ],
    ids=" ".join,
)
def test_an_unknown_command_or_option_is_a_usage_error(here, drpo, arguments):
    code, out, err = drpo(*arguments)
    assert code == 2
    assert out == ""
    assert "Error" in err
    assert "Traceback" not in err
    assert contents(here) == {}


def test_the_version_is_printed(drpo):
    assert drpo("--version") == (0, f"drpo {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], []], ids=" ".join)
def test_help_lists_the_commands(drpo, arguments):
    _, out, err = drpo(*arguments)
    assert all(name in out + err for name in ("train", "report", "objectives"))


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("train", "drpo train --set objective=ppo --set seed=1 --output runs/ppo-1"),
        ("report", "drpo report runs/drpo runs/ppo --output comparison.html"),
        ("objectives", "drpo objectives"),
        ("weights", "drpo weights"),
    ],
)
def test_the_help_of_a_command_shows_an_example(drpo, name, example):
    code, out, _ = drpo(name, "--help")
    assert code == 0
    assert "Example" in out
    assert example in out


def test_objectives_lists_every_objective_with_its_defaults_and_anchor(drpo):
    code, out, _ = drpo("objectives")
    assert code == 0
    listed, corrections = out.split("Corrections (")
    # What stands between a name at the start of a line and the next one.
    _, *parts = re.split(rf"^({'|'.join(OBJECTIVES)}) ", listed, flags=re.MULTILINE)
    described = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(described) == list(OBJECTIVES)
    for name, objective in OBJECTIVES.items():
        defaults = [f"{field.name}={field.default}" for field in dataclasses.fields(objective)]
        assert re.findall(r"\b(\w+=[\d.e-]+)(?=[,;])", described[name]) == defaults
        assert {"sampler": "r = π/μ;", "old": "r = π/π_old;"}[objective.anchor] in described[name]
    assert all(name in corrections for name in CORRECTIONS)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_shows_one_on_a_page(drpo, name):
    code, out, _ = drpo("objectives", name)
    assert code == 0
    text = " ".join(out.split())
    objective = OBJECTIVES[name]
    for said in (objective.formula, objective.weight, objective.source):
        assert said in text
    for field in dataclasses.fields(objective):
        assert f"{field.name} = {field.default}" in text
    assert {"sampler": "π over μ", "old": "π over π_old"}[objective.anchor] in text


@pytest.mark.parametrize("name", CORRECTIONS)
def test_objectives_shows_a_correction_on_a_page(drpo, name):
    code, out, _ = drpo("objectives", name)
    assert code == 0
    text = " ".join(out.split())
    correction = CORRECTIONS[name]
    for part in (
        correction.formula,
        correction.region.where,
        correction.region.edge.name,
        correction.region.side.name,
    ):
        assert part in text
    for field in dataclasses.fields(correction):
        assert f"{field.name} = {field.default}" in text


def test_objectives_says_of_each_where_its_region_ends(drpo):
    text = " ".join(drpo("objectives")[1].split())
    for kind in (*OBJECTIVES.values(), *CORRECTIONS.values()):
        if kind.region is not None:
            assert f"{kind.operator} where {kind.region.where}; scope: {kind.region.scope.name}" in text


def test_objectives_shows_bounds_for_the_hyperparameters_asked_for(drpo):
    assert "w within     [−4, 6]" in drpo("objectives", "drpo", "--set", "delta=0.2")[1]
    assert "w within     no bounds" in drpo("objectives", "spo")[1]
    assert "w within     [0, ∞]" in drpo("objectives", "gspo")[1]


def test_objectives_are_listed_where_greek_cannot_be_written(here):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([DRPO, "objectives"], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"drpo_topk" in done.stdout


@pytest.mark.parametrize("output", ["w.png", "w.svg", "w.pdf"])
def test_weights_draws_a_picture(here, drpo, output):
    code, out, _ = drpo("weights", "drpo", "spo", "--set", "drpo.delta=0.2", "--output", output)
    assert (code, out.strip()) == (0, output)
    start = {"w.png": b"\x89PNG", "w.svg": b"<?xml", "w.pdf": b"%PDF"}[output]
    assert (here / output).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["objectives", "drop"], "unknown objective 'drop'; did you mean 'dro' or 'drpo'?"),
        (["objectives", "--set", "delta=1"], "--set delta=1: expected with the NAME of an objective"),
        (["objectives", "drpo", "--set", "delte=1"], "unknown hyperparameter 'delte'; did you mean 'delta'?"),
        (["objectives", "drpo", "--set", "delta=much"], "--set delta=much: expected [NAME.]FIELD=NUMBER"),
        (["objectives", "drpo", "--set", "delta"], "--set delta: expected [NAME.]FIELD=NUMBER"),
        (["objectives", "drpo", "--set", "delta=-1"], "delta is -1; expected a finite number > 0"),
        (["objectives", "drpo", "--set", "delta=nan"], "delta is nan; expected a finite number > 0"),
        (["objectives", "drpo", "--set", ".delta=1"], "--set .delta=1: unknown objective ''"),
        (["objectives", "drpo", "--set", "delta=٣"], "--set delta=٣: expected [NAME.]FIELD=NUMBER"),
        (["objectives", "drpo", "--set", "delta=1_0"], "--set delta=1_0: expected [NAME.]FIELD=NUMBER"),
        (
            ["weights", "drpo", "spo", "--set", "spo.epsilon=1e-50"],
            "--set spo.epsilon is 1e-50; expected a number from",
        ),
        (["train", "--set", f"objective.delta={10**20}"], "expected a number from 1e-09 to 1e+09"),
        (["objectives", "pdm", "--set", "top_k=2.5"], "top_k is 2.5; expected a whole number"),
        (["weights", "drpo", "--set", "spo.epsilon=1"], "--set spo.epsilon=1: unknown objective 'spo'"),
        (["weights", "drpo", "--set", "drpo.epsilon=1"], "unknown hyperparameter 'epsilon'"),
        (["weights", "drpoo"], "unknown objective 'drpoo'"),
        (["weights", "drpo", "m2po"], "m2po weighs a token by all tokens of its update"),
        (["weights", "drpo", "--output", "w.gif"], "--output w.gif: expected a name that ends in .png, .svg, .pdf"),
        (["weights", "drpo", "--output", "none/w.png"], "--output none/w.png: cannot be written"),
        (["train", "--set", "anchor=olt"], "anchor: got 'olt'; expected 'sampler' or 'old'"),
        (["train", "--set", "correction=token_trunc"], "did you mean 'token_truncate'"),
        (["train", "--set", "correction=token_mask"], "correction: TokenMask weighs by π_old/μ"),
        (
            ["train", "--set", "objective=ppo", "--set", "correction=token_mask", "--set", "correction.low=3"],
            "low is 3; expected less than high, 2.0",
        ),
        (["train", "--set", "objective=icepop", "--set", "anchor=sampler"], "anchor: got 'sampler' with IcePop"),
    ],
)
def test_a_mistake_about_objectives_is_one_line(refusal, arguments, expected):
    assert expected in refusal(*arguments)


@pytest.mark.parametrize("module", ["torch", "transformers", "trl", "datasets", "plotly", "matplotlib"])
def test_help_and_usage_errors_wait_for_no_slow_import(here, module):
    statement = f"import sys, drpo.cli.main; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", statement], env=os.environ, check=False).returncode == 0
