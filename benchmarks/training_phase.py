"""The training phase of DRPOTrainer against TRL's GRPOTrainer on the same rollouts: scoring, losses, gradients and updates.

Rollouts are made up and take no time: 10 groups of 4 completions, four updates, of a Qwen3 of 8 million
parameters with a vocabulary of 32,768. Seconds are those between the moment a rollout is there and the
end of its last update, of the second rollout on: the first is audited in full.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from rich.progress import track
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks import measure, tables
from drpo import DRPOConfig, DRPOTrainer
from drpo.data.problems import BUILTIN_MODELS

PACKAGES = ("torch", "transformers", "trl")
GROUPS, GROUP, UPDATES, ROLLOUTS = 10, 4, 4, 2
LONGEST = 128
PROMPT = 16
VOCABULARY = 32_768

SHARED: dict[str, Any] = {
    "per_device_train_batch_size": GROUPS * GROUP // UPDATES,
    "num_generations": GROUP,
    "max_completion_length": LONGEST,
    "max_steps": UPDATES * ROLLOUTS,
    "learning_rate": 1e-6,
    "gradient_checkpointing": False,
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": UPDATES,
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Setting:
    """``without_advantage``: the share of groups whose rewards are all equal; ``lengths``: flat or skewed."""

    without_advantage: float
    lengths: str

    def rollout(self) -> list[list[int]]:
        rng = random.Random(0)
        longest = [LONGEST] * (GROUPS * GROUP)
        if self.lengths == "skewed":
            # Log-normal, a median of a quarter of the longest, as reasoning traces are.
            longest = [min(LONGEST, max(8, int(rng.lognormvariate(0, 0.7) * LONGEST / 4))) for _ in longest]
        return [[rng.randrange(10, VOCABULARY) for _ in range(length)] for length in longest]

    def rewards(self) -> list[float]:
        equal = round(self.without_advantage * GROUPS)
        return [0.0 if index // GROUP < equal else float(index % 2) for index in range(GROUPS * GROUP)]


SETTINGS = [Setting(share, lengths) for lengths in ("flat", "skewed") for share in (0.0, 0.3, 0.6)]

KINDS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "drpo": {},
    "drpo, fused loss alone": {"drop_zero_advantage": False, "tokens_per_micro_batch": None},
    "drpo, all off": {"drop_zero_advantage": False, "tokens_per_micro_batch": None, "fused_loss": False},
}
"""What is compared, and the options of DRPOConfig that make it."""


class Clock(TrainerCallback):
    """Seconds from the last rollout to the end of each update."""

    def __init__(self) -> None:
        self.began = 0.0
        self.seconds: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def seconds(kind: str, setting: Setting) -> list[float]:
    """Of the training phase of each rollout but the first."""
    torch.manual_seed(0)
    clock = Clock()
    completion_ids, rewards = setting.rollout(), setting.rewards()

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        clock.began = time.perf_counter()
        return {
            "prompt_ids": [[1] * PROMPT for _ in prompts],
            "completion_ids": completion_ids,
            # Log-probs of a policy of random weights, nearly: no token runs away.
            "logprobs": [[-10.4] * len(ids) for ids in completion_ids],
        }

    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "model": _model(),
            "reward_funcs": lambda completions, **_: rewards,
            "train_dataset": Dataset.from_dict({"prompt": ["1+1="] * GROUPS * ROLLOUTS}),
            "processing_class": AutoTokenizer.from_pretrained(str(BUILTIN_MODELS["arithmetic"]), padding_side="left"),
            "rollout_func": rollout,
            "callbacks": [clock],
        }
        if kind == "TRL":
            options = {"steps_per_generation": UPDATES, "vllm_importance_sampling_correction": False}
            trainer = GRPOTrainer(args=GRPOConfig(folder, **SHARED, **options), **arguments)
        else:
            args = DRPOConfig(
                folder,
                **SHARED,
                **KINDS[kind],
                updates_per_rollout=UPDATES,
                objective_kwargs={"delta": 0.2},
                audit_threshold=100.0,
            )
            trainer = DRPOTrainer(args=args, **arguments)
        trainer.train()
    return clock.seconds[2 * UPDATES - 1 :: UPDATES]


def _model() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
    )
    return Qwen3ForCausalLM(config)


def run(command: str, rounds: int = 3) -> list[dict[str, Any]]:
    provenance = tables.provenance(command, PACKAGES)
    rows = []
    for setting in track(SETTINGS, description="training phase"):
        # Trainers in turn, so that what slows the machine slows them alike.
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind in KINDS:
                times[kind].append(statistics.fmean(seconds(kind, setting)))
        for kind in KINDS:
            row = {
                "trainer": kind,
                "lengths": setting.lengths,
                "without_advantage": setting.without_advantage,
                "times_faster_than_trl": f"{measure.ratio(times['TRL'], times[kind]):.2f}",
                "seconds": f"{statistics.median(times[kind]):.2f}",
                "rounds": rounds,
            }
            rows.append({**row, **provenance})
    return rows


def plot(rows: list[dict[str, str]]) -> Figure:
    """How many times faster than TRL's trainer each is, by the share of groups without an advantage."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, lengths in zip(axes, ("flat", "skewed"), strict=True):
        for kind, style in zip(KINDS, ("k--", "o-", "s:", "^:"), strict=True):
            line = [row for row in rows if row["trainer"] == kind and row["lengths"] == lengths]
            axis.plot(
                [100 * float(row["without_advantage"]) for row in line],
                [float(row["times_faster_than_trl"]) for row in line],
                style,
                label=kind,
            )
        axis.set_title(f"{lengths} lengths")
        axis.set_xlabel("groups without an advantage, %")
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].set_ylabel("times faster than TRL")
    figure.axes[0].legend(fontsize=8)
    return figure
