"""Whole runs of verl's trainer on a CPU, in real Ray."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
import torch

from drpo import TokenBatch
from drpo.data.problems import BUILTIN_MODELS, builtin_problems
from drpo.files import read_jsonl
from drpo.integrations.verl.cpu.settings import PLUGIN, environment, overrides
from drpo.metrics import TrustRegionMetrics
from drpo.objectives import DRPO
from drpo.recipes import FOLDER
from drpo.report.read import read_run
from drpo.run.folder import RunFolder

pytestmark = pytest.mark.long
RECIPE = FOLDER / "arithmetic.yaml"


def on_the_builtin_task(folder: Path, rollouts: int) -> list[str]:
    """Overrides: 16 prompts x 8 samples a rollout, 4 updates; evaluated first and last, as it samples."""
    from drpo.integrations.verl.problems import write_rows

    write_rows(builtin_problems("train", 2000, seed=0), folder / "train.jsonl", "arithmetic")
    write_rows(builtin_problems("heldout", 400, seed=0), folder / "heldout.jsonl", "arithmetic")
    return [
        f"data.train_files={folder}/train.jsonl",
        f"data.val_files={folder}/heldout.jsonl",
        "data.train_batch_size=16",
        "data.max_prompt_length=32",
        "data.max_response_length=20",
        f"actor_rollout_ref.model.path={BUILTIN_MODELS['arithmetic']}",
        "actor_rollout_ref.model.custom_chat_template='{{ messages[0].content }}'",
        "actor_rollout_ref.rollout.n=8",
        "actor_rollout_ref.rollout.val_kwargs.do_sample=true",
        "actor_rollout_ref.rollout.val_kwargs.temperature=1.0",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.optim.lr=1e-4",
        "algorithm.adv_estimator=grpo",
        "algorithm.norm_adv_by_std_in_grpo=false",
        "reward.custom_reward_function.path=pkg://drpo.integrations.verl.reward",
        f"+reward.custom_reward_function.reward_kwargs.recipe={RECIPE}",
        "trainer.logger=[console,file]",
        f"trainer.total_training_steps={rollouts}",
        "trainer.test_freq=1000",
        f"trainer.default_local_dir={folder}/checkpoints",
        f"hydra.run.dir={folder}/hydra",
    ]


def run(folder: Path, *more: str, variables: Mapping[str, str] = MappingProxyType({})) -> list[dict[str, float]]:
    """What ``main_ppo`` logged, a row a rollout."""
    log = folder / "log.jsonl"
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *more]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment() | {"VERL_FILE_LOGGER_PATH": str(log)} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line)["data"] for line in log.read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_drpo_learns_in_verl_s_trainer(tmp_path: Path, workers: int) -> None:
    rows = run(
        tmp_path,
        *on_the_builtin_task(tmp_path, rollouts=40),
        *overrides(workers),
        "hydra.searchpath=[pkg://drpo.integrations.verl.configs]",
        "+drpo=loss",
        "actor_rollout_ref.actor.policy_loss.loss_mode=drpo",
        "+actor_rollout_ref.actor.policy_loss.hyperparameters.delta=0.2",
    )
    accuracy = [row["val-core/arithmetic/acc/mean@1"] for row in rows if "val-core/arithmetic/acc/mean@1" in row]
    print(f"{workers} workers: held-out accuracy {accuracy}")
    assert accuracy[0] <= 0.4
    assert accuracy[-1] >= 0.8
    trained = [row for row in rows if "actor/divergence/mean" in row]
    assert len(trained) == 40
    assert all(0 < row["actor/divergence/mean"] <= row["actor/divergence/max"] < 1 for row in trained)
    # 1 ± 1/delta is what the weight stays within.
    assert all(-4 <= row["actor/weight/mean"] <= 6 for row in trained)


def test_what_two_workers_log_is_what_all_tokens_measure(tmp_path: Path) -> None:
    (dump := tmp_path / "dump").mkdir()
    rows = run(
        tmp_path,
        *on_the_builtin_task(tmp_path, rollouts=2),
        *overrides(workers=2),
        "hydra.searchpath=[pkg://drpo.integrations.verl.configs]",
        "+drpo=loss",
        "++actor_rollout_ref.actor.policy_loss.hyperparameters.delta=0.2",
        "actor_rollout_ref.actor.policy_loss.histograms=true",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        variables={
            "VERL_USE_EXTERNAL_MODULES": f"{PLUGIN},support.verl_dump",
            "PYTHONPATH": str(Path(__file__).parent),
            "DUMP": str(dump),
        },
    )
    trained = [row for row in rows if "actor/divergence/mean" in row]
    # 64 sequences a rank and rollout in four updates of two micro-batches.
    calls = [[torch.load(path) for path in sorted(dump.glob(f"{rank}-*.pt"))] for rank in range(2)]
    assert [len(of_rank) for of_rank in calls] == [16, 16]
    for rollout, row in enumerate(trained):
        by_update = [[of_rank[8 * rollout + 2 * update :][:2] for of_rank in calls] for update in range(4)]
        expected = [measure_update(of_ranks) for of_ranks in by_update]
        for name in expected[0]:
            values = [update[name] for update in expected]
            value = max(values) if "max" in name else sum(values) / len(values)
            assert row[f"actor/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-7), name
        tokens = sum(int(call["response_mask"].sum()) for update in by_update for rank in update for call in rank)
        counts = [value for name, value in row.items() if name.startswith("actor/divergence_histogram/")]
        assert round(4 * sum(counts)) == tokens
    lengths = [sum(int(call["response_mask"].sum()) for call in of_rank[:2]) for of_rank in calls]
    assert lengths[0] != lengths[1], "ranks have as many tokens, and a mean over ranks would do"


def measure_update(of_ranks: list[list[dict[str, torch.Tensor]]]) -> dict[str, float]:
    """Every metric of an update: means over all tokens and maxima of all, and of the others the mean of the ranks' own."""
    per_rank = []
    for calls in of_ranks:
        measured = TrustRegionMetrics(by_group=False)
        for call in calls:
            tokens = TokenBatch(call["log_prob"], call["old_log_prob"], call["advantages"], call["response_mask"])
            measured.update(tokens, DRPO(delta=0.2).gradient_weight(tokens))
        per_rank.append(measured.compute().scalars)
    names = sorted(set.union(*(set(scalars) for scalars in per_rank)))
    expected = {name: sum(scalars.get(name, 0.0) for scalars in per_rank) / len(per_rank) for name in names}
    every = [call for calls in of_ranks for call in calls]
    logp, behavior_logp = (
        torch.cat([call[name].double()[call["response_mask"].bool()] for call in every])
        for name in ("log_prob", "old_log_prob")
    )
    log_ratio, distance = logp - behavior_logp, (logp.exp() - behavior_logp.exp()).abs()
    return expected | {
        "ratio/mean": log_ratio.exp().mean().item(),
        "ratio/max": log_ratio.exp().max().item(),
        "divergence/mean": distance.mean().item(),
        "divergence/max": distance.max().item(),
        "kl/k1": -log_ratio.mean().item(),
        "kl/k3": (log_ratio.expm1() - log_ratio).mean().item(),
        "chi_squared": log_ratio.expm1().square().mean().item(),
    }


def test_drpo_train_runs_a_recipe_in_verl_and_the_report_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = ["--set=rollouts=4", "--set=evaluate_every=2", "--set=checkpoint_every=2", "--set=heldout_problems=40"]
    command = [sys.executable, "-m", "drpo", "train", "--engine=verl-cpu", *recipe, f"--output={folder}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    log = folder / "verl" / "output.log"
    assert done.returncode == 0, done.stderr[-2000:] + (log.read_text()[-3000:] if log.is_file() else "")
    run = read_run(RunFolder(folder))
    assert [row["update"] for row in run.metrics] == [4, 8, 12, 16]
    assert [row["rollout"] for row in run.evaluations] == [0, 2, 4]
    assert run.evaluations[0]["completions"] == 40 * 4
    assert run.summary["rollouts"] == 4
    assert {"verl", "ray"} <= set(run.info["engine"])
    # Without a terminal a line a rollout.
    assert [f"rollout {rollout}/4" in done.stderr + done.stdout for rollout in range(1, 5)] == [True] * 4
    # As many tokens as were sampled, of which 128 sequences have two at least.
    assert all(sum(row["divergence_histogram"]) > 2 * 128 for row in run.metrics)
    assert 0 < run.metrics[-1]["divergence/p99"] < 1
    assert (folder / "model" / "model.safetensors").is_file()
    assert "Gradient weights" in (folder / "report.html").read_text()


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """``drpo train`` of four rollouts with a checkpoint each, in verl on this machine's CPU."""
    recipe = ["--set=rollouts=4", "--set=evaluate_every=2", "--set=checkpoint_every=1", "--set=heldout_problems=40"]
    command = [sys.executable, "-m", "drpo", "train", "--engine=verl-cpu", *recipe, f"--output={folder}", *arguments]
    return subprocess.Popen(command, cwd=folder.parent, stderr=subprocess.PIPE)


def processes_of(folder: Path) -> list[str]:
    """Command lines of those that write to a run folder, and of those that a run's Ray has."""
    lines = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        if str(folder) in " ".join(process.info["cmdline"] or []) + (process.info["environ"] or {}).get(
            "VERL_FILE_LOGGER_PATH", ""
        ):
            lines.append(" ".join(process.info["cmdline"]))
    return lines


def find_process(folder: Path, whose: str) -> psutil.Process:
    """verl's own driver of a run, or the Ray worker that trains in it."""
    driver = next(
        p for p in psutil.process_iter(["cmdline"]) if {"verl.trainer.main_ppo"} <= set(p.info["cmdline"] or [])
    )
    assert str(folder) in " ".join(driver.cmdline())
    if whose == "driver":
        return driver
    return next(p for p in psutil.process_iter(["cmdline"]) if "WorkerDict" in " ".join(p.info["cmdline"] or []))


@pytest.mark.parametrize(
    ("whose", "number", "code"),
    [
        ("own", signal.SIGKILL, -9),
        ("own", signal.SIGTERM, 143),
        ("own", signal.SIGINT, 130),
        ("driver", signal.SIGKILL, 1),
        ("worker", signal.SIGKILL, 1),
    ],
)
def test_a_run_in_verl_that_is_ended_leaves_its_rows_and_nothing_running_and_goes_on(
    tmp_path: Path, heard: None, whose: str, number: int, code: int
) -> None:
    folder = RunFolder(tmp_path / "run")
    process = start(folder.path)
    while len(read_jsonl(folder.metrics)) < 2:
        assert process.poll() is None
        time.sleep(0.2)
    (process if whose == "own" else find_process(folder.path, whose)).send_signal(number)
    _, said = process.communicate(timeout=90)
    assert process.returncode == code
    assert number == signal.SIGKILL or b"to go on: drpo train --resume" in said
    assert whose == "own" or b"verl stopped with exit code" in said
    assert [row["rollout"] for row in read_jsonl(folder.metrics)][:2] == [1, 2]
    ended = time.monotonic()
    while left := processes_of(folder.path):
        assert time.monotonic() < ended + 30, left
        time.sleep(0.5)
    again = [sys.executable, "-m", "drpo", "train", "--resume", f"--output={folder}"]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["rollout"] for row in read_jsonl(folder.metrics)] == [1, 2, 3, 4]
    assert [row["rollout"] for row in read_jsonl(folder.evaluations)] == [0, 2, 4]
    assert "Resuming from" in (folder.path / "verl" / "output.log").read_text()
