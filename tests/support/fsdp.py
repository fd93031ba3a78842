"""Gradients of the fused loss under FSDP2 on two ranks against those of one process: ``torchrun fsdp.py``, exit code 1 if they differ."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from drpo import PackedTokens, make_objective
from drpo.trainer.fused_head import ScoredTokens, add_policy_loss
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
    return model(input_ids=ids[:, :-1], scored=ScoredTokens(places, make_objective("drpo"), tokens)).loss


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def main(head_apart: bool) -> bool:
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
    expected, found = gradients(whole), gradients(sharded)
    errors = {name: ((found[name] - grad).norm() / grad.norm()).item() for name, grad in expected.items()}
    return expected.keys() == found.keys() and max(errors.values()) < 1e-5


if __name__ == "__main__":
    dist.init_process_group("gloo")
    agrees = main(head_apart=sys.argv[1] == "apart")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(not agrees)
