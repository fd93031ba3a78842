"""Run the built-in recipe with several seeds and write what came out, with provenance, as CSV.

python scripts/demo_seeds.py --seeds 0 1 2 --output docs/results/demo.csv
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

DRPO = Path(sys.executable).with_name("drpo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="*", default=[], help="instead of the recipe's own")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    rows = []
    for objective in options.objectives or [None]:
        for seed in options.seeds:
            sets = [f"seed={seed}", *([f"objective={objective}"] if objective else [])]
            command = [str(DRPO), "train", *(argument for field in sets for argument in ("--set", field))]
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                subprocess.run([*command, "--output", str(run)], check=True)
                summary = json.loads((run / "summary.json").read_text())
                versions = json.loads((run / "run.json").read_text())["versions"]
            rows.append(
                {
                    "objective": summary["objective"],
                    "hyperparameters": json.dumps(summary["objective_kwargs"]),
                    "seed": seed,
                    "accuracy_before": summary["accuracy_before"],
                    "accuracy_after": summary["accuracy_after"],
                    "rollouts": summary["rollouts"],
                    "train_seconds": summary["train_seconds"],
                    "audit_max": summary["audit"]["maximum"],
                    "command": " ".join(["drpo", *command[1:]]),
                    "commit": commit.stdout.strip(),
                    "date": datetime.date.today().isoformat(),
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                    "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
                }
            )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(options.output)


if __name__ == "__main__":
    main()
