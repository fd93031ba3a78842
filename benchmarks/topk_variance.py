"""How much variance drpo_topk takes out of DRPO's gradient, by the size of its support; exact, nothing is sampled.

One position with a long-tailed vocabulary of 1,024 tokens: every token is taken as the sampled one in turn, with
A = 1 and A = −1, and weighed by its probability. The gradient is that of the logits, and its variance per sample
(so the ratio of two is that at equal batch, whatever the batch) the trace of its covariance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from drpo import Objective, TokenBatch, make_objective
from drpo.objectives import TopKObjective
from drpo.tokens import TopK

VOCABULARY = 1024
DELTA = 0.2
SUPPORTS = (1, 4, 20, VOCABULARY)
DISTANCES = (0.02, 0.1, 0.3)
"""Total variation between π and μ."""


def policies(distance: float) -> tuple[Tensor, Tensor]:
    """log π and log μ, [V]: μ falls off as the square of the rank, π is μ under noise that moves it this far."""
    noise = torch.randn(VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    behavior_logp = (-2 * torch.arange(1, VOCABULARY + 1, dtype=torch.float64).log()).log_softmax(dim=0)
    low, high = 0.0, 20.0
    for _ in range(60):
        scale = (low + high) / 2
        logp = (behavior_logp + scale * noise).log_softmax(dim=0)
        if (logp.exp() - behavior_logp.exp()).abs().sum() / 2 < distance:
            low = scale
        else:
            high = scale
    return logp, behavior_logp


def gradients(objective: Objective, logp: Tensor, behavior_logp: Tensor, top_k: int, advantage: float) -> Tensor:
    """The gradient of the loss by the logits, [V, V], a row for each token that may have been sampled."""
    size = len(logp)
    tokens = torch.arange(size).view(size, 1, 1)
    support = behavior_logp.topk(top_k).indices.expand(size, 1, top_k)
    batch = TokenBatch(
        logp=logp.unsqueeze(1),
        behavior_logp=behavior_logp.unsqueeze(1),
        advantage=torch.full((size,), advantage, dtype=torch.float64),
        mask=torch.ones(size, 1),
        topk=TopK(logp[support], behavior_logp[support], support == tokens),
    )
    by_log_prob = torch.zeros(size, size, dtype=torch.float64)
    if isinstance(objective, TopKObjective):
        by_log_prob.scatter_add_(1, support.squeeze(1), -objective.top_k_coefficient(batch).squeeze(1))
    by_log_prob -= torch.diag(objective.coefficient(batch).squeeze(1))
    return by_log_prob - by_log_prob.sum(dim=1, keepdim=True) * logp.exp()


def variance(per_token: dict[float, Tensor], behavior_prob: Tensor) -> float:
    """The trace of the covariance over tokens ~ μ and both signs of the advantage."""
    stacked = torch.stack(list(per_token.values()))
    weight = behavior_prob.view(1, -1, 1) / len(stacked)
    mean = (weight * stacked).sum(dim=(0, 1))
    return ((weight.squeeze(2) * stacked.square().sum(dim=2)).sum() - mean.square().sum()).item()


def run(command: str) -> list[dict[str, Any]]:
    provenance = tables.provenance(command)
    rows: list[dict[str, Any]] = []
    for distance in DISTANCES:
        logp, behavior_logp = policies(distance)
        behavior_prob = behavior_logp.exp()

        def both(
            objective: Objective, top_k: int, logp: Tensor = logp, mu: Tensor = behavior_logp
        ) -> dict[float, Tensor]:
            return {sign: gradients(objective, logp, mu, top_k, sign) for sign in (1.0, -1.0)}

        plain, drpo = both(make_objective("pg"), 1), both(make_objective("drpo", delta=DELTA), 1)
        reference = [variance(g, behavior_prob) for g in (_minus(drpo, plain), drpo)]
        for top_k in SUPPORTS:
            ours = both(make_objective("drpo_topk", delta=DELTA), top_k)
            of_penalty, whole = (variance(g, behavior_prob) for g in (_minus(ours, plain), ours))
            rows.append(
                {
                    "total_variation": distance,
                    "delta": DELTA,
                    "vocabulary": VOCABULARY,
                    "top_k": top_k,
                    "mass_of_top_k": f"{behavior_prob.topk(top_k).values.sum().item():.4f}",
                    "penalty_variance_over_drpo": f"{of_penalty / reference[0]:.4g}",
                    "gradient_variance_over_drpo": f"{whole / reference[1]:.4g}",
                    **provenance,
                }
            )
    return rows


def _minus(gradients: dict[float, Tensor], others: dict[float, Tensor]) -> dict[float, Tensor]:
    return {sign: gradient - others[sign] for sign, gradient in gradients.items()}
