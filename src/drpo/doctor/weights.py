"""What the weights of a model are, before they are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.quantizers.auto import AutoHfQuantizer

from drpo.config import DRPOConfig
from drpo.doctor.findings import Finding, refused
from drpo.doctor.model import Blank
from drpo.policy_head import why_not_fused
from drpo.recipe import Recipe


def check_weights(blank: Blank, recipe: Recipe, config: DRPOConfig) -> Iterator[Finding]:
    """What the weights are, and what turns hidden states into log-probs."""
    if damaged := list(_damaged(blank)):
        yield from damaged
        return
    if quantisation := getattr(blank.policy.config, "quantization_config", None):
        unusable = list(_quantised(recipe, quantisation))
        yield from unusable
        if unusable:
            return
    count = sum(parameter.numel() for parameter in blank.policy.parameters())
    trained = sum(parameter.numel() for parameter in blank.policy.parameters() if parameter.requires_grad)
    rollout = config.rollout_precision or ("vLLM's" if config.use_vllm else "the trainer's")
    yield Finding(
        "ok",
        f"weights: {count:,}"
        + (f", {trained:,} trained" if trained < count else "")
        + (", quantised" if quantisation else ", in fp32")
        + f"; training computes in {config.train_precision}, rollouts in {rollout}",
    )
    base = blank.policy.get_base_model() if recipe.lora is not None else blank.policy
    if not config.fused_loss or config.replay_support:
        return
    if reason := why_not_fused(base):
        yield Finding("ok", f"loss: not fused with the LM head, as {reason}; TRL's takes its place")
    else:
        yield Finding("ok", "loss: fused with the LM head")


def _damaged(blank: Blank) -> Iterator[Finding]:
    """Files whose header or length is not that of a whole one; no weight is read."""
    for file in sorted(Path(blank.name).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            yield Finding(
                "stop",
                f"weights: {file} is damaged, of {file.stat().st_size:,} bytes ({error})",
                f"{file.name} copied or downloaded once more, to its full length",
            )


def _quantised(recipe: Recipe, quantisation: Any) -> Iterator[Finding]:
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
    if recipe.lora is None:
        yield Finding(
            "stop",
            f"weights: {recipe.model} is quantised ({method}), and quantised weights get no updates",
            "the model that it was made from, or adapters (lora: {})",
        )
        return
    try:
        AutoHfQuantizer.from_config(quantisation, pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # each method fails in its own way
        yield refused(error, f"weights: {recipe.model} is quantised ({method})")
