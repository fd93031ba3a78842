"""Two processes on CPU (gloo), as ``accelerate launch`` starts them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support import fsdp, rollouts

ACCELERATE = str(Path(sys.executable).with_name("accelerate"))


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # accelerate starts several processes only in its multi_gpu mode; ACCELERATE_USE_CPU puts them on the CPU.
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    return subprocess.run(
        [ACCELERATE, "launch", *options, f"--main_process_port={port}", *command],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"aggregation": "token-mean"},
        {"aggregation": "seq-mean-token-mean", "objective": "dppo_tv"},
        # In the second update groups without an advantage are dropped; then ranks have unequal work.
        {"aggregation": "token-mean", "max_steps": 2, "tokens_per_micro_batch": 100},
    ],
    ids=["token-mean", "seq-mean-token-mean", "dropped"],
)
def test_two_ranks_with_uneven_lengths_give_the_gradient_of_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    split = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, **settings}
    target = tmp_path / "gradient.safetensors"
    done = launch(rollouts.__file__, str(target), json.dumps(split))
    assert done.returncode == 0, done.stderr[-3000:]
    # The audit spans both ranks, so there really were two.
    assert "Audit of 683 sampled tokens" in done.stdout
    assert ("Dropped: 0.000" in done.stdout) == ("max_steps" not in settings)
    two = load_file(target)
    plain = {"drop_zero_advantage": False, "tokens_per_micro_batch": None}
    one = rollouts.gradient_of_one_update(tmp_path / "one", per_device_train_batch_size=64, **{**settings, **plain})
    difference = torch.cat([(two[name] - one[name]).flatten() for name in one])
    assert two.keys() == one.keys()
    assert difference.norm() <= 1e-6 * torch.cat([g.flatten() for g in one.values()]).norm()


@pytest.mark.parametrize("head", ["apart", "with the rest"])
def test_a_head_that_fsdp_has_sharded_gets_the_gradient_of_all_ranks(head: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", fsdp.__file__, head],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("objective", ["drpo", "drpo_topk"])
def test_a_recipe_trains_and_reports(tmp_path: Path, objective: str) -> None:
    small = [
        f"objective={objective}",
        "rollouts=2",
        "heldout_problems=6",
        "heldout_samples=1",
        "prompts_per_rollout=4",
        "evaluate_every=1",
    ]
    sets = [argument for assignment in small for argument in ("--set", assignment)]
    done = launch("-m", "drpo", "train", "--output", str(tmp_path / "run"), *sets)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert summary["updates"] == 8
    # 4 prompts of 8 completions, about 26 tokens each: the recipe's rollout, not one for each process.
    assert 500 < first["num_tokens"] < 1200
    assert [row["completions"] for row in evaluations] == [6, 6, 6]
    assert (tmp_path / "run" / "report.html").is_file()
    shutil.rmtree(tmp_path / "run")
