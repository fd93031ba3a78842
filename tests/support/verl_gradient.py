"""The update of rollouts.py through verl's FSDP2 engine on the CPU; saves the gradient by size of micro-batch.

python verl_gradient.py FOLDER LOSS_MODE MICRO_BATCH_SIZE... writes FOLDER/MICRO_BATCH_SIZE.safetensors of each, in the environment of drpo.integrations.verl.cpu.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed
from rollouts import GROUP, MODEL, SEQUENCES, made_up_reward, made_up_rollout
from safetensors.torch import save_file
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig, RolloutCorrectionConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import BaseEngine, EngineRegistry
from verl.workers.utils.losses import ppo_loss

from drpo import group_advantage
from drpo.data.problems import builtin_problems
from drpo.integrations.verl import PolicyLoss


def batch(tokenizer: Any) -> TensorDict:
    """The sequences as verl's trainer sends them: nested, without padding."""
    prompts = [p.prompt for p in builtin_problems("train", SEQUENCES // GROUP, 0) for _ in range(GROUP)]
    rollout = made_up_rollout(prompts, SimpleNamespace(processing_class=tokenizer))
    rewards = torch.tensor(made_up_reward(prompts, rollout["completion_ids"]))
    advantages = group_advantage(rewards, GROUP, "mean")
    columns: dict[str, list[torch.Tensor]] = {}
    for prompt, completion, log_probs, advantage in zip(
        rollout["prompt_ids"], rollout["completion_ids"], rollout["logprobs"], advantages, strict=True
    ):
        row = {
            "prompts": torch.tensor(prompt),
            "responses": torch.tensor(completion),
            "input_ids": torch.tensor(prompt + completion),
            "position_ids": torch.arange(len(prompt + completion)),
            "response_mask": torch.ones(len(completion), dtype=torch.long),
            "loss_mask": torch.ones(len(completion), dtype=torch.long),
            "old_log_probs": torch.tensor(log_probs),
            "advantages": advantage.expand(len(completion)).clone(),
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    nested = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in columns.items()}
    return TensorDict(nested, batch_size=[SEQUENCES])


def engine_of(model: HFModelConfig) -> BaseEngine:
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=model,
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            model_dtype="fp32",
            # Without it the model runs in bf16.
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            use_torch_compile=False,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-4),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def main(folder: Path, mode: str, micro_batch_sizes: list[int]) -> None:
    torch.distributed.init_process_group("gloo")
    override = {"attn_implementation": "eager"}
    model = HFModelConfig(path=MODEL, override_config=override, enable_gradient_checkpointing=False)
    engine = engine_of(model)
    for micro_batch_size in micro_batch_sizes:
        gradient = gradient_of(engine, model, mode, micro_batch_size)
        save_file(gradient, folder / f"{micro_batch_size}.safetensors")
    torch.distributed.destroy_process_group()


def gradient_of(engine: BaseEngine, model: HFModelConfig, mode: str, micro_batch_size: int) -> dict[str, torch.Tensor]:
    bypass = RolloutCorrectionConfig(rollout_is=None, bypass_mode=True)
    actor = ActorConfig(
        strategy="fsdp2",
        rollout_n=GROUP,
        ppo_micro_batch_size_per_gpu=micro_batch_size,
        policy_loss=PolicyLoss(loss_mode=mode, rollout_correction=bypass),
    )
    data = batch(model.tokenizer)
    tu.assign_non_tensor(
        data,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=micro_batch_size,
        use_remove_padding=False,
        use_fused_kernels=False,
        temperature=1.0,
        global_batch_size=SEQUENCES,
        calculate_entropy=False,
    )
    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(data, partial(ppo_loss, config=actor))
        return {
            name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).detach().contiguous().clone()
            for name, p in engine.module.named_parameters()
            if p.grad is not None
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [int(size) for size in sys.argv[3:]])
