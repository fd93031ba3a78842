"""Token batches for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from drpo import TokenBatch

# Where a kink is the point, a test names the hyperparameters; elsewhere these put tokens on both sides of every bound.
TIGHT = {
    "drpo": {"delta": 0.1},
    "dppo_tv": {"delta": 0.1},
    "mask_drpo": {"delta": 0.1},
    "dppo_kl": {"delta": 0.05},
    "spo": {"epsilon": 0.5},
    "cispo": {"clip_low": 0.2, "clip_high": 0.2},
    "sapo": {"tau_positive": 1.0, "tau_negative": 2.0},
    "dgpo": {"clip_low": 0.2, "clip_high": 0.28, "low_power": 2.0, "high_root": 3.0},
    "ppo": {"clip_low": 0.2, "clip_high": 0.28},
    "pg": {},
}


def tokens(prob: list[float], behavior_prob: list[float], advantage: list[float]) -> TokenBatch:
    """One row of tokens in fp64, all of which count."""
    logp, behavior_logp = (torch.tensor([p], dtype=torch.float64).log() for p in (prob, behavior_prob))
    advantages = torch.tensor([advantage], dtype=torch.float64)
    return TokenBatch(logp=logp, behavior_logp=behavior_logp, advantage=advantages, mask=torch.ones_like(logp))


def one_token(prob: float, behavior_prob: float, advantage: float) -> TokenBatch:
    return tokens([prob], [behavior_prob], [advantage])


def random_tensors(
    seed: int, shape: tuple[int, int] = (6, 9), spread: float = 1.0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """What TokenBatch takes, with NaN where masked; ``logp`` is a leaf that wants a gradient.

    ``spread`` is the standard deviation of the log-ratio. A seventh of the advantages are 0, a third of the tokens masked.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    behavior_logp = uniform().log()
    logp = (behavior_logp + spread * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    advantage = torch.where(uniform() < 1 / 7, 0.0, torch.randn(shape, generator=generator, dtype=torch.float64))
    mask = uniform() > 1 / 3
    logp, behavior_logp, advantage = (
        torch.where(mask, t, torch.nan).to(dtype) for t in (logp, behavior_logp, advantage)
    )
    return {
        "logp": logp.requires_grad_(),
        "behavior_logp": behavior_logp,
        "advantage": advantage,
        "mask": mask,
    }
