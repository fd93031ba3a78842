"""The environment and the overrides with which verl's trainer runs on a CPU."""

from __future__ import annotations

import os

PLUGIN = "drpo.integrations.verl.cpu.plugin"


def environment() -> dict[str, str]:
    """This process's, with what verl and its workers have to find in theirs."""
    modules = os.environ.get("VERL_USE_EXTERNAL_MODULES")
    needed = {
        "VERL_USE_EXTERNAL_MODULES": f"{PLUGIN},{modules}" if modules else PLUGIN,
        "VERL_PLATFORM": "cpu",
        # The engines are registered for "cuda"; what they compute on is the platform's device.
        "VERL_ENGINE_DEVICE": "cuda",
    }
    return {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **os.environ, **needed}


def overrides(workers: int = 1) -> list[str]:
    """For ``main_ppo``, with so many training processes on this machine."""
    return [
        "trainer.device=cpu",
        f"trainer.n_gpus_per_node={workers}",
        # Ray schedules actors by CPUs and GPUs, of which it takes our word.
        "ray_kwargs.ray_init.num_cpus=16",
        f"+ray_kwargs.ray_init.num_gpus={workers}",
        "+ray_kwargs.ray_init.include_dashboard=false",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.use_torch_compile=false",
        "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
        # Without it the model runs in bf16, whatever its weights are kept in.
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
        "actor_rollout_ref.model.enable_gradient_checkpointing=false",
        "actor_rollout_ref.model.use_remove_padding=false",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.rollout.name=transformers",
        "actor_rollout_ref.rollout.dtype=float32",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "reward.num_workers=1",
        "data.dataloader_num_workers=0",
    ]
