"""What two ranks have to agree on, each checked in turn: ``torchrun --nproc-per-node=2 ranks.py``, exit code 1 if something fails."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from drpo import DRPOConfig, PackedTokens, make_objective
from drpo.data.problems import builtin_problems
from drpo.trainer.batch import RolloutBatch, loss_mask
from drpo.trainer.fused_head import ScoredTokens, add_policy_loss
from drpo.trainer.heldout import evaluate
from drpo.trainer.micro_batches import MicroBatches, PaddedRows
from drpo.trainer.state_file import load_state, save_state
from support.rollouts import load_model

SEQUENCES, LENGTH = 4, 8


def loss(model: Any, ids: Tensor, advantage: Tensor) -> Tensor:
    """Of all tokens but each sequence's first, each counting as its share of all ranks'."""
    places = torch.ones(len(ids), LENGTH, dtype=torch.bool)
    tokens = PackedTokens(
        token_ids=ids[:, 1:].flatten(),
        behavior_logp=torch.full((ids.shape[0] * LENGTH,), -3.0),
        advantage=advantage.flatten(),
        scale=torch.full((ids.shape[0] * LENGTH,), 1 / (SEQUENCES * LENGTH)),
    )
    return model(input_ids=ids[:, :-1], scored=ScoredTokens(places, make_objective("drpo"), tokens))[0].loss


def gradients(model: Any) -> dict[str, Tensor]:
    sharded = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in sharded.items()}


def has_the_gradient_of_one_process(head_apart: bool) -> bool:
    """Whether the fused loss has it where FSDP2 shards the head by itself, or with the rest."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(90, (SEQUENCES, LENGTH + 1), generator=generator)
    advantage = torch.randn(SEQUENCES, LENGTH, generator=generator)
    whole, sharded = (load_model()[0] for _ in range(2))
    for model in (whole, sharded):
        # A head of its own, as a tied one cannot be apart.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        add_policy_loss(model, temperature=1.0)
    loss(whole, ids, advantage).backward()
    if head_apart:
        fully_shard(sharded.lm_head)
    fully_shard(sharded)
    own = slice(dist.get_rank() * SEQUENCES // 2, (dist.get_rank() + 1) * SEQUENCES // 2)
    # FSDP takes the mean over ranks.
    (2 * loss(sharded, ids[own], advantage[own])).backward()
    expected, actual = gradients(whole), gradients(sharded)
    errors = {name: ((actual[name] - grad).norm() / grad.norm()).item() for name, grad in expected.items()}
    return expected.keys() == actual.keys() and max(errors.values()) < 1e-5


def evaluates_fewer_problems_than_ranks() -> bool:
    """Whether ranks generate equally often, which in this trainer is a collective call, as it is under FSDP and with vLLM."""
    model, tokenizer = load_model()
    accelerator = Accelerator(cpu=True)

    def generate(prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], None]:
        accelerator.gather(torch.tensor([len(prompt_ids)]))
        return [tokenizer("12")["input_ids"] for _ in prompt_ids], None

    trainer: Any = SimpleNamespace(
        accelerator=accelerator,
        model=model,
        policy=model,
        processing_class=tokenizer,
        chat_template_kwargs={},
        state=None,
        args=SimpleNamespace(reward_timeout=None),
        _generate_single_turn=generate,
    )
    (problem, *_), three = builtin_problems("heldout", 1, 0), builtin_problems("heldout", 3, 0)
    counts = [
        len(evaluate(trainer, problems, lambda completions, **_: [1.0] * len(completions), 2, seed=0))
        for problems in ([problem], three)
    ]
    return counts == [2, 6]


def makes_equally_many_forward_passes() -> bool:
    """Whether every rank gets as many micro-batches as the busiest, also where it has nothing to compute."""
    accelerator = Accelerator(cpu=True)
    rows = 4
    batch: RolloutBatch = {
        "prompt_ids": torch.ones(rows, 3, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 3, dtype=torch.long),
        "completion_ids": torch.ones(rows, 2, dtype=torch.long),
        "completion_mask": torch.ones(rows, 2, dtype=torch.long),
    }
    keep = torch.full((rows,), accelerator.is_main_process)
    micro_batches = MicroBatches(accelerator, budget=10, layout=PaddedRows).split(batch, keep)
    counted = sum(int(loss_mask(part).sum()) for _, part in micro_batches)
    return len(micro_batches) == 2 and counted == (8 if accelerator.is_main_process else 0)


def loads_to_its_device() -> bool:
    """Whether a rank can load what a checkpoint holds to where its trainer computes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state"
        save_state(file, torch.arange(3))
        return load_state(file, DRPOConfig(folder, use_cpu=True, bf16=False).device).sum() == 3


CHECKS = {
    "loading of checkpoints": loads_to_its_device,
    "gradient of a head that is sharded by itself": lambda: has_the_gradient_of_one_process(head_apart=True),
    "gradient of a head that is sharded with the rest": lambda: has_the_gradient_of_one_process(head_apart=False),
    "held-out evaluation": evaluates_fewer_problems_than_ranks,
    "micro-batches": makes_equally_many_forward_passes,
}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    failures = [name for name, holds in CHECKS.items() if not holds()]
    dist.barrier()
    dist.destroy_process_group()
    sys.exit("; ".join(failures) or None)
