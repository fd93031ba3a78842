"""Run the built-in recipe with several objectives and seeds and write what came out, with provenance, as CSV.

python -m benchmarks.run_seeds --seeds 0 1 2 --output docs/results/demo.csv
python -m benchmarks.run_seeds --seeds 0 1 2 --objectives all --set learning_rate=3e-4 --jobs 2 --output docs/results/objectives.csv
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks import tables
from drpo import OBJECTIVES
from drpo.files import read_jsonl

DRPO = Path(sys.executable).with_name("drpo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--objectives",
        nargs="*",
        default=[],
        help="instead of the recipe's own: names, '{name: drpo, delta: 0.2}', or 'all'",
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    where = tables.provenance("")
    provenance = {
        **{name: where[name] for name in ("commit", "date")},
        "machine": f"{where['machine']}, {options.jobs} runs at a time",
    }
    asked = options.objectives or [None]
    objectives = [name for each in asked for name in (OBJECTIVES if each == "all" else [each])]
    sets = [
        [*([f"objective={objective}"] if objective else []), f"seed={seed}", *options.overrides]
        for objective in objectives
        for seed in options.seeds
    ]
    threads = str(max((os.cpu_count() or 1) // options.jobs, 1))
    with ThreadPoolExecutor(options.jobs) as pool:
        started = pool.map(lambda fields: run(fields, threads), sets)
        rows = [{**row, **provenance} for row in track(started, description="runs", total=len(sets))]
    tables.write(options.output, rows)
    print(options.output)


def run(fields: list[str], threads: str) -> dict[str, Any]:
    """One run of the built-in recipe, as a row of the table."""
    command = [str(DRPO), "train", *(argument for field in fields for argument in ("--set", field))]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        subprocess.run([*command, "--output", str(output)], check=True, env=environment, stdout=subprocess.DEVNULL)
        summary = json.loads((output / "summary.json").read_text())
        versions = json.loads((output / "run.json").read_text())["versions"]
        metrics = read_jsonl(output / "metrics.jsonl")
    # At the last update of each rollout that had a gradient, where π has gone furthest from what was sampled from.
    ends = {row["rollout"]: row["divergence/mean"] for row in metrics if "divergence/mean" in row}
    return {
        "objective": summary["objective"],
        "hyperparameters": json.dumps(summary["objective_kwargs"]),
        "seed": summary["seed"],
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
        "mean_divergence": f"{statistics.fmean(ends.values()):.3g}",
        "rollouts": summary["rollouts"],
        "train_seconds": summary["train_seconds"],
        "audit_max": summary["audit"]["maximum"],
        "command": " ".join(["drpo", *command[1:]]),
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
    }


if __name__ == "__main__":
    main()
