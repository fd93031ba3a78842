"""With the network blocked, nothing that can do without it tries a connection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from drpo.data.problems import builtin_problems
from support.model_folder import here  # noqa: F401

BLOCKED = """
import socket, sys
tried = []
def refuse(*arguments, **options):
    tried.append(arguments)
    raise OSError("the network is blocked")
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, refuse)
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
"""

COMMANDS = """
import json
from drpo.cli.main import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["drpo", *command]
    try:
        main()
    except SystemExit as end:
        print(json.dumps([end.code or 0, command, len(tried)]), file=sys.stderr)
"""

PYTHON = """
import drpo
from datasets import Dataset
from drpo import DRPOConfig, DRPOTrainer
from drpo.data.problems import MODEL_PATH, builtin_problems
from drpo.rewards import exact_answer
args = DRPOConfig(
    "run", bf16=False, max_completion_length=8, max_steps=2, updates_per_rollout=2, per_device_train_batch_size=8,
    num_generations=4, report_to="none", use_cpu=True, save_steps=2,
)
problems = Dataset.from_list([vars(problem) for problem in builtin_problems("train", 16, seed=0)])
trainer = DRPOTrainer(model=str(MODEL_PATH), reward_funcs=exact_answer, args=args, train_dataset=problems)
trainer.train()
trainer.save_model("model")
import time
time.sleep(1)  # telemetry has a thread of its own
print("tried", tried)
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Neither the tests' own settings nor CI's keep libraries quiet here.
    unset = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CI")
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + program, *arguments],
        env={name: value for name, value in os.environ.items() if name not in unset},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_trainer_in_python_tries_no_connection(here: Path) -> None:  # noqa: F811
    done = run(PYTHON)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "tried []"


def test_no_offline_command_tries_a_connection(here: Path) -> None:  # noqa: F811
    (here / "gsm8k.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    (here / "one.jsonl").write_text(json.dumps(vars(builtin_problems("heldout", 1, seed=0)[0])) + "\n")
    row = {"logp": [-1.0], "behavior_logp": [-1.0], "advantage": 1.0}
    (here / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    small = (
        "rollouts=1",
        "prompts_per_rollout=4",
        "heldout_problems=2",
        "checkpoint_every=1",
        "task.train=train.jsonl",
    )
    settings = [part for field in small for part in ("--set", field)]
    sampled = ["--data", "one.jsonl", "--reward", "exact_answer", "--max-tokens", "20"]
    commands = [
        ["train", *settings, "--set", "model=model", "--output", "run"],
        ["train", "--set", "task.train=missing.jsonl"],
        ["report", "run"],
        ["eval", "run", *sampled, "--out", "first"],
        ["eval", "arithmetic", *sampled, "--out", "second"],
        ["compare", "first", "second"],
        ["data", "gsm8k", "--from", "gsm8k.jsonl"],
        ["data", "filter", "one.jsonl", "--model", "model", "--out", "kept.jsonl", "--reward", "exact_answer", "--samples", "2"],
        ["data", "verl", "train.jsonl", "--out", "verl.jsonl"],
        ["inspect", "rollouts.jsonl"],
        ["doctor", "--set", "model=model"],
        ["objectives"],
        ["weights", "drpo", "--output", "weights.svg"],
        ["lab", "presets"],
        ["--version"],
        ["--help"],
    ]  # fmt: skip
    done = run(COMMANDS, json.dumps(commands))
    # The doctor takes standard output, so that what follows its findings is on standard error.
    ends = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[") and '"' in line]
    assert [(command, code, tried) for code, command, tried in ends] == [
        (command, 2 if "task.train=missing.jsonl" in command else 0, 0) for command in commands
    ], done.stderr
