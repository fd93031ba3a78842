"""What a checkpoint costs: DRPOTrainer's, flushed to disk and with its SHA-256s, against that of TRL's GRPOTrainer.

Both save a Qwen3 of 60 million parameters, AdamW's state with it, after one update on a made-up rollout; they take turns.
``no checksums``: with ``checkpoint_checksums=False``. ``resume``: what is read and compared before a run goes on, of which TRL reads nothing.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from benchmarks import measure, tables
from drpo import DRPOConfig, DRPOTrainer
from drpo.data.problems import BUILTIN_MODELS

PACKAGES = ("torch", "transformers", "trl", "safetensors")
ROUNDS = 9
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    return {
        "prompt_ids": [[1, 2] for _ in prompts],
        "completion_ids": [[10 + index, 11] for index, _ in enumerate(prompts)],
        "logprobs": [[-10.4, -10.4] for _ in prompts],
    }


KINDS = ("TRL", "drpo", "drpo, no checksums")


def make(folder: Path, kind: str) -> GRPOTrainer:
    """A trainer that made an update, so that its optimizer has a state."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32_768,
        hidden_size=640,
        intermediate_size=1920,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
    )
    arguments: dict[str, Any] = {
        "model": Qwen3ForCausalLM(config),
        "reward_funcs": lambda completions, **_: [float(index % 2) for index, _ in enumerate(completions)],
        "train_dataset": Dataset.from_dict({"prompt": ["1+1="] * 4}),
        "processing_class": AutoTokenizer.from_pretrained(str(BUILTIN_MODELS["arithmetic"]), padding_side="left"),
        "rollout_func": rollout,
    }
    if kind == "TRL":
        options = {"steps_per_generation": 1, "vllm_importance_sampling_correction": False}
        trainer = GRPOTrainer(args=GRPOConfig(str(folder), **SHARED, **options), **arguments)
    else:
        checksums = kind != "drpo, no checksums"
        options = {"updates_per_rollout": 1, "audit_threshold": 100.0, "checkpoint_checksums": checksums}
        trainer = DRPOTrainer(args=DRPOConfig(str(folder), **SHARED, **options), **arguments)
    trainer.train()
    return trainer


def run(command: str, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    provenance = tables.provenance(command, PACKAGES)
    with tempfile.TemporaryDirectory(dir=".") as root:
        trainers = {kind: make(Path(root) / kind, kind) for kind in KINDS}
        checkpoints = {kind: Path(root) / kind / "checkpoint-1" for kind in trainers}

        def save(kind: str) -> None:
            shutil.rmtree(checkpoints[kind], ignore_errors=True)
            trainers[kind]._save_checkpoint(trainers[kind].model, None)

        ours: Any = trainers["drpo"]
        work = {kind: lambda kind=kind: save(kind) for kind in trainers}
        work["drpo, resume"] = lambda: ours._find_checkpoint(str(checkpoints["drpo"]))
        times = measure.seconds(work, rounds)
        sizes = {kind: sum(file.stat().st_size for file in path.rglob("*")) for kind, path in checkpoints.items()}
        sizes["drpo, resume"] = sizes["drpo"]
    return [
        {
            "what": name,
            "megabytes": f"{sizes[name] / 1e6:.1f}",
            "median_seconds": f"{statistics.median(spent):.2f}",
            "times_trl": f"{measure.ratio(spent, times['TRL']):.2f}",
            "bytes_of_trl": f"{sizes[name] / sizes['TRL']:.3f}",
            "rounds": rounds,
        }
        | provenance
        for name, spent in times.items()
    ]
