"""What this library leans on in TRL, Transformers and verl without being promised it: a new version that changes it fails here."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from transformers import GenerationMixin, TrainingArguments
from trl import GRPOConfig

from drpo.trainer.refused import REFUSED

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
        ("_prefill", ["input_ids", "generation_config", "model_kwargs", "is_first_iteration"]),
        (
            "_update_model_kwargs_for_generation",
            ["outputs", "model_kwargs", "is_encoder_decoder", "num_new_tokens"],
        ),
        ("_has_unfinished_sequences", ["this_peer_finished", "synced_gpus", "device"]),
        ("_valid_auto_compile_criteria", ["model_kwargs", "generation_config"]),
        ("_optimize_model_for_decode", []),
    ],
)
def test_generation_s_own_methods_take_what_they_are_given(method: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(GenerationMixin, method)).parameters) == ["self", *parameters]


def combined(requirements: Iterable[str], package: str, *extras: str) -> dict[str, SpecifierSet]:
    """What a package's requirements, and those of its extras, ask of each other package."""
    wanted: dict[str, SpecifierSet] = {}
    texts = list(requirements)
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        if requirement.name == package:
            more = combined(texts, package, *requirement.extras)
        else:
            more = {canonicalize_name(requirement.name): requirement.specifier}
        for name, specifiers in more.items():
            wanted[name] = wanted.get(name, SpecifierSet()) & specifiers
    return wanted


@pytest.mark.parametrize(
    ("extras", "engine"),
    [
        *((["verl"], engine) for engine in ("vllm", "sglang", "fsdp", "megatron")),
        *((["trl", "verl"], engine) for engine in ("vllm", "sglang")),
    ],
)
def test_what_verl_pins_beside_its_engines_is_allowed_here(extras: list[str], engine: str) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    ours = combined(project["dependencies"], "drpo")
    for extra in extras:
        for name, specifiers in combined(project["optional-dependencies"][extra], "drpo").items():
            ours[name] = ours.get(name, SpecifierSet()) & specifiers
    theirs = combined(importlib.metadata.requires("verl") or [], "verl", engine)
    for name in ours.keys() & theirs.keys():
        both = ours[name] & theirs[name]
        bounds = [specifier.version for specifier in both]
        assert not bounds or any(map(both.contains, bounds)), f"{name}: {ours[name]} here, {theirs[name]} there"
