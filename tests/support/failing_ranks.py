"""Two ranks that train, one of which fails or differs: ``torchrun --nproc-per-node=2 failing_ranks.py FOLDER RANK FAILURE...``.

Of several failures, each on either rank, ``FOLDER/rank-N.json`` says what came of them; one alone ends the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from drpo.data.problems import builtin_problems
from drpo.errors import RewardError
from support.rollouts import make_trainer

RANK = int(os.environ.get("RANK", "0"))


def launch(folder: Path, *failures: str, rank: int = 0) -> tuple[subprocess.CompletedProcess[str], float]:
    """Train; the finished process, and the seconds from the last failure to its end."""
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(__file__, str(folder), str(rank), *failures),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return finished, time.time() - (folder / "failed").stat().st_mtime


def fail(failure: str, log_metric: Any) -> Any:
    if failure == "raises":
        raise ValueError("no judge")
    if failure == "exits":
        sys.exit(0)
    if failure == "exits at once":
        os._exit(0)
    if failure == "hangs":
        time.sleep(600)
    if failure == "hangs in threads":
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(time.sleep, [10] * 2))
    while failure == "catches all":
        with suppress(BaseException):
            time.sleep(600)
    if failure == "other metrics":
        log_metric("of one rank", 1.0)
    return [1.0] if failure == "returns too few" else None


def train(folder: Path, failure: str, rank: int) -> dict[str, Any]:
    """What is logged of two updates."""

    def own(completions: list[str], log_metric: Any, **_: Any) -> Any:
        scores = None
        if rank == RANK:
            (folder / "failed").touch()
            scores = fail(failure, log_metric)
        return scores or [float(index % 2) for index, _ in enumerate(completions)]

    problems = Dataset.from_list([vars(problem) for problem in builtin_problems("train", 32, seed=0)])
    trainer = make_trainer(folder, problems, reward_funcs=own, reward_timeout=2.0, mask_truncated_completions=True)
    if failure == "no tokens" and rank == RANK:
        generate = trainer._generate_single_turn

        def truncated(*args: Any, **kwargs: Any) -> Any:
            """Completions that do not end, and are masked."""
            completion_ids, log_probs = generate(*args, **kwargs)
            return [
                [5 if token in trainer.eos_token_ids else token for token in ids] for ids in completion_ids
            ], log_probs

        trainer._generate_single_turn = truncated
    trainer.train()
    return {**trainer.state.log_history[0], **trainer.state.log_history[1]}


def outcome(folder: Path, failure: str, rank: int) -> dict[str, Any]:
    started = time.monotonic()
    try:
        result: dict[str, Any] = {"log": train(folder, failure, rank)}
    except RewardError as error:
        result = {"error": str(error)}
    return {**result, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    folder, rank, failures = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if len(failures) == 1:
        train(folder, failures[0], rank)
    else:
        results = {
            f"{failure} on rank {rank}": outcome(folder, failure, rank) for failure in failures for rank in (0, 1)
        }
        (folder / f"rank-{RANK}.json").write_text(json.dumps(results))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
