from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives.base import Anchor, Objective
from drpo.objectives.regions import LOG_RATIO, Bound, Region, at
from drpo.tokens import TokenBatch


@dataclass(frozen=True)
class GMPO(Objective):
    """The geometric mean of a sequence's ratios, each clipped in log space on the side it moves away to (arXiv 2507.20673).

    The paper takes the mean over sequences (``seq-mean-token-mean``: all tokens of one have its loss).

    Args:
        clip_low: nats, how far log r may fall below 0 before a token with A < 0 stops counting.
        clip_high: nats, how far log r may rise above 0 before a token with A > 0 stops counting.
    """

    formula: ClassVar[str] = "G·A, G = exp(mean of log r clipped at clip_high where A > 0, at −clip_low where A < 0)"
    weight: ClassVar[str] = "0 where log r is clipped, else G / r"
    source: ClassVar[str] = "arXiv 2507.20673"
    anchor: ClassVar[Anchor] = "old"
    over_sequences: ClassVar[bool] = True
    region: ClassVar[Region | None] = Region(
        LOG_RATIO, low=Bound("−clip_low", lambda owner, _: -owner.clip_low), high=at("clip_high")
    )

    clip_low: float = 0.4
    clip_high: float = 0.4

    @property
    def weight_bounds(self) -> tuple[float, float]:
        return 0.0, math.inf

    def _mean(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """G and the tokens whose log-ratio is not clipped, both [B, T]."""
        log_ratio = batch.log_ratio.detach()
        clipped = torch.where(
            batch.advantage > 0, log_ratio.clamp(max=self.clip_high), log_ratio.clamp(min=-self.clip_low)
        )
        mean = (clipped.sum(dim=1, keepdim=True) / batch.length).exp().expand_as(log_ratio)
        return mean, clipped == log_ratio

    def loss(self, batch: TokenBatch) -> Tensor:
        mean, moves = self._mean(batch)
        # Each token's share of the gradient: G · (log r − sg(log r)), where it is not clipped.
        own = torch.where(moves, batch.log_ratio - batch.log_ratio.detach(), 0.0)
        return -mean * (1 + own) * batch.advantage

    def gradient_weight(self, batch: TokenBatch) -> Tensor:
        mean, moves = self._mean(batch)
        return torch.where(moves, mean / batch.ratio.detach(), 0.0)
