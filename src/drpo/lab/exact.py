"""Bias and variance of each objective's gradient where they can be summed over the whole vocabulary.

One token is drawn from μ over a vocabulary that follows Zipf's law; the policy π differs from μ by rounding or by
updates. Of the gradient by the logits z of π, an objective's estimate from one token v ~ μ is r·w·A·(e_v − π), and the
policy gradient itself is Σ_v π_v A_v (e_v − π). Both moments of the estimate are sums over v, so nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drpo.lab.grid import ARMS, Arm
from drpo.objectives import Objective, make_objective
from drpo.tokens import TokenBatch

VOCABULARY = 4096
TAIL = 2.0
"""The token of rank k has a logit of −TAIL·log k and noise: then 7.8 % of what is drawn has μ ≤ 0.01, as in the paper."""

MU_EDGES = (0.001, 0.01, 0.1)
"""Between the buckets that moments are told apart by."""

EXACT_ARMS = ("pg", "ppo", "spo", "dppo_tv(0.15)", "drpo(0.05)", "drpo(0.2)", "drpo(12.5)", "mask_drpo", "cispo")


class Moments(NamedTuple):
    """Of an objective's gradient estimate, over the norm of the policy gradient.

    Attributes:
        bias: the norm of its mean less the policy gradient.
        deviation: its standard deviation, the root of the trace of its covariance.
        cosine: between its mean and the policy gradient.
        second_moment_share: of E‖ĝ‖², what tokens of each bucket of μ contribute, rarest first.
    """

    bias: float
    deviation: float
    cosine: float
    second_moment_share: tuple[float, ...]


def moments(objective: Objective, log_pi: Tensor, log_mu: Tensor, advantage: Tensor) -> Moments:
    """The moments of one token's estimate.

    Args:
        objective: over single tokens, anchored on the sampler.
        log_pi: [V], fp64.
        log_mu: [V], fp64.
        advantage: [V], of each token.
    """
    pi, mu = log_pi.exp(), log_mu.exp()
    # Each token is a sequence of its own, as if it had been drawn.
    batch = TokenBatch(
        logp=log_pi.unsqueeze(1),
        behavior_logp=log_mu.unsqueeze(1),
        advantage=advantage,
        mask=torch.ones(len(pi), 1),
    )
    coefficient = advantage * (log_pi - log_mu).exp() * objective.gradient_weight(batch).squeeze(1)
    policy_gradient = pi * (advantage - (pi * advantage).sum())
    weighted = mu * coefficient
    mean = weighted - pi * weighted.sum()
    # ‖e_v − π‖² = 1 − 2π_v + ‖π‖²
    squared = mu * coefficient.square() * (1 - 2 * pi + pi.square().sum())
    norm = policy_gradient.norm()
    buckets = torch.bucketize(mu, torch.tensor(MU_EDGES, dtype=mu.dtype))
    shares = tuple((squared[buckets == bucket].sum() / squared.sum()).item() for bucket in range(len(MU_EDGES) + 1))
    return Moments(
        bias=((mean - policy_gradient).norm() / norm).item(),
        deviation=((squared.sum() - mean.square().sum()).clamp(min=0).sqrt() / norm).item(),
        cosine=torch.nn.functional.cosine_similarity(mean, policy_gradient, dim=0).item(),
        second_moment_share=shares,
    )


def policies(mismatch: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """log π, log μ and advantages over the vocabulary, [V] each in fp64.

    Args:
        mismatch: ``bf16`` and ``fp8`` round the logits that μ is made of; ``stale`` has π moved by updates: up where
            the advantage is positive and down where it is negative, with noise as large.
        seed: of logits, advantages and noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)

    logits = -TAIL * torch.arange(1, VOCABULARY + 1, dtype=torch.float64).log() + 0.5 * normal()
    # A verifiable reward: a fifth of the tokens is right.
    reward = (torch.rand(VOCABULARY, generator=generator) < 0.2).double()
    moved = logits + 0.3 * (2 * reward - 1) + 0.3 * normal()
    rounded = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    pi, mu = (moved, logits) if mismatch == "stale" else (logits, logits.to(rounded[mismatch]).double())
    log_mu = mu.log_softmax(dim=0)
    return pi.log_softmax(dim=0), log_mu, reward - (log_mu.exp() * reward).sum()


MISMATCHES = ("bf16", "fp8", "stale")


def study(arms: Sequence[str] = EXACT_ARMS, seeds: int = 20) -> list[tuple[str, Arm, Moments]]:
    """The moments of each arm under each mismatch, means over ``seeds`` drawn vocabularies."""
    rows = []
    for mismatch in MISMATCHES:
        drawn = [policies(mismatch, seed) for seed in range(seeds)]
        for arm in map(ARMS.__getitem__, arms):
            objective = make_objective(arm.objective, **arm.hyperparameters)
            every = [moments(objective, *tensors) for tensors in drawn]
            bias, deviation, cosine, shares = zip(*every, strict=True)
            mean_shares = tuple(sum(bucket) / seeds for bucket in zip(*shares, strict=True))
            rows.append(
                (mismatch, arm, Moments(sum(bias) / seeds, sum(deviation) / seeds, sum(cosine) / seeds, mean_shares))
            )
    return rows
