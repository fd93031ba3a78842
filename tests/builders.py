"""Token batches for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from drpo import OBJECTIVES, TokenBatch, make_objective
from drpo.objectives import CORRECTIONS, Corrected, Objective, make_correction
from drpo.tokens import TopK

# Where a kink is the point, a test names the hyperparameters; elsewhere these put tokens on both sides of every bound.
TIGHT: dict[str, dict[str, Any]] = {name: {} for name in OBJECTIVES} | {
    "drpo": {"delta": 0.1},
    "mask_drpo": {"delta": 0.1},
    "drpo_topk": {"delta": 0.1},
    "drpo_unweighted": {"delta": 0.1},
    "drpo_kl": {"beta": 0.5},
    "drpo_tv": {"beta": 0.5},
    "drpo_k3": {"beta": 0.5},
    "dppo_tv": {"delta": 0.1},
    "dppo_topk_tv": {"delta": 0.2},
    "dppo_topk_kl": {"delta": 0.2},
    "ipo": {"delta": 0.1},
    "m2po": {"clip_low": 0.5, "clip_high": 1.0},
    "clip_cov": {"clip_low": 0.5, "clip_high": 1.0, "share": 0.3, "cov_low": 0.1},
    "kl_cov": {"share": 0.5, "beta": 0.5},
    "rollout_is": {"clip_low": 0.1, "clip_high": 2.0},
    "cppo": {"delta": 0.1},
    "cppo_soft": {"delta": 0.1},
    "mask_drpo_region": {"delta": 0.3, "region_delta": 0.1},
    "pg_tv_penalty": {"beta": 0.5},
    "pdm": {"delta": 0.1},
    "spo": {"epsilon": 0.5},
    "cispo": {"clip_low": 0.2, "clip_high": 0.2},
    "sapo": {"tau_positive": 1.0, "tau_negative": 2.0},
    "dgpo": {"clip_low": 0.2, "clip_high": 0.28, "low_power": 2.0, "high_root": 3.0},
    "gspo": {"clip_low": 0.2, "clip_high": 0.28},
    "icepop": {"mask_low": 0.7, "mask_high": 1.5},
    "ppo_dual_clip": {"clip_dual": 1.5},
    "dro": {"beta": 0.5},
}


# Of what is measured over a sequence, about half is out.
TIGHT_CORRECTIONS: dict[str, dict[str, Any]] = {
    "sequence_max_k3": {"delta": 0.3},
    "sequence_mean_k3": {"delta": 0.05},
    "sequence_geometric": {"low": 0.8, "high": 1.2},
    "opsm": {"delta": 0.02},
}

CORRECTED = {
    name: Corrected(make_objective("ppo"), make_correction(name, **TIGHT_CORRECTIONS.get(name, {})))
    for name in CORRECTIONS
}


def objective_of(name: str, tight: bool) -> Objective:
    """An objective of the registry, or PPO under a correction."""
    return CORRECTED[name] if name in CORRECTED else make_objective(name, **(TIGHT[name] if tight else {}))


EVERY = pytest.mark.parametrize(
    ("name", "tight"),
    [
        *((name, False) for name in (*OBJECTIVES, *CORRECTED)),
        *(pytest.param(name, True, id=f"{name}-tight") for name, tight in TIGHT.items() if tight),
    ],
)


def tokens(prob: list[float], behavior_prob: list[float], advantage: list[float]) -> TokenBatch:
    """One row of tokens in fp64, all of which count."""
    logp, behavior_logp = (torch.tensor([p], dtype=torch.float64).log() for p in (prob, behavior_prob))
    advantages = torch.tensor([advantage], dtype=torch.float64)
    return TokenBatch(logp=logp, behavior_logp=behavior_logp, advantage=advantages, mask=torch.ones_like(logp))


def anchored_tokens(
    prob: list[float], old_prob: list[float], behavior_prob: list[float], advantage: list[float]
) -> TokenBatch:
    """The same, with their ratio taken against π_old."""
    old_logp = torch.tensor([old_prob], dtype=torch.float64).log()
    return replace(tokens(prob, behavior_prob, advantage), old_logp=old_logp, anchor="old")


def one_token(prob: float, behavior_prob: float, advantage: float) -> TokenBatch:
    return tokens([prob], [behavior_prob], [advantage])


def random_tensors(
    seed: int, shape: tuple[int, int] = (6, 9), spread: float = 1.0, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """What TokenBatch takes, with NaN where masked; ``logp`` and ``topk.logp`` are leaves that want a gradient.

    ``spread`` is the standard deviation of the log-ratio. A seventh of the advantages are 0, a third of the tokens
    masked. The sampler's top three hold the sampled token in half of the places.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    behavior_logp = uniform().log()
    logp = (behavior_logp + spread * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    advantage = torch.where(uniform() < 1 / 7, 0.0, torch.randn(shape, generator=generator, dtype=torch.float64))
    mask = uniform() > 1 / 3
    old_logp = (behavior_logp + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    is_sampled = torch.zeros((*shape, 3), dtype=torch.bool)
    is_sampled[..., 0] = uniform() < 0.5

    def over_support(sampled: Tensor) -> Tensor:
        """What the sampled token leaves, over five other tokens of which the support holds two or three."""
        others = torch.randn((*shape, 5), generator=generator, dtype=torch.float64).log_softmax(dim=2)
        others = others + (-sampled.expm1()).log().unsqueeze(2)
        return torch.where(is_sampled, sampled.unsqueeze(2), others[..., :3])

    topk = TopK(over_support(logp), over_support(behavior_logp), is_sampled)
    logp, behavior_logp, old_logp, advantage = (
        torch.where(mask, t, torch.nan).to(dtype) for t in (logp, behavior_logp, old_logp, advantage)
    )
    topk_logp, topk_behavior_logp = (
        torch.where(mask.unsqueeze(2), t, torch.nan).to(dtype) for t in (topk.logp, topk.behavior_logp)
    )
    return {
        "logp": logp.requires_grad_(),
        "behavior_logp": behavior_logp,
        "advantage": advantage,
        "mask": mask,
        "old_logp": old_logp,
        "topk": TopK(topk_logp.requires_grad_(), topk_behavior_logp, is_sampled),
    }


def batch_of(objective: Objective, given: dict[str, Any]) -> TokenBatch:
    """Anchored on the sampler, or on the old policy for an objective that weighs by π_old/μ."""
    return TokenBatch(**given, anchor="old" if objective.corrects_mismatch else "sampler")


def gradients(loss: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of the summed loss by log π: of the sampled tokens [B, T], wherever it enters, and of the others in the support [B, T, K]."""
    topk: TopK = given["topk"]
    leaves = [given["logp"], topk.logp]
    # Several losses may share a graph.
    by_logp, by_topk = torch.autograd.grad(loss.sum(), leaves, allow_unused=True, retain_graph=True)
    by_logp = torch.zeros_like(given["logp"]) if by_logp is None else by_logp
    by_topk = torch.zeros_like(topk.logp) if by_topk is None else by_topk
    return by_logp + (by_topk * topk.is_sampled).sum(dim=2), by_topk.masked_fill(topk.is_sampled, 0.0)


def indexed(given: dict[str, Any], index: Any) -> dict[str, Any]:
    """What TokenBatch takes, at some of its places; ``old_logp`` and ``topk`` too."""

    def at(value: Any) -> Any:
        if isinstance(value, str):
            return value
        return TopK(*(tensor[index] for tensor in vars(value).values())) if isinstance(value, TopK) else value[index]

    return {name: at(value) for name, value in given.items()}


class FrozenStops(TorchFunctionMode):
    """What the first pass detaches is what every later pass gets: a loss with stopped gradients as a function of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Tensor] = []
        self._passes = 0
        self._next = 0

    def __enter__(self) -> FrozenStops:
        self._next = 0
        self._passes += 1
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.detach:
            return result
        if self._passes == 1:
            self._kept.append(result)
        self._next += 1
        return self._kept[self._next - 1]
