"""What this library leans on in TRL and Transformers without being promised it: a new version that changes it fails here."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from transformers import GenerationMixin, TrainingArguments
from trl import GRPOConfig

from drpo.trainer.config import REFUSED

TAKEN = {
    "cache_implementation",
    "cast_lm_head_to_fp32",
    "chat_template_kwargs",
    "disable_dropout",
    "ds3_gather_for_generation",
    "generation_batch_size",
    "generation_kwargs",
    "log_completions",
    "log_completions_hub_repo",
    "log_multimodal",
    "log_unique_prompts",
    "mask_truncated_completions",
    "max_completion_length",
    "max_tool_calling_iterations",
    "model_init_kwargs",
    "num_completions_to_print",
    "num_generations",
    "num_generations_eval",
    "pad_to_multiple_of",
    "reward_weights",
    "router_aux_loss_coef",
    "shuffle_dataset",
    "steps_per_generation",
    "temperature",
    "transformers_continuous_batching_config",
    "trust_remote_code",
    "use_vllm",
    "vllm_enable_sleep_mode",
    "vllm_gpu_memory_utilization",
    "vllm_group_port",
    "vllm_max_model_length",
    "vllm_mode",
    "vllm_model_impl",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_tensor_parallel_size",
}
"""GRPOConfig's own options that have their effect in DRPOTrainer too, or none on what is trained."""


def test_every_option_of_grpo_is_taken_or_refused() -> None:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(GRPOConfig)} - inherited
    assert own - TAKEN - set(REFUSED) == set()
    assert TAKEN & set(REFUSED) == set()
    assert own >= TAKEN


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (
            "_sample",
            ["input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"],
        ),
        ("_prefill", ["input_ids", "generation_config", "model_kwargs", "is_first_iteration"]),
    ],
)
def test_generation_s_own_methods_take_what_they_are_given(method: str, parameters: list[str]) -> None:
    names = [
        name
        for name in inspect.signature(getattr(GenerationMixin, method)).parameters
        if name != "model_kwargs" or method == "_prefill"
    ]
    assert names == ["self", *parameters]
