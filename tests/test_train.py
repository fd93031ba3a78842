"""The main job, through the command line: train, evaluate, resume, report."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo import files
from drpo.cli import main as cli
from drpo.data.problems import MODEL_PATH
from drpo.files import read_jsonl
from drpo.objectives import OBJECTIVES
from drpo.recipes import FOLDER
from drpo.trainer.trainer import DRPOTrainer

SMALL = {
    "rollouts": 4,
    "prompts_per_rollout": 4,
    "heldout_problems": 10,
    "heldout_samples": 2,
    "evaluate_every": 2,
    "checkpoint_every": 2,
}

SMALL_GSM8K = {**SMALL, "model": "arithmetic", "micro_batch_size": "null", "train_precision": "fp32"}


@pytest.fixture
def drpo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command line in this process."""

    def run(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["drpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code

    return run


def sets(**fields: Any) -> list[str]:
    return [argument for name, value in fields.items() for argument in ("--set", f"{name}={value}")]


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_objective_makes_four_updates_a_rollout_and_reports_its_weights(
    tmp_path: Path, drpo: Any, objective: str
) -> None:
    run = tmp_path / objective
    few = {**SMALL, "rollouts": 2, "heldout_problems": 2, "heldout_samples": 1}
    drpo("train", "--output", run, *sets(**few, objective=objective))
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["rollout"] for row in rows] == [1] * 4 + [2] * 4
    assert sum(sum(row["weight_histogram"]) for row in rows) > 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["objective"] == objective
    assert {"accuracy_before", "accuracy_after", "rollouts", "train_seconds", "seed"} <= summary.keys()
    page = (run / "report.html").read_text()
    assert "Gradient weights" in page
    assert f'"name":"{objective}"' in page
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(run / "model").lm_head.weight).all()
    assert AutoTokenizer.from_pretrained(run / "model").decode([1]) == "<eos>"


def fill(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, path: str) -> None:
    """Have a function fail as on a full disk where its arguments name this path."""
    function = getattr(owner, name)

    def fail(*arguments: Any, **more: Any) -> Any:
        if path in str(arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments, **more)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize(
    ("owner", "name", "path"),
    [
        (files, "flush", "run.partial.json"),
        (Path, "open", "evaluations.jsonl"),
        (Path, "open", "metrics.jsonl"),
        (DRPOTrainer, "save_model", "run/model"),
        (files, "flush", "summary.partial.json"),
    ],
)
def test_a_full_disk_ends_training_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
    path: str,
) -> None:
    fill(monkeypatch, owner, name, path)
    few = {**SMALL, "rollouts": 1, "heldout_problems": 2}
    monkeypatch.setattr(sys, "argv", ["drpo", "train", "--output", str(tmp_path / "run"), *sets(**few)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    file = tmp_path / "run" / Path(path.replace(".partial", "")).name
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {file}: cannot be written (No space left on device)"


def test_a_correction_and_an_anchor_train_and_are_reported(tmp_path: Path, drpo: Any) -> None:
    corrected, anchored = tmp_path / "corrected", tmp_path / "anchored"
    few = {**SMALL, "rollouts": 1}
    drpo(
        "train", "--output", corrected, *sets(**few, objective="ppo", correction="token_mask", **{"correction.high": 3})
    )
    drpo("train", "--output", anchored, *sets(**few, objective="ppo", anchor="sampler"))
    assert "ppo(clip_low=0.2, clip_high=0.28) × token_mask(low=0.5, high=3)" in (corrected / "report.html").read_text()
    assert "ppo(clip_low=0.2, clip_high=0.28), anchor: sampler" in (anchored / "report.html").read_text()


def test_the_built_in_task_is_learned(tmp_path: Path, drpo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    drpo("train", "--output", run, *sets(rollouts=30, heldout_problems=100, evaluate_every=30, seed=5))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy_before"] <= 0.4
    assert summary["accuracy_after"] >= 0.8
    lines = capsys.readouterr().out.splitlines()[-3:]
    last = read_jsonl(run / "metrics.jsonl")[-1]
    assert lines[0] == f"30 rollouts, {summary['train_seconds']:.0f} s, {run / 'report.html'}"
    before, after = (f"{summary[f'accuracy_{when}']:.3f}" for when in ("before", "after"))
    assert re.fullmatch(
        rf"held-out accuracy {before} \[0\.\d+, 0\.\d+\] -> {after} \[0\.\d+, \d\.\d+\], 95 % intervals over 100 problems",
        lines[1],
    )
    assert lines[2].startswith(f"|π - μ| of the last update: mean {last['divergence/mean']:.2g}, 99 % quantile ")
    assert lines[2].endswith(f"drpo changed {last['regulariser/strength']:.0%} of the plain gradient")


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, drpo: Any) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    drpo("train", "--output", whole, *sets(**SMALL))
    # As a crash between the two checkpoints leaves it, a half-written line included.
    shutil.copytree(whole, resumed)
    for path in ("summary.json", "report.html"):
        (resumed / path).unlink()
    for path in ("model", "checkpoints/checkpoint-16"):
        shutil.rmtree(resumed / path)
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"update": 17, "rol')
    drpo("train", "--resume", "--output", resumed)
    for path in ("model/model.safetensors", "evaluations.jsonl", "samples.jsonl"):
        assert (resumed / path).read_bytes() == (whole / path).read_bytes(), path
    measured = [[_without_clock(row) for row in read_jsonl(run / "metrics.jsonl")] for run in (whole, resumed)]
    # The first audit is made again where training starts again.
    assert measured[0] == measured[1]
    seconds = [row["seconds"] for row in read_jsonl(resumed / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, resumed)]
    assert summaries[0]["audit"] == summaries[1]["audit"]


TERMINATES = """
import os, signal

calls = 0

def terminates(completions, answer, **_):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(text == right) for text, right in zip(completions, answer)]
"""


def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on(
    tmp_path: Path, drpo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ends.py").write_text(TERMINATES)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = sets(**{**SMALL, "task.heldout": "null"}, reward="ends:terminates")
    monkeypatch.setattr(sys, "argv", ["drpo", "train", "--output", str(tmp_path / "run"), *settings])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 143
    assert f"interrupted; to go on: drpo train --resume --output {tmp_path / 'run'}" in capsys.readouterr().err
    # The signal came in the second rollout, before its first update.
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-5").is_dir()
    drpo("train", "--resume", "--output", tmp_path / "run")
    drpo("train", "--output", tmp_path / "whole", *settings)
    resumed, whole = (tmp_path / name / "model" / "model.safetensors" for name in ("run", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()


def _edit_recipe(run: Path, data: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("learning_rate: 0.002", "learning_rate: 0.003"))


def _edit_data(run: Path, data: Path) -> None:
    data.write_text(data.read_text().replace('"answer": "', '"answer": "1'))


@pytest.mark.parametrize(
    ("edit", "named"), [(_edit_recipe, "learning_rate is 0.003"), (_edit_data, "heldout problems is 'SHA-256")]
)
def test_a_run_of_another_recipe_or_data_is_not_resumed(
    tmp_path: Path,
    drpo: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    edit: Any,
    named: str,
) -> None:
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    rows = [{"prompt": f"{number}+1=", "answer": f"{number + 1}"} for number in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"task.train": data, "task.heldout": data, "task.prompt": "prompt", "task.answer": "answer"}
    drpo("train", "--output", run, *sets(**{**SMALL, "rollouts": 2, "learning_rate": 0.002}, **files))
    (run / "summary.json").unlink()
    edit(run, data)
    before = (run / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(sys, "argv", ["drpo", "train", "--resume", "--output", str(run)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "error: --resume: " in printed
    assert named in printed
    assert (run / "metrics.jsonl").read_bytes() == before


def test_checks_may_change_when_a_run_is_resumed(tmp_path: Path, drpo: Any) -> None:
    run = tmp_path / "run"
    drpo("train", "--output", run, *sets(**SMALL, stop_on_collapse=1))
    weights = (run / "model/model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints/checkpoint-16")
    (run / "summary.json").unlink()
    changed = {"audit_threshold": 0.5, "stop_on_collapse": "null"}
    options = {"trainer.stale_sampler": "warn", "trainer.max_skipped_updates": 9}
    drpo("train", "--resume", "--output", run, *sets(**changed, **options))
    assert (run / "model/model.safetensors").read_bytes() == weights


def test_a_run_with_a_lag_is_resumed_and_keeps_its_audit(tmp_path: Path, drpo: Any) -> None:
    run = tmp_path / "run"
    drpo("train", "--output", run, *sets(**SMALL, rollout_lag=2, learning_rate=0.001))
    audit = json.loads((run / "summary.json").read_text())["audit"]
    shutil.rmtree(run / "checkpoints/checkpoint-16")
    (run / "summary.json").unlink()
    drpo("train", "--resume", "--output", run)
    assert [row["update"] for row in read_jsonl(run / "metrics.jsonl")] == list(range(1, 17))
    assert json.loads((run / "summary.json").read_text())["audit"] == audit


REWARDS = """
def raises(completions, **_): return [1 / 0 for _ in completions]
def leaves(completions, **_): raise SystemExit(0)
def text(completions, **_): return ["1.0"] * len(completions)
def nothing(completions, **_): return [None] * len(completions)
def infinite(completions, **_): return [0.0, float("inf")] + [0.0] * (len(completions) - 2)
def short(completions, **_): return [1.0]
"""


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("raises", "reward raises: ZeroDivisionError: division by zero"),
        ("leaves", "reward leaves: SystemExit: 0"),
        ("text", "reward text: returned '1.0' for completion 0, "),
        ("nothing", "reward nothing: returned None for all "),
        ("infinite", "reward infinite: returned inf for completion 1, "),
        ("short", "reward short: returned 1 scores; expected a list of "),
    ],
)
@pytest.mark.parametrize("heldout", ["arithmetic", "null"], ids=["heldout", "training"])
def test_a_reward_that_fails_is_one_line_and_leaves_no_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reward: str,
    message: str,
    heldout: str,
) -> None:
    (tmp_path / "failing_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    few = {"rollouts": 1, "prompts_per_rollout": 4, "heldout_problems": 4, "heldout_samples": 1}
    settings = sets(reward=f"failing_rewards:{reward}", **few, **{"task.heldout": heldout})
    monkeypatch.setattr(sys, "argv", ["drpo", "train", "--output", str(tmp_path / "run"), *settings])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    assert end.value.code == 1, printed.err
    (line,) = [line for line in printed.err.splitlines() if "error" in line]
    assert line.startswith(f"error: {message}")
    assert "Traceback" not in printed.err
    assert not (tmp_path / "run").exists()


def model_without(here: Path, *files: str) -> Path:
    """The built-in model, in whose files no token ends a completion, and none is there to pad with."""
    shutil.copytree(MODEL_PATH, here / "model")
    for name in files:
        file = here / "model" / name
        settings = json.loads(file.read_text())
        missing = {field: None for field in settings if field.startswith(("eos_token", "pad_token"))}
        file.write_text(json.dumps(settings | missing))
    return here / "model"


FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (FILES, {}, "tokenizer: neither it nor the model has an end-of-sequence token, so every completion runs to its limit"),
        (FILES[2:], {}, "tokenizer: has neither pad_token nor eos_token, and completions of different lengths are padded"),
        ((), {"max_completion_length": 4090}, "task.train: the prompt of problem 1, "),
        ((), {"max_completion_length": 4090}, "which with max_completion_length 4,090 are more than the model's 4,096 positions"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_do_what_a_recipe_asks_is_one_line_and_leaves_no_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: tuple[str, ...],
    options: dict[str, Any],
    message: str,
) -> None:
    settings = sets(**SMALL, model=model_without(tmp_path, *files), **options)
    monkeypatch.setattr(sys, "argv", ["drpo", "train", "--output", str(tmp_path / "run"), *settings])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr().err
    assert end.value.code == 2, printed
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [TypeError("full() received"), KeyboardInterrupt()])
def test_a_run_that_ends_before_its_first_update_leaves_no_folder_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(DRPOTrainer, "_generate_and_score_completions", fail)
    monkeypatch.setattr(sys, "argv", ["drpo", "train", "--output", str(tmp_path / "run"), *sets(**SMALL)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    if isinstance(error, KeyboardInterrupt):
        assert "interrupted before the first update; nothing was kept" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_held_out_problems_that_are_trained_on_are_said(
    tmp_path: Path, drpo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(10, 20)))
    few = {**SMALL, "rollouts": 1, "task.train": data, "task.heldout": data}
    drpo("train", "--output", tmp_path / "run", *sets(**few))
    assert (
        "task.heldout: 10 of 10 prompts are in task.train too; accuracy on them says little of others." in caplog.text
    )


def test_a_run_in_which_no_token_counts_has_no_audit(tmp_path: Path, drpo: Any) -> None:
    run = tmp_path / "run"
    nothing = {**SMALL, "rollouts": 2, "max_completion_length": 1, "trainer.mask_truncated_completions": "true"}
    drpo("train", "--output", run, *sets(**nothing))
    assert json.loads((run / "summary.json").read_text())["audit"] is None
    assert (run / "report.html").is_file()


def test_two_runs_of_a_recipe_are_one_run(tmp_path: Path, drpo: Any) -> None:
    for name in ("first", "second"):
        drpo("train", "--output", tmp_path / name, *sets(**SMALL))
    first, second = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_gsm8k_runs_grades_and_reports_with_the_built_in_model(tmp_path: Path, drpo: Any) -> None:
    rows = [
        {
            "question": f"Tom has {n} apples and buys {n + 2} more. How many apples has he now?",
            "answer": f"{n}+{n + 2}=<<{n}+{n + 2}={2 * n + 2}>>{2 * n + 2}\n#### {2 * n + 2}",
        }
        for n in range(3, 11)
    ]
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    recipe = FOLDER / "gsm8k.yaml"
    small = {**SMALL_GSM8K, "rollouts": 1, "max_completion_length": 16}
    drpo(
        "train",
        recipe,
        "--output",
        run,
        *sets(**small, **{"task.train": data, "task.heldout": data}),
    )
    sample = read_jsonl(run / "samples.jsonl")[0]
    assert sample["prompt"].startswith("Tom has 3 apples")
    assert sample["prompt"].endswith("#### answer")
    assert sample["reward"] in (0.0, 1.0)
    assert (run / "report.html").is_file()


CONVERSATIONAL = """
def graded(prompts, completions, completion_ids, answer, trainer_state, log_metric, **_):
    log_metric("prompts", len(prompts))
    assert trainer_state.global_step >= 0 and all(completion_ids)
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    said = [completion[0]["content"] for completion in completions]
    return [float(text.rpartition(",")[2].strip() == right) for text, right in zip(said, answer, strict=True)]

async def awaited(**columns):
    return graded(**columns)
"""


@pytest.mark.parametrize("function", ["graded", "awaited"])
def test_a_reward_of_conversations_is_asked_alike_by_the_trainer_the_doctor_and_evaluations(
    tmp_path: Path, drpo: Any, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    shutil.copytree(MODEL_PATH, tmp_path / "model")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    (tmp_path / "conversational.py").write_text(CONVERSATIONAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    reward = f"conversational:{function}"
    changes = sets(**SMALL, model="./model", reward=reward)
    drpo("doctor", *changes)
    drpo("train", "--output", "run", *changes)
    first, *_ = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert first["reward"] > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["accuracy_before"] > 0
    drpo("eval", "./run", "--data", "arithmetic", "--problems", "8", "--reward", reward, "--out", "mine")
    assert json.loads((tmp_path / "mine" / "evaluation.json").read_text())["average"]["mean"] > 0


def test_a_task_asks_without_the_chat_template_and_ends_at_its_stop_and_so_does_the_saved_model(
    tmp_path: Path, drpo: Any
) -> None:
    shutil.copytree(MODEL_PATH, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for message in messages %}{{ 1 / 0 }}{% endfor %}")
    run = tmp_path / "run"
    task = {"task.chat_template": "false", "task.stop": "','"}
    drpo("train", "--output", run, *sets(**SMALL, **task, model=tmp_path / "model", record_rollouts="true"))
    rows = read_jsonl(run / "rollouts.jsonl")
    # The comma is the last token, if any, and special from now on.
    assert any(row["text"][-1] == "," for row in rows)
    assert not any("," in row["text"][:-1] for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (None, ",")
    assert AutoModelForCausalLM.from_pretrained(run / "model").generation_config.eos_token_id == [
        tokenizer.eos_token_id
    ]


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_real_model_learns_to_add(tmp_path_factory: pytest.TempPathFactory, drpo: Any, seed: int) -> None:
    from drpo.evaluation.statistics import estimate

    model = tmp_path_factory.getbasetemp() / "smollm2"
    if not model.is_dir():
        script = Path(__file__).parents[1] / "scripts" / "smollm2.py"
        subprocess.run([sys.executable, script, model], check=True)
    run = tmp_path_factory.mktemp("real") / "run"
    drpo("train", "smollm2-addition", "--output", run, *sets(model=model, seed=seed))
    rows = read_jsonl(run / "evaluations.jsonl")
    # One completion a problem.
    before, *_, after = (estimate(row["correct"]) for row in rows)
    assert after["mean"] - before["mean"] >= 0.3
    assert after["low"] > before["high"]
    shutil.rmtree(run / "checkpoints")


def test_updates_in_which_nothing_has_a_gradient_are_rows_without_measurements(tmp_path: Path, drpo: Any) -> None:
    data, run = tmp_path / "unanswerable.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"question": f"{n}+1=", "answer": "#### x"}) + "\n" for n in range(20, 40)))
    recipe = FOLDER / "gsm8k.yaml"
    files = {"task.train": data, "task.heldout": data, "task.template": "'{prompt}'"}
    drpo(
        "train", recipe, "--output", run, *sets(**SMALL_GSM8K, **files, max_completion_length=4, reward="exact_answer")
    )
    first, *others = read_jsonl(run / "metrics.jsonl")
    # The first batch is audited as a whole; the others have nothing to train on.
    assert first["divergence/max"] > 0
    assert not any("divergence/mean" in row or sum(row["divergence_histogram"]) for row in others)
    assert {row["work/dropped_sequences"] for row in others} == {1.0}
    assert (run / "report.html").is_file()


def test_lora_ends_in_a_plain_model(tmp_path: Path, drpo: Any) -> None:
    run = tmp_path / "run"
    drpo("train", "--output", run, *sets(**SMALL, lora="{r: 4}", learning_rate=0.01))
    trained = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(MODEL_PATH).state_dict()
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[name], base[name]) for name in base)


def _without_clock(row: dict[str, Any]) -> dict[str, Any]:
    clock = ("step_time", "seconds")
    return {name: value for name, value in row.items() if name not in clock and not name.startswith("audit/logp")}
