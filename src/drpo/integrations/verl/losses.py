"""The objectives as functions that verl calls."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, register_policy_loss
from verl.workers.config import ActorConfig

from drpo.integrations.verl.config import LOSS_MODES, objective_of
from drpo.integrations.verl.metrics import MEASURED
from drpo.objectives.base import MaskObjective
from drpo.tokens import TokenBatch

TOKENS_IN_CACHE = 2**15


class _Sampled(TokenBatch):
    """Tokens whose log-probs are constants, so that what follows from them can be kept."""

    @cached_property
    def ratio(self) -> Tensor:  # type: ignore[override]
        return self.log_ratio.exp()

    @cached_property
    def anchor_prob(self) -> Tensor:  # type: ignore[override]
        return self.anchor_logp.exp()

    @cached_property
    def excess(self) -> Tensor:  # type: ignore[override]
        return self.log_ratio.expm1()

    @cached_property
    def shift(self) -> Tensor:  # type: ignore[override]
        return self.anchor_prob * self.excess

    @cached_property
    def others_log_ratio(self) -> Tensor:  # type: ignore[override]
        return super().others_log_ratio


class _WithSlope(torch.autograd.Function):
    """A function of ``x``, elementwise, by its value and its slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None, None


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: ActorConfig,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a micro-batch and what its update has measured so far, for verl's ``ppo_loss``.

    Args:
        old_log_prob: [B, T], of the policy that the ratio is taken against: in bypass mode the sampler's, elsewhere
            π_old's, which then stand in for the sampler's in what is measured.
        log_prob: [B, T], of the policy being trained.
        advantages: [B, T].
        response_mask: [B, T], bool.
        loss_agg_mode: one of verl's, with the global counts in ``config``.
        config: of the actor; its ``policy_loss`` is a :class:`PolicyLoss`.
        rollout_is_weights: [B, T], verl's correction by π_old/μ, outside bypass mode.
    """
    objective = objective_of(config)
    values, slopes = [], []
    with torch.no_grad():
        for rows in _parts(log_prob):
            tokens = _Sampled(log_prob.detach()[rows], old_log_prob[rows], advantages[rows], response_mask[rows])
            weight = objective.gradient_weight(tokens)
            # ∂loss/∂log π = −A·r·w is the contract of an objective, so its loss needs no graph; where A = 0 w says nothing.
            if objective.acts_without_advantage:
                slope = -objective.coefficient(tokens)
            else:
                slope = -tokens.advantage * tokens.ratio * weight
            # What a mask keeps is linear in r, and so its own slope.
            value = slope if isinstance(objective, MaskObjective) else objective.loss(tokens)
            if rollout_is_weights is not None:
                value, weight, slope = (tensor * rollout_is_weights[rows] for tensor in (value, weight, slope))
            values.append(value)
            slopes.append(slope)
            MEASURED.add(tokens, weight)
    per_token: Any = _WithSlope.apply(log_prob, torch.cat(values), torch.cat(slopes))
    loss = agg_loss(per_token, response_mask.bool(), loss_agg_mode, **config.global_batch_info)
    return loss, MEASURED.given(config.policy_loss.histograms)


def _parts(tokens: Tensor) -> list[slice]:
    """Rows that are computed together: all of them, but on a CPU as many as its caches hold with all that follows from them."""
    step = max(1, TOKENS_IN_CACHE // max(1, tokens.shape[1])) if tokens.device.type == "cpu" else len(tokens)
    return [slice(start, start + step) for start in range(0, len(tokens), step)]


def register() -> dict[str, str]:
    """Give verl every objective; returns their names by ``loss_mode``.

    Raises:
        ValueError: another plug-in has taken one of the names.
    """
    for mode in LOSS_MODES:
        taken = POLICY_LOSS_REGISTRY.get(mode)
        if taken is not None and taken.__module__ != __name__:
            raise ValueError(f"loss_mode {mode!r} is already registered by {taken.__module__}")
        register_policy_loss(mode)(policy_loss)  # type: ignore[arg-type]
    return LOSS_MODES
