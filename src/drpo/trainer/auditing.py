"""The audits of a trainer: of sampler and trainer before the first update, and of the sampler's weights at each rollout."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drpo.rollout.audit import AuditedPolicy, AuditError, Differences
from drpo.trainer.batch import RolloutBatch, loss_mask, select

if TYPE_CHECKING:
    from drpo.trainer.trainer import DRPOTrainer

logger = logging.getLogger(__name__)

PROBES = 16
"""Sequences of a rollout, on each rank, that the audit of its weights scores."""

NEGLIGIBLE = 1e-4
"""A mean |change of log π|, in nats, for which no sampler is called stale."""

CLEAR = 4
"""How many times the gap between engines the change has to be, so that the two are not taken for one another."""


@dataclass(frozen=True)
class _Probe:
    """Some sequences of a rollout, with the trainer's log-probs when it began, [B, C], and the mean |log π − log μ| then."""

    batch: RolloutBatch
    logp: Tensor
    gap: float


class WeightsAudit:
    """Whether the sampler took the weights of each update, from a few sequences of each rollout.

    The trainer scores some sequences of the new rollout, which gives the gap |log π − log μ| under weights that
    should be one, and once more some of the first rollout and of the last one, which gives how far its own log-probs have
    changed since. A sampler that took the new weights keeps the gap that it had, whatever the engine or the precision
    makes of it; for one that did not the gap is as large as the change.

    Args:
        log_probs: the trainer's log-probs of a batch, [B, C], 0 where no token counts. All ranks call it together.
        gather: concatenates a tensor over ranks.
        stops: whether a stale sampler ends training; else it is warned of at each rollout.
    """

    def __init__(
        self, log_probs: Callable[[RolloutBatch], Tensor], gather: Callable[[Tensor], Tensor], stops: bool
    ) -> None:
        self._log_probs = log_probs
        self._gather = gather
        self._stops = stops
        self._probes: list[_Probe] = []

    def see(self, batch: RolloutBatch) -> dict[str, float]:
        """Audit a rollout that was sampled by weights of now, before any update on it; returns what was measured.

        Raises:
            AuditError: the sampler has older weights, unless that is only to be warned of.
        """
        batch = select(batch, torch.arange(min(PROBES, len(batch["completion_ids"]))))
        logp = self._log_probs(batch)
        gap = self._mean_difference(batch, logp, batch["sampling_per_token_logps"])
        if gap is None:
            return {}
        changes = [self._mean_difference(p.batch, self._log_probs(p.batch), p.logp) or 0.0 for p in self._probes]
        for probe, change in zip(self._probes, changes, strict=True):
            if change > max(NEGLIGIBLE, CLEAR * probe.gap) and gap > (probe.gap + change) / 2:
                self._report(gap, probe.gap, change)
                break
        self._probes = [*self._probes[:1], _Probe(batch, logp, gap)]
        return {"audit/gap": gap, **({"audit/change": changes[-1]} if changes else {})}

    def _report(self, gap: float, gap_before: float, change: float) -> None:
        message = (
            f"the sampler did not get the new weights: |log π − log μ| of its newest tokens is {gap:.2g} on average, it was "
            f"{gap_before:.2g}, and the updates in between changed the trainer's own log-probs by {change:.2g}. Send the "
            "sampler the weights before each rollout"
        )
        if self._stops:
            raise AuditError(f"{message}; with stale_sampler='warn' training goes on")
        logger.warning("%s.", message[0].upper() + message[1:])

    def _mean_difference(self, batch: RolloutBatch, logp: Tensor, other: Tensor) -> float | None:
        """Over the tokens of all ranks that count; None where there are none."""
        counted = loss_mask(batch).bool()
        difference = (logp - other).abs().masked_fill(~counted, 0.0).sum()
        total, tokens = self._gather(torch.stack([difference, counted.sum().to(difference)])).view(-1, 2).sum(dim=0)
        return (total / tokens).item() if tokens else None


def audited_policy(trainer: DRPOTrainer) -> AuditedPolicy:
    """The policy of a trainer beside what samples from it."""
    sampling = _sampling_settings(trainer)
    return AuditedPolicy(
        model=trainer.policy,
        temperature=trainer.temperature,
        precision=trainer.precision,
        rollout_precision=trainer.args.rollout_precision or trainer.precision,
        sampling=sampling,
        replays_support=trainer.args.replay_support,
        is_exact=sampling is not None and not trainer.use_vllm,
    )


def _sampling_settings(trainer: DRPOTrainer) -> dict[str, Any] | None:
    """What the rollout engine samples with; None where a rollout_func decides."""
    if trainer.rollout_func is not None:
        return None
    if trainer.use_vllm:
        overrides: Any = trainer.args.generation_kwargs or {}
        return {"temperature": trainer.temperature, **overrides}
    own: dict[str, Any] = trainer.generation_config.to_dict()
    # What TRL leaves open, Transformers takes from the model's generation_config.json.
    inherited = trainer.policy.generation_config.to_dict()
    return inherited | {name: value for name, value in own.items() if value is not None}


def make_weights_audit(trainer: DRPOTrainer) -> WeightsAudit:
    """The audit of the weights that a trainer's sampler has."""

    def log_probs(batch: RolloutBatch) -> Tensor:
        # Without dropout, which would also take random numbers from those of the run.
        trainer.model.eval()
        try:
            return trainer._micro_batches.log_probs(batch, trainer._score_unweighted)
        finally:
            trainer.model.train()

    return WeightsAudit(log_probs, trainer.accelerator.gather, stops=trainer.args.stale_sampler == "stop")


def audit_first_update(trainer: DRPOTrainer, differences: Differences) -> None:
    """Compare sampler and trainer over the first update that has tokens, as ``trainer.audit``.

    Raises:
        AuditError: they do not describe one policy.
    """
    mean, maximum, tokens = differences.take(trainer.accelerator.gather)
    if not tokens:
        return
    policy = audited_policy(trainer)
    trainer.audit = audit = policy.audit(mean, maximum, tokens, trainer.args.audit_threshold)
    if trainer.accelerator.is_main_process:
        print(audit)
    trainer._metrics["train"]["audit/logp_difference_mean"].append(mean)
    trainer._metrics["train"]["audit/logp_difference_max"].append(maximum)
    audit.check(policy.likely_causes())
