"""What a run needs of the memory of one device, estimated from the model's shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import psutil
import torch

from drpo.doctor.findings import Finding
from drpo.trainer.config import DRPOConfig

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for, on one device, nothing sharded.

    Args:
        weights: of the policy, and of the copy that samples in another precision.
        gradients: of what is trained.
        optimizer: its state.
        samples: keys and values of all completions of a rollout, at their full length.
        activations: of one pass of the training forward and backward.
        past_weights: of ``rollout_lag``, in CPU memory.
    """

    weights: int
    gradients: int
    optimizer: int
    samples: int
    activations: int
    past_weights: int

    @property
    def fixed(self) -> int:
        """What no size of a batch changes."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.fixed + max(self.samples, self.activations)  # never at the same time

    def __str__(self) -> str:
        parts = [f"{f.name.replace('_', ' ')} {gib(size)}" for f in fields(self) if (size := getattr(self, f.name))]
        return ", ".join(parts)


def estimate(model: Any, config: DRPOConfig, longest_prompt: int) -> Estimate:
    """How much memory a run needs.

    Args:
        model: the policy, perhaps without its weights (on the device ``meta``), with its adapters.
        config: of the trainer.
        longest_prompt: tokens.
    """
    shape = model.config.get_text_config()
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    is_low = config.train_precision != "fp32"
    copies = {None: 0, "fp32": 4, "bf16": 2, "fp8": 2, "int8": 3}[config.rollout_precision]
    length = longest_prompt + (config.max_completion_length or 0)
    heads = getattr(shape, "num_key_value_heads", None) or getattr(shape, "num_attention_heads", 1)
    width = getattr(shape, "head_dim", None) or shape.hidden_size // getattr(shape, "num_attention_heads", 1)
    key_value = 2 * heads * width * shape.num_hidden_layers * (2 if is_low or config.rollout_precision else 4)
    state = 2 if "8bit" in str(config.optim) else 0 if "sgd" in str(config.optim) else 8
    return Estimate(
        weights=count * (4 + copies),
        gradients=trained * 4,
        optimizer=trained * state,
        samples=0 if config.use_vllm else (config.generation_batch_size or 0) * length * key_value,
        activations=_activations(shape, config, length),
        past_weights=config.rollout_lag and count * 4 * (config.rollout_lag + 1),
    )


def _activations(shape: Any, config: DRPOConfig, length: int) -> int:
    tokens = config.per_device_train_batch_size * length
    if config.tokens_per_micro_batch is not None:
        tokens = min(tokens, max(config.tokens_per_micro_batch, length))
    size = 2 if config.train_precision != "fp32" else 4
    inner = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    # Of a layer: its input, norms, queries, keys, values, attention and residuals; the two or three of the MLP.
    layer = (10 * shape.hidden_size + 4 * inner) * size
    kept = shape.hidden_size * size if config.gradient_checkpointing else layer
    # Log-probs over the sampler's support hold all logits in fp32, their log-softmax and its gradient.
    logits = 3 * 4 * shape.vocab_size if config.replay_support else 0
    # The layer in the backward pass has its activations and their gradients.
    return tokens * (shape.num_hidden_layers * kept + 2 * layer + logits)


def available() -> int:
    """Bytes that are free on the device that trains."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def check_memory(model: Any, config: DRPOConfig, longest_prompt: int) -> Iterator[Finding]:
    """Whether a run fits into the free memory of the devices there are."""
    needed, free = estimate(model, config, longest_prompt), available()
    devices = max(1, torch.cuda.device_count())
    said = f"memory: about {gib(needed.total)} of {gib(free)} free ({needed})"
    if needed.fixed > free * devices:
        yield Finding(
            "stop", said, "a smaller model, adapters (lora: {}), or more devices and a sharded run (FSDP2, ZeRO-3)"
        )
    elif needed.fixed > free:
        yield Finding("warning", f"{said}: too much for one device", "accelerate launch with FSDP2 or DeepSpeed ZeRO-3")
    elif needed.total > free:
        smaller = (
            "prompts_per_rollout or max_completion_length"
            if needed.samples > needed.activations
            else "trainer.tokens_per_micro_batch or micro_batch_size"
        )
        yield Finding("warning", said, f"a smaller {smaller}")
    elif config.rollout_lag and needed.past_weights > psutil.virtual_memory().available:
        yield Finding("warning", said, "a smaller rollout_lag")
    else:
        yield Finding("ok", said)


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
