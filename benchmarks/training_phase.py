"""The training phase of DRPOTrainer against TRL's GRPOTrainer on the same rollouts: scoring, losses, gradients and updates.

Rollouts are made up and take no time. On a CPU: 10 groups of 4 completions, four updates, of a Qwen3 of 8 million
parameters with a vocabulary of 32,768, in FP32. On a GPU: 16 groups of 8, four updates, of Qwen3-0.6B's architecture
with random weights, in BF16. Seconds are those between the moment a rollout is there and the end of its last update, of
the second rollout on: the first is audited in full.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks import measure, tables
from drpo import DRPOConfig, DRPOTrainer
from drpo.data.problems import BUILTIN_MODELS

PACKAGES = ("torch", "transformers", "trl")
UPDATES, ROLLOUTS = 4, 2


@dataclass(frozen=True)
class Size:
    """Of model and rollout.

    Args:
        config: of a model with random weights, or the folder of one.
        vocabulary: of the model.
        groups: of a rollout.
        group: completions of a group.
        batch: completions that go through TRL's model at once; ours splits by tokens.
        longest: tokens of a completion at most.
        prompt: tokens of each prompt.
        bf16: autocast.
    """

    config: Qwen3Config | str
    vocabulary: int
    groups: int = 10
    group: int = 4
    batch: int = 10
    longest: int = 128
    prompt: int = 16
    bf16: bool = False

    @property
    def samples(self) -> int:
        return self.groups * self.group

    def options(self) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.samples // UPDATES // self.batch,
            "num_generations": self.group,
            "max_completion_length": self.longest,
            "max_steps": UPDATES * ROLLOUTS,
            "learning_rate": 1e-6,
            "gradient_checkpointing": False,
            "bf16": self.bf16,
            "use_cpu": not torch.cuda.is_available(),
            "save_strategy": "no",
            "logging_steps": UPDATES,
            "report_to": "none",
            "disable_tqdm": True,
        }

    def model(self) -> Any:
        if isinstance(self.config, str):
            return AutoModelForCausalLM.from_pretrained(self.config, dtype=torch.float32)
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)


def _qwen3(vocabulary: int, **sizes: Any) -> Qwen3Config:
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    return Qwen3Config(vocab_size=vocabulary, tie_word_embeddings=True, **tokens, **sizes)


def on_cpu() -> Size:
    sizes = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4, "head_dim": 32}
    return Size(_qwen3(32_768, **sizes, num_attention_heads=6, num_key_value_heads=2), 32_768)


def on_gpu() -> Size:
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
    config = _qwen3(151_936, **sizes, num_attention_heads=16, num_key_value_heads=8)
    return Size(config, 151_936, groups=16, group=8, batch=8, longest=1024, prompt=128, bf16=True)


@dataclass(frozen=True)
class Setting:
    """``without_advantage``: the share of groups whose rewards are all equal; ``lengths``: flat or skewed."""

    size: Size
    without_advantage: float
    lengths: str

    def rollout(self) -> list[list[int]]:
        rng = random.Random(0)
        longest = self.size.longest
        lengths = [longest] * self.size.samples
        if self.lengths == "skewed":
            # Log-normal, a median of a quarter of the longest, as reasoning traces are.
            lengths = [min(longest, max(8, int(rng.lognormvariate(0, 0.7) * longest / 4))) for _ in lengths]
        return [[rng.randrange(10, self.size.vocabulary) for _ in range(length)] for length in lengths]

    def rewards(self) -> list[float]:
        equal = round(self.without_advantage * self.size.groups)
        return [0.0 if index // self.size.group < equal else float(index % 2) for index in range(self.size.samples)]


def on_smollm2(folder: str) -> list[Setting]:
    """A short answer to a prompt of 40 tokens, and longer ones to longer prompts."""
    sizes = [
        Size(folder, 49_152, groups=16, group=8, batch=32, longest=longest, prompt=prompt)
        for prompt, longest in ((40, 4), (200, 64))
    ]
    return [Setting(size, 0.0, "skewed") for size in sizes]


def cases(*, small: bool = False) -> list[Setting]:
    if small:
        return [Setting(dataclasses.replace(on_cpu(), groups=4, batch=4, longest=32), 0.5, "skewed")]
    if not torch.cuda.is_available():
        return [Setting(on_cpu(), share, lengths) for lengths in ("flat", "skewed") for share in (0.0, 0.3, 0.6)]
    return [Setting(on_gpu(), share, "skewed") for share in (0.0, 0.6)]


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
        measure.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def seconds(kind: str, setting: Setting) -> list[float]:
    """Of the training phase of each rollout but the first."""
    clock, size = Clock(), setting.size
    completion_ids, rewards = setting.rollout(), setting.rewards()

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        measure.synchronize()
        clock.began = time.perf_counter()
        return {
            "prompt_ids": [[1] * size.prompt for _ in prompts],
            "completion_ids": completion_ids,
            # Log-probs of a policy of random weights, nearly: no token runs away.
            "logprobs": [[-math.log(size.vocabulary)] * len(ids) for ids in completion_ids],
        }

    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "model": size.model(),
            "reward_funcs": lambda completions, **_: rewards,
            "train_dataset": Dataset.from_dict({"prompt": ["1+1="] * size.groups * ROLLOUTS}),
            "processing_class": AutoTokenizer.from_pretrained(str(BUILTIN_MODELS["arithmetic"]), padding_side="left"),
            "rollout_func": rollout,
            "callbacks": [clock],
        }
        if kind == "TRL":
            steps = UPDATES * size.options()["gradient_accumulation_steps"]
            options = {"steps_per_generation": steps, "vllm_importance_sampling_correction": False}
            trainer = GRPOTrainer(args=GRPOConfig(folder, **size.options(), **options), **arguments)
        else:
            args = DRPOConfig(
                folder,
                **size.options(),
                **KINDS[kind],
                updates_per_rollout=UPDATES,
                objective_kwargs={"delta": 0.2},
                audit_threshold=100.0,
            )
            trainer = DRPOTrainer(args=args, **arguments)
        trainer.train()
    return clock.seconds[2 * UPDATES - 1 :: UPDATES]


def run(command: str) -> list[dict[str, Any]]:
    return compare(cases(), 3, command)


def compare(
    settings: list[Setting], rounds: int, command: str, kinds: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """A row for each setting and trainer; on a GPU, where device time is dear, of TRL's and ours as it comes."""
    kinds = kinds or (list(KINDS)[:2] if torch.cuda.is_available() else list(KINDS))
    provenance = tables.provenance(command, PACKAGES)
    rows = []
    for setting in track(settings, description="training phase"):
        # Trainers in turn, so that what slows the machine slows them alike.
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind in kinds:
                times[kind].append(statistics.fmean(seconds(kind, setting)))
        for kind in kinds:
            row = {
                "trainer": kind,
                "prompt": setting.size.prompt,
                "longest": setting.size.longest,
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
