"""What the audit has to know of a trainer: what its policy computes in, and what its rollouts are sampled with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo.rollout.audit import AuditedPolicy

if TYPE_CHECKING:
    from drpo.trainer.trainer import DRPOTrainer


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
