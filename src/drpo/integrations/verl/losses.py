"""The objectives as functions that verl calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, register_policy_loss
from verl.workers.config import ActorConfig

from drpo.integrations.verl.config import LOSS_MODES, objective_of
from drpo.integrations.verl.metrics import MEASURED
from drpo.tokens import TokenBatch


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
    is_broken = response_mask & ~(log_prob.isfinite() & old_log_prob.isfinite())
    tokens = TokenBatch(log_prob, old_log_prob, advantages, response_mask & ~is_broken)
    per_token, weight = objective.loss(tokens), objective.gradient_weight(tokens)
    if rollout_is_weights is not None:
        per_token, weight = per_token * rollout_is_weights, weight * rollout_is_weights
    info = config.global_batch_info
    MEASURED.add(tokens, weight, of=_sequences_of_an_update(info), counted=response_mask)
    # verl skips an update whose gradient is not finite, which that of a broken log-prob is with verl's own losses.
    loss = agg_loss(per_token, response_mask, loss_agg_mode, **info) * torch.where(is_broken.any(), torch.nan, 1.0)
    ranks, tokens_of_all = info.get("dp_size") or 1, info.get("batch_num_tokens")
    # verl counts the tokens that it rejects too, of which the mask says nothing.
    rejects = (config.policy_loss.rollout_correction or {}).get("rollout_rs") is not None
    update_tokens = None if tokens_of_all is None or rejects or ranks == 1 else int(tokens_of_all)
    return loss, MEASURED.take_micro_batch(config.policy_loss.histograms, ranks, update_tokens)


def _sequences_of_an_update(info: Mapping[str, Any]) -> int | None:
    """On one rank; None where verl does not say."""
    total = info.get("global_batch_size")
    return None if total is None else total // info["dp_size"]


def register() -> dict[str, str]:
    """Give verl every objective; returns their names by ``loss_mode``.

    Raises:
        ValueError: another plug-in has taken one of the names.
    """
    for mode in LOSS_MODES:
        registered = POLICY_LOSS_REGISTRY.get(mode)
        if registered is not None and registered.__module__ != __name__:
            raise ValueError(f"loss_mode {mode!r} is already registered by {registered.__module__}")
        register_policy_loss(mode)(policy_loss)  # type: ignore[arg-type]
    return LOSS_MODES
