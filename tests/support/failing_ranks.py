"""Two ranks of a training run, one of which fails or differs: ``torchrun --nproc-per-node=2 failing_ranks.py FOLDER FAILURE RANK``."""

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

from datasets import Dataset

from drpo.data.problems import builtin_problems
from support.rollouts import make_trainer


def launch(folder: Path, failure: str, rank: int) -> tuple[subprocess.CompletedProcess[str], float]:
    """Train, and return the finished process and the seconds from the failure to its end."""
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(__file__, str(folder), failure, str(rank)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    began = folder / "began"
    return finished, time.time() - began.stat().st_mtime if began.exists() else 0.0


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
            return list(pool.map(time.sleep, [600] * 2))
    while failure == "catches all":
        with suppress(BaseException):
            time.sleep(600)
    if failure == "other metrics":
        log_metric("of one rank", 1.0)
    return [1.0] if failure == "returns too few" else None


def main(folder: Path, failure: str, rank: int) -> None:
    own_rank = int(os.environ["RANK"])

    def own(completions: list[str], log_metric: Any, **_: Any) -> Any:
        scores = None
        if own_rank == rank:
            (folder / "began").touch()
            scores = fail(failure, log_metric)
        return scores or [float(len(completion) % 3) for completion in completions]

    problems = Dataset.from_list([vars(problem) for problem in builtin_problems("train", 32, seed=0)])
    trainer = make_trainer(folder, problems, reward_funcs=own, reward_timeout=2.0, mask_truncated_completions=True)
    if failure == "no tokens" and own_rank == rank:
        generate = trainer._generate_single_turn

        def truncated(*args: Any, **kwargs: Any) -> Any:
            completion_ids, log_probs = generate(*args, **kwargs)
            stops = trainer.eos_token_ids
            return [[token for token in ids if token not in stops] or ids for ids in completion_ids], log_probs

        trainer._generate_single_turn = truncated
    trainer.train()
    if own_rank == 0:
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
