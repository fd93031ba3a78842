"""One update on made-up rollouts that are the same however they are split; saves the gradient.

python rollouts.py FOLDER '{"NAME": {"per_device_train_batch_size": 16, ...}, ...}', alone or under accelerate launch,
writes FOLDER/NAME.safetensors for each of the settings.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from drpo import DRPOConfig, DRPOTrainer
from drpo.data.problems import BUILTIN_MODELS, builtin_problems
from drpo.rewards import exact_answer

T = TypeVar("T", bound=DRPOTrainer)

SEQUENCES, GROUP = 64, 8
MODEL = str(BUILTIN_MODELS["arithmetic"])


def load_model(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype), tokenizer


def transformers_scores(model: Any, inputs: Any, sequences: Tensor, **sampling: Any) -> tuple[Tensor, Tensor]:
    """Filtered scores and logits at each position of the completions, [B, T, V], by Transformers' own generation of one token."""
    width = inputs["input_ids"].shape[1]
    scores, logits = [], []
    for length in range(width, sequences.shape[1]):
        mask = pad(inputs["attention_mask"], (0, length - width), value=1)
        step = model.generate(
            input_ids=sequences[:, :length], attention_mask=mask, do_sample=True, max_new_tokens=1,
            output_scores=True, output_logits=True, return_dict_in_generate=True, **sampling,
        )  # fmt: skip
        scores += step.scores
        logits += step.logits
    return torch.stack(scores, dim=1), torch.stack(logits, dim=1)


def completion_lengths(inputs: Any, sequences: Tensor) -> list[int]:
    """Tokens of each completion up to its end token, which the built-in model has as 1."""
    ends = (sequences[:, inputs["input_ids"].shape[1] :] == 1).cumsum(dim=1)
    return ((ends == 0).sum(dim=1) + 1).clamp(max=ends.shape[1]).tolist()


def config(output: Path, **settings: Any) -> DRPOConfig:
    """Settings that tests of the trainer share: fp32, no dropout, no logging."""
    defaults = {
        "bf16": False,
        "gradient_checkpointing": False,
        "max_completion_length": 20,
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
    }
    return DRPOConfig(str(output), **{**defaults, **settings})


class GradientKeeper(TrainerCallback):
    """Keeps the gradient that an optimizer step is about to use."""

    def __init__(self) -> None:
        self.gradient: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        named = model.named_parameters()
        self.gradient = {n.removeprefix("module."): p.grad.detach().clone() for n, p in named if p.grad is not None}


def make_trainer(output: Path, problems: Dataset, kind: type[T] = DRPOTrainer, model: Any = None, **kwargs: Any) -> T:
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "updates_per_rollout": 2, "max_steps": 2}
    extra = {
        name: kwargs.pop(name)
        for name in ("peft_config", "callbacks", "rollout_func", "reward_funcs", "eval_dataset")
        if name in kwargs
    }
    loaded, tokenizer = load_model()
    return kind(
        model=model or loaded,
        reward_funcs=extra.pop("reward_funcs", exact_answer),
        args=config(output, **{**settings, **kwargs}),
        train_dataset=problems,
        processing_class=tokenizer,
        **extra,
    )


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)])


def weights(trainer: DRPOTrainer) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()}


def made_up_rollout(prompts: list[str], trainer: DRPOTrainer) -> dict[str, Any]:
    """Completions of uneven lengths and the log-probs of a sampler that is not the model, a function of each prompt's text."""
    completion_ids, logprobs = [], []
    for index, prompt in enumerate(prompts):
        # A group's copies of a prompt arrive together: this one's place tells which completion it gets.
        rng = random.Random(f"{prompt}{index % GROUP}")
        text = ",".join(str(rng.randint(1, 99)) for _ in range(rng.randint(1, 6)))
        ids = [*trainer.processing_class(text)["input_ids"], trainer.processing_class.eos_token_id]
        completion_ids.append(ids)
        logprobs.append([rng.uniform(-3, -0.01) for _ in ids])
    return {
        "prompt_ids": trainer.processing_class(prompts)["input_ids"],
        "completion_ids": completion_ids,
        "logprobs": logprobs,
    }


def alternating_reward(completions: list[str], **_: Any) -> list[float]:
    """Gives each group an advantage, whatever was sampled."""
    return [float(index % 2) for index, _ in enumerate(completions)]


def made_up_reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Some groups have equal rewards, and so no advantage."""
    pairs = zip(prompts, completion_ids, strict=True)
    return [float(sum(ids) % 3 == 0 and len(prompt) % 3 > 0) for prompt, ids in pairs]


def gradient_of_one_update(output: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> dict[str, Tensor]:
    """The gradient of one update on all sequences, through DRPOTrainer.

    With ``max_steps=2`` that of the second; the first left the weights as they were.
    """
    model, tokenizer = load_model(dtype)
    if dtype == torch.float64:
        # Not at the top: as a script this file finds no package of its neighbours.
        from support.fp64 import compute_in_fp64

        compute_in_fp64(model)
    keeper = GradientKeeper()
    trainer = DRPOTrainer(
        model=model,
        reward_funcs=made_up_reward,
        args=config(
            output,
            **{
                "max_steps": 1,
                "learning_rate": 0.0,
                "updates_per_rollout": 1,
                "num_generations": GROUP,
                "audit_threshold": 100.0,
                **settings,
            },
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [p.prompt for p in builtin_problems("train", SEQUENCES // GROUP, 0)]}
        ),
        processing_class=tokenizer,
        rollout_func=made_up_rollout,
        callbacks=[keeper],
    )
    trainer.train()
    dropped = trainer.state.log_history[-2]["work/dropped_sequences"]
    print(f"Audited {trainer.audit.tokens if trainer.audit else 0} tokens, dropped {dropped:.3f}")
    return keeper.gradient


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, settings in json.loads(sys.argv[2]).items():
        gradient = gradient_of_one_update(folder / "trainer", **settings)
        if int(os.environ.get("RANK", "0")) == 0:
            save_file({name: tensor.contiguous() for name, tensor in gradient.items()}, folder / f"{name}.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
