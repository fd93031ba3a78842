"""The audits of a trainer: of sampler and trainer before the first update, and of the sampler's weights at each rollout."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from drpo.rollout.audit import Audit, AuditedPolicy, AuditError, Difference, log_odds_mean, log_odds_sums
from drpo.trainer.batch import RolloutBatch, loss_mask, select

if TYPE_CHECKING:
    from drpo.trainer.trainer import DRPOTrainer

logger = logging.getLogger(__name__)

PROBES = 8
"""Sequences of a rollout, on each rank, that the trainer scores again later."""

NEGLIGIBLE = 1e-4
"""A mean change of log-odds, in nats, for which no sampler is called stale: rounding makes less."""

CLEAR = 3
"""How many times the largest gap between engines the change has to be, so that the two are not taken for one another."""

ENOUGH = 0.5
"""A mean over tokens with less total weight (:func:`~drpo.rollout.audit.log_odds_sums`) is too uncertain to audit; two tokens at π = 1/2 have as much."""


class _Probe(NamedTuple):
    """Sequences of a rollout, and π of their tokens when it began, [B, C]."""

    batch: RolloutBatch
    prob: Tensor


class RolloutAudits:
    """Whether the sampler has the trainer's policy: at the first update of a run, and of each rollout.

    At the first, |log π − log μ| is compared with a threshold (:class:`~drpo.rollout.audit.Audit`). A sampler that
    keeps old weights passes that. From the second rollout on, the gap between log-odds under π and μ at the rollout's first
    update is compared with how far the trainer's own have moved since the first rollout and since the last one, on a few of
    their sequences. With the new weights the gap stays what engine and precision make of it; with old ones it is as large
    as the change.

    Args:
        trainer: whose rollouts they are.
        may_be_stale: whether something else samples than the policy itself, which has no other weights to be behind with.

    Attributes:
        first: the audit of the first update that has tokens; None before.
    """

    def __init__(self, trainer: DRPOTrainer, may_be_stale: bool) -> None:
        self.first: Audit | None = None
        self._trainer, self._may_be_stale = trainer, may_be_stale
        self._probes: list[_Probe] = []
        self._changes: list[tuple[float, float]] = []
        self._largest_gap: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"probes": [tuple(probe) for probe in self._probes], "largest_gap": self._largest_gap}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._probes = [_Probe(*probe) for probe in state_dict["probes"]]
        self._largest_gap = state_dict["largest_gap"]

    def begin_rollout(self, batch: RolloutBatch) -> None:
        """Measure what the updates since earlier rollouts changed, before any update on this one. All ranks call it together."""
        if not self._may_be_stale:
            return
        self._changes = [self._change(probe) for probe in self._probes]
        rows = select(batch, torch.arange(min(PROBES, len(batch["completion_ids"]))))
        self._probes = [*self._probes[:1], _Probe(rows, self._probs(rows))]

    def end_update(self, difference: Difference) -> None:
        """Audit the first update of a rollout, before the optimizer makes it.

        Raises:
            AuditError: sampler and trainer do not describe one policy.
        """
        if not difference.tokens:
            return
        trainer = self._trainer
        metrics = trainer._metrics["train"]
        metrics["audit/gap"].append(difference.log_odds)
        if self._changes:
            metrics["audit/change"].append(self._changes[-1][0])
        if self.first is None:
            policy = audited_policy(trainer)
            self.first = policy.audit(difference, trainer.args.audit_threshold)
            if trainer.accelerator.is_main_process:
                print(self.first)
            metrics["audit/logp_difference_mean"].append(difference.mean)
            metrics["audit/logp_difference_max"].append(difference.maximum)
            self.first.check(policy.likely_causes())
        if difference.weight >= ENOUGH:
            self._check_weights(difference.log_odds)

    def _check_weights(self, gap: float) -> None:
        largest = self._largest_gap
        changes = [change for change, weight in self._changes if weight >= ENOUGH]
        if largest is not None:
            for change in changes:
                if change > max(NEGLIGIBLE, CLEAR * largest) and gap > (largest + change) / 2:
                    self._report_stale(gap, largest, change)
                    return
        # A gap as large as a change may be that change, of a sampler that is behind by too little to tell yet.
        if largest is None or not any(change / 2 < gap < 2 * change for change in changes):
            self._largest_gap = max(gap, largest or 0.0)

    def _report_stale(self, gap: float, largest: float, change: float) -> None:
        message = (
            f"the sampler did not get the new weights: before any update on this rollout its log-odds are {gap:.2g} nats from "
            f"the trainer's, where {largest:.2g} was the most on earlier ones, and the updates in between changed the "
            f"trainer's own by {change:.2g}. Send the sampler the weights before each rollout"
        )
        if self._trainer.args.stale_sampler == "stop":
            raise AuditError(f"{message}; with stale_sampler='warn' training goes on")
        logger.warning("%s.", message[0].upper() + message[1:])

    def _probs(self, batch: RolloutBatch) -> Tensor:
        trainer = self._trainer
        # Without dropout, which would also take random numbers from those of the run.
        trainer.model.eval()
        try:
            return trainer._micro_batches.log_probs(batch, trainer._score_without_loss).exp()
        finally:
            trainer.model.train()

    def _change(self, probe: _Probe) -> tuple[float, float]:
        sums = log_odds_sums(self._probs(probe.batch), probe.prob, loss_mask(probe.batch).bool())
        return log_odds_mean(self._trainer.accelerator.gather(sums).view(-1, 2))


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
        replays_experts=trainer.args.router_replay,
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
