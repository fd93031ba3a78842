"""The trainer's options: TRL's, less those that would have no effect, and this library's own."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from trl.trainer.grpo_config import GRPOConfig

from drpo.advantage import Advantage
from drpo.aggregation import Aggregation, check_aggregation
from drpo.objectives import Anchor, Objective, TopKObjective, anchored, make_correction, make_objective
from drpo.precision import RolloutPrecision, TrainPrecision, require_torchao
from drpo.registry import unknown_name
from drpo.rewards import REWARD_TIMEOUT
from drpo.rollout.sampling import FILTERS, NEUTRAL
from drpo.trainer.refused import AS_IN_TRL, GENERATION_KWARGS, REFUSED

logger = logging.getLogger(__name__)

StaleSampler = Literal["stop", "warn"]


@dataclass
class DRPOConfig(GRPOConfig):
    """GRPOConfig with an objective of this library.

    One rollout is per_device_train_batch_size × processes × gradient_accumulation_steps ×
    updates_per_rollout completions, split into that many disjoint updates. TRL's
    ``steps_per_generation``, ``generation_batch_size`` and ``num_iterations`` follow from it.

    Options of GRPOConfig that this trainer would ignore (``beta``, ``loss_type``, ``epsilon``...)
    are refused with what to set instead; :data:`drpo.trainer.refused.REFUSED` lists them.

    Args:
        objective: a name of :data:`drpo.OBJECTIVES`.
        objective_kwargs: its hyperparameters; its own defaults where absent.
        anchor: what the ratio is taken against: ``sampler`` (μ, its recorded log-probs) or ``old``
            (the trainer's policy when the rollout began, at the price of one more forward pass a
            rollout). None takes the objective's own.
        correction: a name of :data:`drpo.objectives.CORRECTIONS`, a weight by π_old/μ of an
            objective anchored on the old policy, or a mask for any objective; none by default.
        correction_kwargs: its hyperparameters; its own defaults where absent.
        updates_per_rollout: optimizer steps on each rollout's samples.
        aggregation: how token losses become one number; see :func:`drpo.token_scale`.
        horizon: tokens, for the aggregation ``seq-mean-token-sum-norm``.
        advantage: how rewards become advantages; see :func:`drpo.group_advantage`.
        audit_threshold: the mean |log π − log μ| in nats, before the first update, above which
            training stops. None takes ``EXACT_THRESHOLD`` of :mod:`drpo.rollout.audit`
            where one fp32 model samples and trains, else its ``APPROXIMATE_THRESHOLD``.
        stale_sampler: ``stop`` or ``warn`` when a rollout turns out to be sampled from older weights than the trainer's,
            beyond ``rollout_lag`` (:class:`drpo.trainer.auditing.RolloutAudits`).
        fused_loss: compute loss and gradient of the LM head in one pass
            (:func:`drpo.kernels.fused_policy_loss`) where the model allows it.
        drop_zero_advantage: leave sequences with A = 0 out of the training forward and backward pass,
            under objectives that give them no gradient. They stay in the denominators.
        dynamic_sampling_rounds: how many times a rollout may sample further prompts, whose groups take the place of those
            without an advantage (DAPO's dynamic sampling, :mod:`drpo.trainer.dynamic_sampling`).
        share_prompts: let the prompt of a group go through the model once an update instead of once a completion, where
            the model allows it and the fused loss is on (:mod:`drpo.trainer.shared_prompts`).
        tokens_per_micro_batch: how many tokens, padding included, go through the model at once. The
            sequences of a batch are sorted by length and split accordingly; a longer sequence goes
            alone. A shared prompt counts once, and its completions stay together if they fit. None
            takes a batch as a whole.
        train_precision: ``fp32``, ``bf16`` (autocast), ``fp16`` (the same, with a scaled loss; on a GPU) or ``fp8``
            (bf16, with linear layers that multiply in FP8 e4m3; emulated where the hardware has none). Weights,
            LM head and log-probs stay in fp32. None goes by TRL's ``bf16`` and ``fp16``.
        rollout_precision: ``fp32``, ``bf16``, ``fp16``, ``fp8``, ``int8``, ``mxfp8`` or ``nvfp4`` (from fp8 on weights
            and activations, but for the LM head; the last two are emulated): a copy of the policy samples,
            quantized anew when a rollout begins. None samples as the policy computes.
        rollout_lag: rollouts between the weights that sample and those that train. The weights of so
            many rollouts are kept in CPU memory and in checkpoints.
        replay_support: score each token over the tokens that the sampler could draw, so that ``top_p``,
            ``top_k`` and ``min_p`` can be used: π is then filtered as μ was. Needs an objective anchored on the sampler, and
            Transformers generation or a ``rollout_func`` that returns ``sampling_mask``; computes all logits.
        router_replay: send each token to the experts that the sampler chose, weighted as the policy weighs them
            (R3, arXiv 2510.11370), in a mixture of experts that Transformers samples from, or a ``rollout_func`` that
            returns ``routed_experts``.
        max_skipped_updates: an update whose gradient is not finite is skipped, on all ranks; after so many in a row
            training stops (:class:`drpo.trainer.guard.UpdateGuard`).
        checkpoint_checksums: flush a checkpoint to disk and note its files' SHA-256, which are compared when a run goes on
            from it. False saves as fast as Transformers does; then sizes alone are compared: a flipped bit, or
            what a machine that crashed had not written yet, goes unnoticed.
        reward_timeout: seconds that a call of a reward function may take; training stops at one that takes longer
            (:class:`drpo.errors.RewardError`). None for no limit.
        split_distance: measure how much of |π − μ| is the engine's, the age's and the updates'
            (:class:`drpo.trainer.distance_origins.DistanceOrigins`), at the price of a forward pass more a rollout, two where
            samples are of older weights.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "objective_kwargs", "correction_kwargs"]

    objective: str = "drpo"
    objective_kwargs: dict[str, Any] | str | None = None
    anchor: Anchor | None = None
    correction: str | None = None
    correction_kwargs: dict[str, Any] | str | None = None
    updates_per_rollout: int = 4
    aggregation: Aggregation = "token-mean"
    horizon: int | None = None
    advantage: Advantage = "mean"
    audit_threshold: float | None = None
    stale_sampler: StaleSampler = "stop"
    fused_loss: bool = True
    drop_zero_advantage: bool = True
    dynamic_sampling_rounds: int = 0
    share_prompts: bool = True
    tokens_per_micro_batch: int | None = 16_384
    train_precision: TrainPrecision | None = None
    rollout_precision: RolloutPrecision | None = None
    rollout_lag: int = 0
    replay_support: bool = False
    router_replay: bool = False
    split_distance: bool = False
    max_skipped_updates: int = 5
    checkpoint_checksums: bool = True
    reward_timeout: float | None = REWARD_TIMEOUT
    # A loss that is not finite is logged as it is.
    logging_nan_inf_filter: bool = False
    # Of GRPOConfig, with the only values that have no effect here.
    scale_rewards: str = "none"
    vllm_importance_sampling_correction: bool = False

    def __post_init__(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        if self.top_k == -1:
            # vLLM's word for no filter; TRL's is 0 for both.
            self.top_k = 0
        if self.scale_rewards is False:
            self.scale_rewards = "none"
        for name, instead in REFUSED.items():
            if getattr(self, name) in (defaults[name], *NEUTRAL.get(name, ())):
                continue
            if self.replay_support and name in FILTERS:
                self._check_filter(name)
            else:
                alike = AS_IN_TRL.get(name, {}).items()
                same = next((options for value, options in alike if value == getattr(self, name)), "")
                raise ValueError(
                    f"DRPOTrainer does not take {name}={getattr(self, name)!r}: {instead}"
                    + (f"; as in TRL: {same}" if same else "")
                )
        _check_whole_number("updates_per_rollout", self.updates_per_rollout, at_least=1)
        for name in ("rollout_lag", "dynamic_sampling_rounds"):
            _check_whole_number(name, getattr(self, name), at_least=0)
        _check_whole_number("max_skipped_updates", self.max_skipped_updates, at_least=1)
        if self.tokens_per_micro_batch is not None:
            _check_whole_number("tokens_per_micro_batch", self.tokens_per_micro_batch, at_least=1)
        for name in ("temperature", "audit_threshold", "reward_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected a finite number > 0")
        if self.stale_sampler not in get_args(StaleSampler):
            raise ValueError(unknown_name("stale_sampler", str(self.stale_sampler), get_args(StaleSampler)))
        self._choose_precision()
        if self.replay_support and self.use_vllm:
            raise ValueError(
                "replay_support=True needs the tokens that could be drawn, which TRL does not take from vLLM; "
                "a rollout_func can return them as sampling_mask"
            )
        if not (self.bf16 or self.fp16 or self.use_cpu or torch.accelerator.is_available()):
            # TRL's default is bf16, which Transformers refuses without a GPU.
            self.bf16 = False
        steps, size = self.steps_per_generation, self.generation_batch_size
        self.steps_per_generation = self.updates_per_rollout * self.gradient_accumulation_steps
        self.generation_batch_size = None
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError(
                "fp16 needs a GPU, where Accelerate scales the loss; expected train_precision='bf16' or 'fp32' on a CPU"
            )
        for name in self.generation_kwargs or {}:
            if name == "stop_strings":
                raise ValueError(
                    "generation_kwargs has 'stop_strings', for which Transformers needs a tokenizer that TRL does not give "
                    "it; leave it out"
                )
            if name not in GENERATION_KWARGS:
                raise ValueError(
                    f"generation_kwargs has {name!r}, which may change what is sampled from, while the trainer scores "
                    f"the full distribution; expected only {', '.join(sorted(GENERATION_KWARGS))}"
                )
        self._refuse_contradictions(steps, size)
        # Refused here rather than after the model was loaded.
        objective = self.make_objective()
        if self.replay_support and (isinstance(objective, TopKObjective) or (self.anchor or objective.anchor) == "old"):
            raise ValueError(
                f"replay_support=True scores the sampled tokens by π and μ alone; objective={self.objective!r} needs "
                f"{'the likeliest tokens' if isinstance(objective, TopKObjective) else 'π_old'} too"
            )
        check_aggregation(self.aggregation, self.horizon)
        if self.advantage not in get_args(Advantage):
            raise ValueError(unknown_name("advantage", str(self.advantage), get_args(Advantage)))

    def _choose_precision(self) -> None:
        for name, choices in (("train_precision", TrainPrecision), ("rollout_precision", RolloutPrecision)):
            precision = getattr(self, name)
            if precision not in (None, *get_args(choices)):
                raise ValueError(f"{name}: {unknown_name('precision', str(precision), get_args(choices))}")
            require_torchao(precision)
        for name, default in (("rollout_precision", None), ("rollout_lag", 0)):
            if self.use_vllm and getattr(self, name) != default:
                raise ValueError(f"{name}={getattr(self, name)!r}: vLLM samples by its own weights; leave it out")
        if self.train_precision is not None:
            is_bf16, is_fp16 = self.train_precision in ("bf16", "fp8"), self.train_precision == "fp16"
            if (self.fp16 and not is_fp16) or self.bf16 not in (None, is_bf16):
                raise ValueError(
                    f"train_precision={self.train_precision!r} contradicts bf16={self.bf16}, fp16={self.fp16}"
                )
            self.bf16, self.fp16 = is_bf16, is_fp16

    def _check_filter(self, name: str) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "top_k" and not (isinstance(value, int) and value >= 2):
            raise ValueError(f"top_k is {value!r}; expected a whole number, at least 2, or 0 for none")
        if name != "top_k" and not (is_number and 0 < value < 1):
            raise ValueError(f"{name} is {value!r}; expected a number between 0 and 1")

    def computing_precision(self, dtype: torch.dtype) -> str:
        """What a model with weights in ``dtype`` computes in: ``fp32``, ``bf16``, ``fp16`` or ``fp8``."""
        if self.train_precision is not None:
            return self.train_precision
        name = "bfloat16" if self.bf16 else "float16" if self.fp16 else str(dtype).split(".")[-1]
        return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)

    def make_objective(self) -> Objective:
        """The objective with its hyperparameters, under the correction if there is one.

        Raises:
            ValueError: an unknown name, a value out of range, or an anchor that does not go with them.
        """
        objective = make_objective(self.objective, **_mapping("objective_kwargs", self.objective_kwargs))
        if self.anchor not in (None, *get_args(Anchor)):
            raise ValueError(unknown_name("anchor", str(self.anchor), get_args(Anchor)))
        correction_kwargs = _mapping("correction_kwargs", self.correction_kwargs)
        if self.correction is None and correction_kwargs:
            raise ValueError(f"correction_kwargs is {correction_kwargs!r} without a correction")
        correction = make_correction(self.correction, **correction_kwargs) if self.correction is not None else None
        return anchored(objective, self.anchor, correction)

    def _refuse_contradictions(self, steps: int | None, size: int | None) -> None:
        assert self.generation_batch_size is not None  # TRL has computed it
        if steps not in (None, self.steps_per_generation):
            raise ValueError(
                f"steps_per_generation={steps} contradicts updates_per_rollout={self.updates_per_rollout} × "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} = {self.steps_per_generation}; "
                + _instead("steps_per_generation", steps, self.gradient_accumulation_steps)
            )
        if size not in (None, self.generation_batch_size):
            raise ValueError(
                f"generation_batch_size={size} contradicts per_device_train_batch_size={self.per_device_train_batch_size} × "
                f"processes={self.world_size} × gradient_accumulation_steps={self.gradient_accumulation_steps} × "
                f"updates_per_rollout={self.updates_per_rollout} = {self.generation_batch_size}; "
                + _instead("generation_batch_size", size, self.generation_batch_size // self.updates_per_rollout)
            )
        assert self.num_generations is not None
        completions = self.generation_batch_size // self.world_size
        if self.dynamic_sampling_rounds and completions % self.num_generations:
            raise ValueError(
                f"dynamic_sampling_rounds={self.dynamic_sampling_rounds} needs whole groups on each process; expected a "
                f"num_generations that divides per_device_train_batch_size × gradient_accumulation_steps × "
                f"updates_per_rollout = {completions}, got {self.num_generations}"
            )


def _instead(name: str, value: int, update: int) -> str:
    """What makes rollouts as large as an option of TRL's asked for, of which an update takes ``update``."""
    if value % update:
        return f"leave it out (a rollout is whole updates of {update})"
    return f"for rollouts of that size give updates_per_rollout={value // update} in place of {name}"


def _check_whole_number(name: str, value: Any, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} is {value!r}; expected a whole number, at least {at_least}")


def _mapping(name: str, kwargs: dict[str, Any] | str | None) -> dict[str, Any]:
    kwargs = kwargs or {}  # parsed from JSON by now, if it was text
    if not isinstance(kwargs, dict):
        raise ValueError(f"{name} is {kwargs!r}; expected a mapping of hyperparameters")
    return kwargs
