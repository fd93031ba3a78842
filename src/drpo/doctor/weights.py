"""What the weights of a model are, before they are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from drpo.doctor.findings import Finding
from drpo.doctor.model import Blank
from drpo.run.recipe import Recipe
from drpo.trainer.config import DRPOConfig
from drpo.trainer.fused_head import why_not_fused


def check_weights(blank: Blank, recipe: Recipe, config: DRPOConfig) -> Iterator[Finding]:
    """What the weights are, and what turns hidden states into log-probs."""
    if damaged := list(_damaged(blank)):
        yield from damaged
        return
    if quantisation := getattr(blank.policy.config, "quantization_config", None):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        yield Finding(
            "stop",
            f"weights: {recipe.model} is quantised ({method}): such weights get no updates, and TRL keeps adapters on them in "
            "bf16, where most updates are lost to rounding",
            "the model that it was made from",
        )
        return
    count = sum(parameter.numel() for parameter in blank.policy.parameters())
    trained = sum(parameter.numel() for parameter in blank.policy.parameters() if parameter.requires_grad)
    rollout = config.rollout_precision or ("vLLM's" if config.use_vllm else "the trainer's")
    yield Finding(
        "ok",
        f"weights: {count:,}"
        + (f", {trained:,} trained" if trained < count else "")
        + f", in fp32; training computes in {config.train_precision}, rollouts in {rollout}",
    )
    base = blank.policy.get_base_model() if recipe.lora is not None else blank.policy
    if not config.fused_loss or config.replay_support:
        return
    if reason := why_not_fused(base):
        yield Finding("ok", f"loss: not fused with the LM head, as {reason}; TRL's takes its place")
    else:
        yield Finding("ok", "loss: fused with the LM head")


def _damaged(blank: Blank) -> Iterator[Finding]:
    """Files that are not there, and those whose header or length is not that of a whole one; no weight is read."""
    folder = Path(blank.name)
    for index in folder.glob("*.index.json"):
        named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            yield Finding(
                "stop",
                f"weights: {index} names {', '.join(missing)[:200]}, not in the folder",
                f"{', '.join(missing)[:200]} copied or downloaded too",
            )
            return
    if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        yield Finding("stop", f"weights: there are none in {folder}", f"model.safetensors in {folder}")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            yield Finding(
                "stop",
                f"weights: {file} is damaged, of {file.stat().st_size:,} bytes ({error})",
                f"{file.name} copied or downloaded once more, to its full length",
            )
