"""Is a change to the code a change to the numbers? Ten seeded runs of this tree and of another revision, compared.

    python scripts/same_loss.py REV        # any git revision; about eight minutes on two cores

Each run is ``drpo train`` on the built-in task for three rollouts. For each it says whether losses, gradient norms and
final weights are the same bit for bit, and otherwise by how much they differ at most. Exit code 1 if any differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SMALL = ("rollouts=3", "prompts_per_rollout=8", "num_generations=4", "heldout_problems=10", "learning_rate=0.001")
RUNS = {
    "drpo": (),
    "ppo": ("objective=ppo",),
    "gspo": ("objective=gspo", "aggregation=seq-mean-token-mean"),
    "drpo_topk": ("objective=drpo_topk",),
    "correction": ("objective=ppo", "correction=token_truncate", "rollout_precision=int8"),
    "fp8_rollout": ("rollout_precision=fp8",),
    "lag": ("rollout_lag=1",),
    "lora": ("lora.r=4",),
    "two_ranks": (),
    "accumulation": ("micro_batch_size=2", "trainer.tokens_per_micro_batch=100"),
}
TWO_RANKS = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
)


def train(tree: Path, name: str, output: Path) -> None:
    """Run one of :data:`RUNS` with the code of ``tree``."""
    launcher = (*TWO_RANKS, "--dynamo_backend=no", "-m", "drpo") if name == "two_ranks" else ("drpo",)
    options = [word for setting in (*SMALL, *RUNS[name]) for word in ("--set", setting)]
    environment = {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    finished = subprocess.run(
        [sys.executable, "-m", *launcher, "train", "--output", str(output), *options],
        env=os.environ | environment,
        cwd=output.parent,
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        raise SystemExit(f"{name} in {tree}: exit code {finished.returncode}\n{finished.stderr[-3000:]}")


def largest_differences(ours: Path, theirs: Path) -> dict[str, float]:
    """The largest absolute difference of two runs' losses, gradient norms and final weights; inf where shapes differ."""
    rows, other_rows = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (ours, theirs))
    weights, other_weights = (load_file(run / "model" / "model.safetensors") for run in (ours, theirs))
    differences = {
        column: max(abs(row[column] - other[column]) for row, other in zip(rows, other_rows, strict=True))
        for column in ("loss", "grad_norm")
    }
    same_names = weights.keys() == other_weights.keys()
    differences["weights"] = max(
        ((weights[name] - other_weights[name]).abs().max().item() for name in weights), default=0.0
    ) if same_names else torch.inf  # fmt: skip
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REV", help="the git revision to compare this tree with")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=", ".join(RUNS))
    options = parser.parse_args()
    all_same = True
    with tempfile.TemporaryDirectory() as scratch:
        other_tree = Path(scratch) / "tree"
        subprocess.run(
            ["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", other_tree, options.revision], check=True
        )
        try:
            for name in options.only:
                runs = {}
                for tree in (ROOT, other_tree):
                    runs[tree] = Path(scratch) / f"{name}-{tree.name}"
                    train(tree, name, runs[tree])
                differences = largest_differences(*runs.values())
                is_same = not any(differences.values())
                all_same &= is_same
                shown = "the same bits" if is_same else ", ".join(f"{k} {v:.2g}" for k, v in differences.items())
                print(f"{name:14} {shown}", flush=True)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", other_tree], check=True)
    raise SystemExit(not all_same)


if __name__ == "__main__":
    main()
