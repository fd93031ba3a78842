"""verl's trainer on a CPU, whole: a platform and a rollout backend, as plug-ins and without an edit to verl.

With this folder's parent on PYTHONPATH, and in the environment

    VERL_USE_EXTERNAL_MODULES=verl_cpu  VERL_PLATFORM=cpu  VERL_ENGINE_DEVICE=cuda

(the engines are registered for "cuda"; what they compute on is the platform's device), run
``python -m verl.trainer.main_ppo`` with :data:`SETTINGS`. Rollouts are sampled by Transformers, with
the log-probs of the distribution that was sampled from, in a Ray actor.
"""

from __future__ import annotations

import os
from pathlib import Path

from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry

from verl_cpu import platform  # noqa: F401


def _replica():
    from verl_cpu.rollout import Replica

    return Replica


_ROLLOUT_REGISTRY[("transformers", "async")] = "verl_cpu.rollout.Adapter"
RolloutReplicaRegistry.register("transformers", _replica)

ENVIRONMENT = {
    "VERL_USE_EXTERNAL_MODULES": "verl_cpu",
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def settings(workers: int = 1) -> list[str]:
    """Overrides for ``main_ppo``, for so many training processes on this machine."""
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
        "actor_rollout_ref.actor.fsdp_config.dtype=float32",
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
