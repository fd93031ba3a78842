"""A run that is killed at random moments and resumed, by forked processes: imports and the model are paid for once.

python killed.py FOLDER KILLS '{"rollout_lag": 4, "ranks": 2, "signal": 15, ...}' prints a JSON row a kill, {"update": ..., "where": ..., "same": ...},
and exits with 1 if a resumed run did not end with the bytes of the uninterrupted one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from drpo.data.problems import builtin_problems
from drpo.trainer.checkpoint import checkpoints_in, newest_checkpoint
from drpo.trainer.trainer import DRPOTrainer
from support.rollouts import Dataset, load_model, make_trainer

# A forked process has none of OpenMP's threads.
torch.set_num_threads(1)

LAST = 24
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "updates_per_rollout": 4,
    "max_steps": LAST,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 3,
    "audit_threshold": 100.0,
    "disable_dropout": False,
}
PROBLEMS = Dataset.from_list([vars(problem) for problem in builtin_problems("train", 32, seed=0)])


def make(folder: Path, settings: dict[str, Any]) -> DRPOTrainer:
    model, _ = load_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    more = dict(settings)
    if more.pop("lora", False):
        from peft import LoraConfig

        torch.manual_seed(0)
        more["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return make_trainer(folder, PROBLEMS, **{"model": model, **SETTINGS, **more})


def start(folder: Path, settings: dict[str, Any]) -> list[int]:
    """The processes, one a rank, of a run that goes on from its newest checkpoint, or begins."""
    ranks = settings.get("ranks", 1)
    more = {name: value for name, value in settings.items() if name not in ("ranks", "signal")}
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                sys.stdout = sys.stderr = open(folder.with_suffix(".log"), "a", encoding="utf-8")  # noqa: SIM115
                if ranks > 1:
                    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                    os.environ |= {name: str(value) for name, value in place.items()}
                    os.environ |= {"MASTER_ADDR": "localhost", "ACCELERATE_USE_CPU": "true"}
                make(folder, more).train(resume_from_checkpoint=newest_checkpoint(folder) is not None)
                code = 0
            except SystemExit as stopped:
                code = stopped.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
    return pids


def kill(pids: list[int], folder: Path, rng: random.Random, seconds: float, number: int) -> str:
    """End a run at a random moment, every third time while a checkpoint is being written; says where."""
    # Before training begins SIGTERM ends a process as any other.
    deadline = time.monotonic() + rng.uniform(0.5 if number == signal.SIGTERM else 0.05, 1.0) * seconds
    in_a_save = rng.random() < 1 / 3
    while time.monotonic() < deadline or (in_a_save and not (folder / ".unfinished").exists()):
        if os.waitpid(pids[0], os.WNOHANG)[0]:
            for pid in pids[1:]:
                os.waitpid(pid, 0)
            return "end"
        time.sleep(0.0005)
    if in_a_save:
        time.sleep(rng.uniform(0, 0.01))
    if number == signal.SIGTERM:
        # To one rank: all of them end, 143 if training had begun by then.
        os.kill(rng.choice(pids), number)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if codes != [128 + number] * len(pids):
            raise SystemExit(f"exit codes {codes} after SIGTERM; see {folder.with_suffix('.log')}")
        return "signal"
    # A launcher kills the other ranks when one is gone.
    for pid in rng.sample(pids, len(pids)):
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    return "save" if (folder / ".unfinished").exists() else "elsewhere"


def end_state(folder: Path) -> dict[str, bytes]:
    """What a run ended with: weights, optimizer and schedule, random numbers and counters."""
    last = folder / f"checkpoint-{LAST}"
    return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def run(folder: Path, settings: dict[str, Any]) -> float:
    """Let a run come to its end, and say how long it took."""
    started = time.monotonic()
    codes = [os.waitpid(pid, 0)[1] for pid in start(folder, settings)]
    if any(codes):
        raise SystemExit(f"a run failed; see {folder.with_suffix('.log')}")
    return time.monotonic() - started


def main(root: Path, kills: int, settings: dict[str, Any]) -> int:
    root.mkdir(parents=True, exist_ok=True)
    whole = root / "whole"
    seconds = run(whole, settings)
    expected = end_state(whole)
    rng = random.Random(0)
    number = settings.get("signal", signal.SIGKILL)
    is_same = True
    killed = attempt = 0
    while killed < kills:
        folder = root / f"killed-{attempt}"
        attempt += 1
        # One run is killed twice, another once: kill, resume, kill, resume.
        for _ in range(rng.choice((1, 2))):
            where = kill(start(folder, settings), folder, rng, seconds, number)
            if where == "end":
                break
            killed += 1
            newest = max((int(path.name.split("-")[1]) for path in checkpoints_in(folder)), default=0)
            print(json.dumps({"killed": killed, "where": where, "checkpoint": newest}), flush=True)
        run(folder, settings)
        same = end_state(folder) == expected
        print(json.dumps({"run": folder.name, "same": same}), flush=True)
        is_same &= same
        shutil.rmtree(folder)
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])))
