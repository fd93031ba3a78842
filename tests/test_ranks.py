"""Two processes on CPU (gloo), as ``accelerate launch`` starts them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from support import ranks, rollouts

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


SETTINGS: dict[str, dict[str, Any]] = {
    "token-mean": {"aggregation": "token-mean"},
    "seq-mean-token-mean": {"aggregation": "seq-mean-token-mean", "objective": "dppo_tv"},
    "update-level": {"objective": "kl_cov", "objective_kwargs": {"share": 0.2}, "anchor": "sampler"},
    # In the second update groups without an advantage are dropped; then ranks have unequal work.
    "dropped": {"aggregation": "token-mean", "max_steps": 2, "tokens_per_micro_batch": 100},
}


def test_two_ranks_with_uneven_lengths_give_the_gradient_of_one(tmp_path: Path) -> None:
    split = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    split_settings = {name: {**split, **settings} for name, settings in SETTINGS.items()}
    dynamic = {"dynamic": {**split, "max_steps": 2, "dynamic_sampling_rounds": 9}}
    finished = launch(rollouts.__file__, str(tmp_path), json.dumps(split_settings | dynamic))
    assert finished.returncode == 0, finished.stderr[-3000:]
    # The audits span both ranks, so there really were two.
    dropped = re.findall(r"Audited (\d+) tokens, dropped ([\d.]+)", finished.stdout)[::2]
    assert [tokens == "683" for tokens, _ in dropped] == [True, True, True, True, False]
    # Where other groups take the places of those without an advantage, none is left to drop.
    assert [share == "0.000" for _, share in dropped] == [True, True, True, False, True]
    for name, settings in SETTINGS.items():
        plain = {"drop_zero_advantage": False, "share_prompts": False, "tokens_per_micro_batch": None}
        one = rollouts.gradient_of_one_update(tmp_path / "one", per_device_train_batch_size=64, **{**settings, **plain})
        two = load_file(tmp_path / f"{name}.safetensors")
        assert two.keys() == one.keys()
        expected, actual = rollouts.flat(one), rollouts.flat(two)
        assert (actual - expected).norm() <= 1e-6 * expected.norm(), name


def test_two_ranks_call_together_and_share_a_head_s_gradient() -> None:
    """Where they do not call a collective equally often, they wait for ever."""
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ranks.__file__],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_a_recipe_trains_and_reports(tmp_path: Path) -> None:
    small = [
        "objective=drpo_topk",
        "rollouts=2",
        "heldout_problems=6",
        "heldout_samples=1",
        "prompts_per_rollout=4",
        "evaluate_every=1",
    ]
    sets = [argument for assignment in small for argument in ("--set", assignment)]
    finished = launch("-m", "drpo", "train", "--output", str(tmp_path / "run"), *sets)
    assert finished.returncode == 0, finished.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert summary["updates"] == 8
    # 4 prompts of 8 completions, about 26 tokens each: the recipe's rollout, not one for each process.
    assert 500 < first["num_tokens"] < 1200
    assert [row["completions"] for row in evaluations] == [6, 6, 6]
    assert (tmp_path / "run" / "report.html").is_file()
    shutil.rmtree(tmp_path / "run")
