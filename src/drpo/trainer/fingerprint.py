"""What a run is, as far as its next update depends on it: options, data, model, rewards, processes and versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from drpo.files import versions
from drpo.redact import redact

if TYPE_CHECKING:
    from drpo.trainer.checkpointed import CheckpointedTrainer

FREE_OPTIONS = (
    # What is written and shown, and where.
    "output_dir", "run_name", "project", "trackio_", "report_to", "log_", "logging_", "disable_tqdm", "save_",
    "push_to_hub", "hub_", "include_", "num_completions_to_print", "resume_from_checkpoint",
    # Evaluation.
    "do_", "eval_", "per_device_eval_batch_size", "num_generations_eval", "prediction_loss_only", "batch_eval_metrics",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    # How long.
    "max_steps", "num_train_epochs",
    # How the model is found; what it is, is compared by itself.
    "model_init_kwargs",
    # Memory, speed and checks, which change an update by rounding at most.
    "gradient_checkpointing", "use_cache", "dataloader_", "torch_compile", "torch_empty_cache_steps", "ddp_", "local_rank",
    "tokens_per_micro_batch", "fused_loss", "drop_zero_advantage", "share_prompts", "skip_memory_metrics", "debug", "enable_jit_checkpoint",
    "vllm_gpu_memory_utilization", "vllm_server_", "vllm_group_port", "vllm_enable_sleep_mode",
    "audit_threshold", "stale_sampler", "max_skipped_updates", "split_distance", "checkpoint_checksums", "reward_timeout",
)  # fmt: skip
"""Options that may change when a run is resumed; a name that ends in an underscore is the beginning of several."""

_FREE_BEGINNINGS = tuple(name for name in FREE_OPTIONS if name.endswith("_"))

_FREE_IN_CONFIG = {
    "_name_or_path", "transformers_version", "use_cache", "output_router_logits",
    # What training and saving set on the way, the tokens by the tokenizer's.
    "architectures", "dtype", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip

_FREE_IN_ADAPTERS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version"}


def fingerprint(trainer: CheckpointedTrainer) -> dict[str, Any]:
    """Names and values to compare on resume, in JSON."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    options = {
        name: value
        for name, value in trainer.args.to_dict().items()
        if name not in FREE_OPTIONS and not name.startswith(_FREE_BEGINNINGS)
    }
    dataset: Any = trainer.train_dataset
    # A thousand rows at a time are read ten times as fast as one by one.
    rows = dataset.with_format(None).iter(batch_size=1000) if isinstance(dataset, Dataset) else dataset
    values = {
        **options,
        "processes": trainer.accelerator.num_processes,
        "train_dataset": f"{len(dataset)} rows, {digest_of_rows(rows)}",
        "reward_funcs": list(trainer.reward_func_names),
        "model.parameters": _digest_of_parameters(policy),
        "model.dtype": str(policy.dtype),
        **{f"model.{name}": value for name, value in policy.config.to_dict().items() if name not in _FREE_IN_CONFIG},
        **_adapters(policy),
        "tokenizer": _digest_of_tokenizer(trainer.processing_class),
        **{f"versions.{name}": value for name, value in versions().items()},
        **trainer.run_fingerprint,
    }
    # It is written into every checkpoint.
    return json.loads(redact(json.dumps(values, default=str)))


def digest_of_rows(rows: Iterable[Any]) -> str:
    """Of the content of all rows, or batches of rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=str).encode())
    return f"SHA-256 {digest.hexdigest()[:16]}"


def _adapters(policy: Any) -> dict[str, Any]:
    """What peft's adapters have that no weight tells, such as ``lora_alpha``."""
    return {
        f"peft.{adapter}.{name}": sorted(value) if isinstance(value, set) else value
        for adapter, config in getattr(policy, "peft_config", {}).items()
        for name, value in config.to_dict().items()
        if name not in _FREE_IN_ADAPTERS
    }


def _digest_of_tokenizer(tokenizer: Any) -> str:
    return digest_of_rows(
        [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    )


def _digest_of_parameters(policy: Any) -> str:
    """Of names, shapes and what is trained, and of the values that no checkpoint holds, since they are frozen."""
    digest = hashlib.sha256()
    for name, parameter in policy.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.requires_grad}\n".encode())
        if not parameter.requires_grad and type(parameter.data) is torch.Tensor:
            bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
            # A sum of whole numbers is exact and the same on every device.
            digest.update(str(parameter.data.contiguous().view(bits).sum(dtype=torch.int64).item()).encode())
    return f"SHA-256 {digest.hexdigest()[:16]}"
