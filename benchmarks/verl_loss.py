"""What a policy loss costs in verl: ours against verl's vanilla, loss, metrics and backward pass, on 64 x 4096 tokens.

All losses take turns on the same tokens, a quarter of which do not count. Ours measure the trust region too; with
``histograms`` the counts that a run folder's report is drawn from are among the metrics. The log-probs are leaves: in
training the model's forward and backward pass, some thousand times as long, come on top for all alike.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor
from verl.trainer.config import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

from benchmarks import measure, tables
from drpo.integrations.verl import PolicyLoss
from drpo.integrations.verl.config import LOSS_MODES, why_not_in_verl
from drpo.integrations.verl.metrics import MEASURED
from drpo.objectives import OBJECTIVES

SHAPE = (64, 4096)
ROUNDS = 41
PACKAGES = ("torch", "verl")


def rollout() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    old = torch.rand(SHAPE, generator=generator).clamp(min=1e-6).log()
    return {
        "old_log_prob": old.to(device),
        "log_prob": (old + 0.1 * torch.randn(SHAPE, generator=generator)).clamp(max=-1e-4).to(device),
        "advantages": torch.randn(SHAPE[0], 1, generator=generator).expand(SHAPE).contiguous().to(device),
        "response_mask": (torch.arange(SHAPE[1]) < torch.linspace(SHAPE[1] / 2, SHAPE[1], SHAPE[0])[:, None]).to(
            device
        ),
    }


def losses() -> dict[str, PolicyLossConfig]:
    bypass = RolloutCorrectionConfig(rollout_is=None, bypass_mode=True)
    return {
        "vanilla": PolicyLossConfig(),
        **{
            mode: PolicyLoss(loss_mode=mode, rollout_correction=bypass)
            for mode, name in LOSS_MODES.items()
            if why_not_in_verl(OBJECTIVES[name]) is None
        },
        "drpo, histograms": PolicyLoss(loss_mode="drpo", rollout_correction=bypass, histograms=True),
    }


def update(policy_loss: PolicyLossConfig, tensors: dict[str, Tensor]) -> None:
    """The loss of a micro-batch that is a whole update, and its backward pass."""
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, policy_loss=policy_loss)
    log_prob = tensors["log_prob"].clone().requires_grad_()
    function: Any = get_policy_loss_fn(policy_loss.loss_mode)
    loss, _ = function(**{**tensors, "log_prob": log_prob}, loss_agg_mode="token-mean", config=config)
    loss.backward()
    MEASURED.reset()


def run(command: str) -> list[dict[str, Any]]:
    # What Ray gives a worker.
    torch.set_num_threads(1)
    tensors = rollout()
    work = {name: lambda loss=loss: update(loss, tensors) for name, loss in losses().items()}
    times = measure.seconds(work, ROUNDS)
    provenance = {"threads": torch.get_num_threads(), **tables.provenance(command, PACKAGES)}
    return [
        {
            "loss": name,
            "tokens": f"{SHAPE[0]} x {SHAPE[1]}",
            "median_ms": f"{1000 * statistics.median(spent):.2f}",
            "times_vanilla": f"{measure.ratio(spent, times['vanilla']):.2f}",
        }
        | provenance
        for name, spent in times.items()
    ]
