"""What low precision does to μ and π: |π − μ| of the built-in model's own samples before any update.

One rollout of 64 prompts, 8 completions each, of the model as it comes, for each precision of the rollout and of
training; the same for SEEDS seeds, whose range is given beside their mean. Quantiles are over the tokens of a seed.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from typing import Any

import torch
import transformers
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import tables
from drpo import DRPOConfig, DRPOTrainer
from drpo.rewards import exact_answer
from drpo.rollout.token_log import TokenLog
from drpo.tasks import BUILTIN_MODELS, builtin_problems

SETTINGS = (("fp32", "fp32"), ("bf16", "fp32"), ("int8", "fp32"), ("fp8", "fp32"), ("bf16", "bf16"), ("fp8", "fp8"))
"""Precisions of the rollout and of training."""

SEEDS = 5
PROMPTS, GROUP = 64, 8
PACKAGES = ("torch", "torchao", "transformers", "trl")


def gaps(rollout: str, train: str, seed: int) -> dict[str, float]:
    """Statistics of |π − μ| and |log π − log μ| over one rollout."""
    source = str(BUILTIN_MODELS["arithmetic"])
    problems = builtin_problems("train", PROMPTS, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
            reward_funcs=exact_answer,
            args=DRPOConfig(
                folder,
                rollout_precision=rollout,  # type: ignore[arg-type]
                train_precision=train,  # type: ignore[arg-type]
                per_device_train_batch_size=PROMPTS * GROUP,
                num_generations=GROUP,
                updates_per_rollout=1,
                max_steps=1,
                max_completion_length=20,
                audit_threshold=100.0,
                gradient_checkpointing=False,
                use_cpu=not torch.accelerator.is_available(),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=Dataset.from_list([vars(problem) for problem in problems]),
            processing_class=AutoTokenizer.from_pretrained(source, padding_side="left"),
        )
        trainer.token_log = TokenLog()
        trainer.train()
    rows = trainer.token_log.take()
    logp, behavior_logp = (
        torch.tensor([value for row in rows for value in row[name]], dtype=torch.float64)
        for name in ("logp", "behavior_logp")
    )
    distance, log_ratio = (logp.exp() - behavior_logp.exp()).abs(), (logp - behavior_logp).abs()
    return {
        "tokens": len(logp),
        "mean": distance.mean().item(),
        "p99": distance.quantile(0.99).item(),
        "max": distance.max().item(),
        "log_ratio_mean": log_ratio.mean().item(),
        "log_ratio_p99": log_ratio.quantile(0.99).item(),
    }


def run(command: str) -> list[dict[str, Any]]:
    logging.disable()
    transformers.utils.logging.disable_progress_bar()
    provenance = tables.provenance(command, PACKAGES)
    rows = []
    for rollout, train in SETTINGS:
        of_seeds = [gaps(rollout, train, seed) for seed in range(SEEDS)]
        values = {name: [found[name] for found in of_seeds] for name in of_seeds[0]}
        row: dict[str, Any] = {"rollout": rollout, "train": train, "seeds": SEEDS, "tokens": sum(values.pop("tokens"))}
        for name, found in values.items():
            row[name] = f"{statistics.fmean(found):.3g}"
            row[f"{name}_range"] = f"{min(found):.3g} to {max(found):.3g}"
        rows.append(row | provenance)
    return rows


def plot(rows: list[dict[str, str]]) -> Figure:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    for offset, name, label in ((-0.2, "mean", "mean"), (0.2, "p99", "99 % quantile")):
        middle = [float(row[name]) for row in rows]
        ends = [[float(end) for end in row[f"{name}_range"].split(" to ")] for row in rows]
        spread = [
            [value - low for value, (low, _) in zip(middle, ends, strict=True)],
            [high - value for value, (_, high) in zip(middle, ends, strict=True)],
        ]
        axes.bar([place + offset for place in places], middle, 0.38, yerr=spread, capsize=3, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("|π − μ| before any update")
    axes.set_xticks(list(places), [f"{row['rollout']} rollout\n{row['train']} training" for row in rows], fontsize=8)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
