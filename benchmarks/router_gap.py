"""What a mixture's routers add to the gap between sampler and trainer: experts that differ, and |π − μ| with and without replay.

One rollout of 64 prompts, 8 completions each, of the lab's base models, a dense one and a mixture of eight experts of its
size, two a token, before any update; the same for SEEDS seeds. The models are those of the folder that the environment
variable LAB names, ``lab`` by default; what is missing is made first, in some ten minutes.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import transformers

from benchmarks import tables
from benchmarks.engine_gap import PACKAGES, SEEDS, gaps_of, summary
from benchmarks.first_rollout import PROMPTS, first_rollout
from drpo.data.files import read_problems
from drpo.lab.grid import SETTINGS
from drpo.lab.runner import make_base

LAB = Path(os.environ.get("LAB", "lab"))

MODELS = {"dense": ("bf16", False), "mixture": ("moe-bf16", False), "mixture with replay": ("moe-bf16", True)}
"""By name: the lab's setting whose base model it is, and whether the sampler's experts are replayed."""

PRECISIONS = (("bf16", "fp32"), ("bf16", "bf16"), ("fp8", "bf16"), ("fp8", "fp8"))
"""Of the rollout and of training."""


def run(command: str) -> list[dict[str, Any]]:
    logging.disable()
    transformers.utils.logging.disable_progress_bar()
    provenance = tables.provenance(command, PACKAGES)
    rows = []
    for rollout, train in PRECISIONS:
        for name, (setting, replays) in MODELS.items():
            make_base(LAB, setting)
            base = LAB / "models" / SETTINGS[setting].base
            of_seeds = [
                _measure(base, seed, rollout_precision=rollout, train_precision=train, router_replay=replays)
                for seed in range(SEEDS)
            ]
            rows.append({"model": name, "rollout": rollout, "train": train, "seeds": SEEDS, **summary(of_seeds)})
    return [row | provenance for row in rows]


def _measure(base: Path, seed: int, **settings: Any) -> dict[str, float]:
    problems = read_problems(base / "train.jsonl")[seed * PROMPTS :][:PROMPTS]
    trainer, rows = first_rollout(seed, model=str(base / "model"), problems=problems, audit_threshold=100.0, **settings)
    logged = trainer.state.log_history[0]
    return {**gaps_of(rows), **{name: logged.get(f"routing/{name}", 0.0) for name in ("other_tokens", "other_experts")}}
