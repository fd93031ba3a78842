"""An objective and its hyperparameters in verl's configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any

from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, PolicyLossConfig

from drpo.objectives import OBJECTIVES, Objective, TopKObjective, make_objective
from drpo.registry import unknown_name

TARGET = "drpo.integrations.verl.PolicyLoss"
WHERE = "actor_rollout_ref.actor.policy_loss"

# A name of verl's own keeps verl's loss; what other plug-ins registered before this one is not verl's.
_OF_VERL = {name for name, loss in core_algos.POLICY_LOSS_REGISTRY.items() if loss.__module__ == core_algos.__name__}

LOSS_MODES: dict[str, str] = {(f"drpo/{name}" if name in _OF_VERL else name): name for name in OBJECTIVES}
"""Objectives by the ``loss_mode`` they have in verl: their own name, with ``drpo/`` before it where verl has a loss of that name."""

# What verl's own losses take their bounds from, and these do not.
NOT_READ = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")


def why_not_in_verl(objective: type[Objective]) -> str | None:
    """Why verl cannot compute an objective; None if it can."""
    if issubclass(objective, TopKObjective):
        return (
            "needs log-probs of the sampler's likeliest tokens, and verl gives a policy loss those of the sampled "
            "tokens alone; expected an objective over sampled tokens, or drpo train with Transformers generation"
        )
    if objective.over_updates:
        return (
            "weighs a token by all tokens of its update, and verl gives a policy loss a micro-batch of one rank; expected "
            "an objective over tokens or sequences, or drpo train"
        )
    if objective.corrects_mismatch:
        return (
            "weighs by π_old/μ, and verl gives a policy loss one of the two; expected loss_mode ppo with "
            "algorithm.rollout_correction.rollout_is=token and rollout_is_threshold='0.5_5.0', which is the same weight"
        )
    return None


@dataclass
class PolicyLoss(PolicyLossConfig):
    """verl's ``policy_loss`` for an objective of this library; checked when verl reads it, in the driver and in every worker.

    Args:
        loss_mode: of :data:`LOSS_MODES`.
        hyperparameters: of the objective, by name; its own defaults where nothing is given.
        rollout_correction: ``${algorithm.rollout_correction}``. It says what the ratio is taken
            against: in bypass mode the sampler's log-probs.
        use_v1: ``${trainer.use_v1}``.
        histograms: whether the histograms of |π − μ| and of the gradient weight, which a run
            folder's report is drawn from, are among the metrics.

    Raises:
        ValueError: what verl would compute is not what was asked for.
    """

    hyperparameters: dict[str, Any] = field(default_factory=dict)
    use_v1: bool = True
    histograms: bool = False

    def __post_init__(self) -> None:
        mode = self.loss_mode
        if mode not in LOSS_MODES:
            if mode in _OF_VERL:
                raise ValueError(
                    f"{WHERE}.loss_mode={mode} is verl's own loss, which {TARGET} has nothing to say to; expected "
                    + (f"drpo/{mode}, or " if f"drpo/{mode}" in LOSS_MODES else "")
                    + f"{WHERE}._target_={PolicyLossConfig.__module__.removesuffix('.actor')}.PolicyLossConfig"
                )
            raise ValueError(f"{WHERE}.loss_mode: {unknown_name('loss_mode', mode, LOSS_MODES)}")
        if reason := why_not_in_verl(OBJECTIVES[LOSS_MODES[mode]]):
            raise ValueError(f"{WHERE}.loss_mode={mode} {reason}")
        read = ("loss_mode", "rollout_correction", "_target_")
        _refuse_unread(self, [field for field in fields(PolicyLossConfig) if field.name not in read], WHERE, mode)
        try:
            objective = self.make_objective()
        except ValueError as error:
            raise ValueError(f"{WHERE}.hyperparameters: {error}") from error
        if not self.use_v1:
            raise ValueError(
                f"trainer.use_v1=False with loss_mode={mode}: the legacy trainer puts verl's bypass_mode loss in its "
                "place; expected trainer.use_v1=True"
            )
        bypass = bool(self.rollout_correction and self.rollout_correction.get("bypass_mode", False))
        if objective.anchor == "sampler" and not bypass:
            raise ValueError(
                f"loss_mode={mode} takes its ratio against the sampler's log-probs, and verl re-computes them with "
                "the trainer; expected algorithm.rollout_correction.bypass_mode=True and "
                f"{WHERE}.rollout_correction=${{algorithm.rollout_correction}}"
            )
        if bypass:
            for name in ("rollout_is", "rollout_rs"):
                if (value := self.rollout_correction.get(name)) is not None:
                    raise ValueError(
                        f"algorithm.rollout_correction.{name}={value} is not applied in bypass mode, where the ratio "
                        f"is already taken against the sampler; expected {name}=null"
                    )

    def make_objective(self) -> Objective:
        """The objective with its hyperparameters."""
        return make_objective(LOSS_MODES[self.loss_mode], **self.hyperparameters)


def objective_of(config: ActorConfig) -> Objective:
    """The objective that a worker's configuration asks for.

    Raises:
        ValueError: the configuration is not a :class:`PolicyLoss`, or has bounds that would be ignored.
    """
    loss = config.policy_loss
    if not isinstance(loss, PolicyLoss):
        raise ValueError(
            f"{WHERE} is a {type(loss).__name__}, which does not say what loss_mode={loss.loss_mode} is anchored on; "
            f"expected {WHERE}._target_={TARGET}"
        )
    unread = [field for field in fields(ActorConfig) if field.name in NOT_READ]
    _refuse_unread(config, unread, "actor_rollout_ref.actor", loss.loss_mode)
    return loss.make_objective()


def _refuse_unread(config: Any, unread: Iterable[Field[Any]], where: str, mode: str) -> None:
    for setting in unread:
        if (value := getattr(config, setting.name)) != setting.default:
            raise ValueError(
                f"{where}.{setting.name}={value} is not read by loss_mode={mode}; expected the bounds of the objective in "
                f"{WHERE}.hyperparameters"
            )
