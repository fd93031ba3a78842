"""drpo train --engine verl: a recipe as verl's configuration, and what is refused before anything is written."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hydra.utils import instantiate
from typer.testing import CliRunner

import drpo.integrations.verl
from drpo import recipes
from drpo.cli.main import app, main
from drpo.data.problems import MODEL_PATH
from drpo.errors import UserError
from drpo.files import read_jsonl
from drpo.integrations.verl.cpu.rollout import Server
from drpo.integrations.verl.cpu.settings import overrides as on_cpu
from drpo.integrations.verl.hydra import compose_main_ppo
from drpo.integrations.verl.overrides import _REFUSED, as_arguments, overrides
from drpo.integrations.verl.train import Log, plan
from drpo.objectives import PPO, SPO
from drpo.run.folder import RunFolder
from drpo.run.progress import Progress
from drpo.run.recipe import Recipe, load_recipe

FOLDER = Path("/runs, of (mine)/it's=1")

PAPER = Path(str(recipes.FOLDER)) / "verl"


def leaves(node: yaml.Node, path: str = "") -> list[tuple[str, int]]:
    """The settings in a node of YAML, with the numbers of their lines."""
    if not isinstance(node, yaml.MappingNode):
        return [(path, node.end_mark.line)]
    return [leaf for key, value in node.value for leaf in leaves(value, f"{path}.{key.value}".strip("."))]


@pytest.mark.parametrize("file", sorted(PAPER.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_value_of_the_paper_s_recipes_has_its_source_beside_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), yaml.compose(text)
    assert tree is not None
    # Where settings are composed from, what a run is called and the loss by which a file is named.
    free = ("hydra.", "defaults", "label", "trainer.project_name", "trainer.experiment_name")
    for setting, line in leaves(tree):
        if not setting.startswith(free) and not setting.endswith("loss_mode"):
            assert re.search(r" # \[(paper|code|verl|verl-recipe|ours)\]", lines[line]), f"{setting}: {lines[line]}"


def composed(*settings: str, more: tuple[str, ...] = ()) -> Any:
    """What verl's trainer would start with."""
    told = overrides(load_recipe(None, settings), FOLDER, train_rows=1000, prompt_length=40, plain=True)
    return compose_main_ppo(as_arguments(told, more), more)


def test_a_laptop_is_a_platform_of_verl() -> None:
    config = composed(more=tuple(on_cpu(workers=2)))
    assert (config.trainer.device, config.trainer.n_gpus_per_node) == ("cpu", 2)
    assert (config.actor_rollout_ref.rollout.name, config.ray_kwargs.ray_init.num_gpus) == ("transformers", 2)


def test_a_recipe_means_the_same_in_verl() -> None:
    config = composed("objective={name: spo, epsilon: 3.0}", "updates_per_rollout=2", "aggregation=seq-mean-token-mean")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (config.data.train_batch_size, rollout.n, actor.ppo_mini_batch_size) == (16, 8, 8)
    assert (actor.loss_agg_mode, actor.optim.lr, actor.optim.clip_grad) == ("seq-mean-token-mean", 5e-5, 1.0)
    assert (config.algorithm.adv_estimator, config.algorithm.norm_adv_by_std_in_grpo) == ("grpo", False)
    assert config.algorithm.rollout_correction.bypass_mode
    assert config.trainer.default_local_dir == str(FOLDER / "checkpoints")
    # 1,000 rows are 62 rollouts of 16 prompts and a rest.
    assert (config.trainer.total_training_steps, config.trainer.total_epochs) == (100, 2)
    assert instantiate(actor.policy_loss).make_objective() == SPO(epsilon=3.0)


def test_no_field_of_a_recipe_is_left_out() -> None:
    folder = Path(drpo.integrations.verl.__file__).parent
    source = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    read = {field for field in Recipe.model_fields if re.search(rf"recipe\.{field}\b", source)}
    # verl's workers make the reward from the recipe's file.
    assert {*read, *_REFUSED, "reward"} == {*Recipe.model_fields, "reward"}


def test_an_objective_anchored_on_the_old_policy_keeps_its_anchor_and_correction() -> None:
    config = composed("objective=ppo", "correction={name: token_mask, low: 0.5, high: 5.0}")
    correction = config.algorithm.rollout_correction
    assert (correction.bypass_mode, correction.rollout_is, correction.rollout_is_threshold) == (
        False,
        "token",
        "0.5_5.0",
    )
    assert instantiate(config.actor_rollout_ref.actor.policy_loss).make_objective() == PPO()
    assert composed("objective=ppo", "anchor=sampler").algorithm.rollout_correction.bypass_mode


@pytest.mark.parametrize(
    ("correction", "mode", "threshold"),
    [
        ("{name: sequence_mean_k3, delta: 0.04}", "seq_mean_k3", 0.04),
        ("{name: sequence_max_k3, delta: 0.3}", "seq_max_k3", 0.3),
        # Of r between 0.8 and 1.6; verl's k1 is of μ/π_old.
        ("{name: sequence_geometric, low: 0.8, high: 1.6}", "seq_mean_k1", "0.625_1.25"),
    ],
)
def test_a_mask_of_sequences_is_verl_s_rejection(correction: str, mode: str, threshold: Any) -> None:
    chosen = composed("objective=ppo", f"correction={correction}").algorithm.rollout_correction
    assert (chosen.rollout_is, chosen.rollout_rs, chosen.rollout_rs_threshold) == (None, mode, threshold)


def test_a_setting_of_verl_s_wins_over_the_recipe() -> None:
    config = composed(more=("trainer.n_gpus_per_node=4", "actor_rollout_ref.rollout.name=sglang"))
    assert (config.trainer.n_gpus_per_node, config.actor_rollout_ref.rollout.name) == (4, "sglang")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["updates_per_rollout=32", "micro_batch_size=4"], "updates_per_rollout: verl splits a rollout by prompts"),
        (["audit_threshold=0.1"], "audit_threshold: verl has no audit"),
        (["aggregation=prompt-mean"], "aggregation: verl has no prompt-mean"),
        (["train_precision=fp8"], "train_precision: verl trains in FP8 with Megatron alone; expected fp32 or bf16"),
        (["train_precision=fp16"], "train_precision: FP16 of verl's is not tried; expected fp32 or bf16"),
        (["rollout_lag=2"], "rollout_lag: verl's trainer decides how old"),
        (
            ["advantage=max-rl"],
            "advantage: verl has no max-rl; expected mean, mean-std, leave-one-out, length-weighted",
        ),
        (["reward_timeout=60"], "reward_timeout: verl calls rewards in workers of its own"),
        (["rollout_precision=int8"], "rollout_precision: verl's sampler has a dtype of its own"),
        (["record_rollouts=true"], "record_rollouts: verl has no log of trained tokens"),
        (["reward={name: overlong, limit: 20, buffer: 5}"], "reward: overlong needs the tokens of a completion"),
        (["stop_on_collapse=5"], "stop_on_collapse: verl's trainer runs to its end"),
        (["trainer.weight_decay=abc"], "trainer.weight_decay: got 'abc'; expected a number"),
        (["trainer.max_grad_norm=null"], "trainer.max_grad_norm: got None; expected a number"),
        (["trainer.wieght_decay=0.1"], "unknown option 'wieght_decay'; did you mean 'weight_decay'"),
        (["trainer.use_vllm=true"], "trainer.use_vllm: is an option of TRL's"),
        (["objective=drpo_topk"], "needs log-probs of the sampler's likeliest tokens"),
        (["objective=icepop"], "expected loss_mode ppo with"),
        (["objective=drpo", "anchor=old"], "takes its ratio against the sampler's"),
        (["objective=ppo", "correction=kpop"], "verl has no kpop"),
        (["objective=drpo", "correction=sequence_mean_k3"], "rollout_rs=seq_mean_k3 is not applied in bypass mode"),
    ],
)
def test_what_verl_would_not_do_as_the_recipe_says_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        composed(*settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "verk"], "--engine: unknown engine 'verk'; did you mean 'verl'?"),
        (["--verl", "trainer.nnodes=2"], "--verl trainer.nnodes=2: expected with --engine verl"),
        (["--engine", "verl", "--set", "objective=pdm"], "--engine verl: .*loss_mode=pdm needs log-probs"),
        (["--engine", "verl", "--set", "reward=no_such_module:reward"], "reward: cannot load 'no_such_module:reward'"),
        pytest.param(
            ["--engine", "verl"],
            "--engine verl: there is no GPU here and no Ray cluster.*expected .*--engine verl-cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
        (["--engine", "verl", "--verl", "trainer.logger=[console]"], r"trainer.logger=\['console'\]: leaves out file"),
        (["--engine", "verl", "--verl", "trainer.nonodes=2"], "--verl trainer.nonodes=2: does not compose"),
        (["--engine", "verl", "--verl", "trainer.nnodes"], "--verl trainer.nnodes: does not compose .*missing EQUAL"),
        (["--engine", "verl", "--verl", "trainer.nnodes=[2"], r"--verl trainer.nnodes=\[2: does not compose"),
        (
            ["--engine", "verl", "--verl", "trainer.nnodes=two"],
            "--engine verl: trainer.nnodes is two; expected a whole",
        ),
        (
            ["--engine", "verl", "--verl", "actor_rollout_ref.rollout.top_p=0.9"],
            "top_p=0.9: samples come from a filtered distribution.*; expected actor_rollout_ref.rollout.top_p=1$",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["drpo", "train", "--output", str(tmp_path / "run"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_outlives_a_mistake_in_what_should_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(load_recipe(None, []))
    folder.summary.write_text("{}")
    monkeypatch.setattr(
        "sys.argv",
        ["drpo", "train", "--output", str(folder), "--overwrite", "--engine=verl", "--verl=trainer.nonodes=2"],
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert folder.summary.is_file()


def test_the_longest_prompt_may_be_a_held_out_one(tmp_path: Path) -> None:
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text(json.dumps({"prompt": "1+1+1+1+1+1+1+1+1+1+1+1+1+1+1=", "answer": "15"}) + "\n")
    planned = plan(load_recipe(None, [f"task.heldout={held_out}"]), RunFolder(tmp_path / "run"))
    assert "data.max_prompt_length=30" in planned.arguments
    assert planned.config.data.max_prompt_length == 30


def test_what_a_chat_template_puts_around_a_prompt_is_counted(tmp_path: Path) -> None:
    shutil.copytree(MODEL_PATH, tmp_path / "model")
    system = "1+1=" * 50
    (tmp_path / "model" / "chat_template.jinja").write_text(system + "{{ messages[0].content }}<eos>")
    given = {"plain": load_recipe(None), "chat": load_recipe(None, [f"model={tmp_path / 'model'}"])}
    length = {
        name: plan(recipe, RunFolder(tmp_path / name)).config.data.max_prompt_length for name, recipe in given.items()
    }
    assert length["chat"] == length["plain"] + len(system) + 1


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1), (signal.SIGKILL, -9)], ids=lambda value: str(value)
)
def test_verl_does_not_outlive_who_started_it(tmp_path: Path, heard: None, number: int, code: int) -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    parent = f"""
import sys
from drpo.integrations.verl.train import run_to_its_end
with open({str(tmp_path / "output")!r}, "wb") as output:
    run_to_its_end([sys.executable, "-c", {child!r}], {{}}, output, lambda: None)
"""
    with subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (tmp_path / "output").is_file() or not (pid := (tmp_path / "output").read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        # Python ends by SIGINT itself where nobody catches KeyboardInterrupt.
        assert process.wait(300) in (code, -number)
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def begun_in_verl(folder: RunFolder, *settings: str, checkpoint: int | None = None) -> None:
    """A run folder as a run in verl leaves it that has been killed."""
    folder.create(load_recipe(None, ["rollouts=8"]), verl_settings=list(settings))
    if checkpoint is not None:
        (folder.checkpoints / f"global_step_{checkpoint}").mkdir(parents=True)
        (folder.checkpoints / "latest_checkpointed_iteration.txt").write_text(str(checkpoint))


def test_a_run_goes_on_from_verl_s_last_whole_checkpoint_with_the_settings_it_was_given(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    begun_in_verl(folder, "trainer.nnodes=2", "trainer.n_gpus_per_node=8", checkpoint=4)
    # One that was being written when the run ended.
    (folder.checkpoints / "global_step_6").mkdir()
    planned = plan(folder.check_resumable(), folder, ["trainer.nnodes=4"], resume=True)
    assert planned.checkpoint == folder.checkpoints / "global_step_4"
    trainer = planned.config.trainer
    assert (trainer.resume_mode, trainer.nnodes, trainer.n_gpus_per_node) == ("auto", 4, 8)


def test_a_new_run_takes_up_no_checkpoint_of_another(tmp_path: Path) -> None:
    settings = [f"trainer.default_local_dir={tmp_path}"]
    assert plan(load_recipe(None), RunFolder(tmp_path / "run"), settings).config.trainer.resume_mode == "disable"


@pytest.mark.parametrize(
    ("checkpoint", "more", "message"),
    [
        (None, [], "verl's trainer has finished no checkpoint in .*checkpoints .it saves one every 25 rollouts"),
        (4, ["trainer.default_local_dir=elsewhere"], "verl's trainer has finished no checkpoint in elsewhere"),
        (
            4,
            ["trainer.resume_mode=resume_path", "trainer.resume_from_path=global_step_2"],
            "global_step_2 is not there; expected",
        ),
    ],
)
def test_where_there_is_nothing_to_go_on_from_nobody_is_told_to_overwrite(
    tmp_path: Path, checkpoint: int | None, more: list[str], message: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    begun_in_verl(folder, checkpoint=checkpoint)
    with pytest.raises(UserError, match=message) as error:
        plan(folder.check_resumable(), folder, more, resume=True)
    assert "overwrite" not in str(error.value)


def logged(rollout: int, **more: float) -> str:
    data = {"actor/grad_norm": 0.5, "timing_s/step": 2.0, "critic/score/mean": rollout / 10, **more}
    return json.dumps({"step": rollout, "data": data}) + "\n"


def test_rows_are_written_as_verl_logs_them(tmp_path: Path) -> None:
    folder, recipe = RunFolder(tmp_path / "run"), load_recipe(None, ["updates_per_rollout=4"])
    begun_in_verl(folder)
    (folder.path / "verl" / "validation").mkdir(parents=True)
    sample = {"input": "1+1=", "gts": "2", "output": "2", "score": 1.0}
    (folder.path / "verl" / "validation" / "2.jsonl").write_text(json.dumps(sample) + "\n")
    with Progress(32, 4, show=False) as progress, (folder.path / "verl" / "log.jsonl").open("w") as file:
        log = Log(recipe, folder, progress)
        file.write(logged(1) + logged(2)[:20])
        file.flush()
        log.take()
        assert [row["update"] for row in read_jsonl(folder.metrics)] == [4]
        file.write(logged(2)[20:])
        file.flush()
        log.take()
        log.take()
        # What a killed process has written is not written again by the one that goes on.
        Log(recipe, folder, progress).take()
    assert [(row["update"], row["seconds"], row["reward"]) for row in read_jsonl(folder.metrics)] == [
        (4, 2.0, 0.1),
        (8, 4.0, 0.2),
    ]
    assert [(row["rollout"], row["accuracy"]) for row in read_jsonl(folder.evaluations)] == [(2, 1.0)]


def test_problems_become_rows_of_verl_s(tmp_path: Path) -> None:
    out = tmp_path / "verl" / "train.jsonl"
    done = CliRunner().invoke(app, ["data", "verl", "arithmetic", "--problems", "3", "--out", str(out)])
    assert done.exit_code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["extra_info"]["index"] for row in rows] == [0, 1, 2]
    assert rows[0]["prompt"][0]["role"] == "user"
    assert rows[0]["reward_model"]["ground_truth"].lstrip("-").isdecimal()
    table = tmp_path / "verl" / "train.parquet"
    assert (
        CliRunner().invoke(app, ["data", "verl", "arithmetic", "--problems", "3", "--out", str(table)]).exit_code == 0
    )
    assert pq.read_table(table).to_pylist() == rows


def test_the_sampler_on_a_cpu_ends_at_any_of_the_model_s_ends() -> None:
    server = Server.__ray_metadata__.modified_class
    sampler = server.__new__(server)
    sampler._ends = {1, 2}
    assert [sampler._until_end(ids) for ids in ([5, 2, 0, 0], [5, 1, 2], [5, 6])] == [[5, 2], [5, 1], [5, 6]]
