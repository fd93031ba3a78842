"""DRPO and its relatives in TRL: GRPOTrainer's rollouts and rewards, this library's objective, anchored on the sampler."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import DistributedType, gather
from torch import Tensor, nn
from torch.utils.data import Sampler

from drpo.aggregation import token_scale
from drpo.errors import RewardError
from drpo.kernels.attention import use_cpu_sdpa
from drpo.metrics import TrustRegion
from drpo.metrics.untrained import as_metrics
from drpo.objectives import Anchor
from drpo.precision import multiply_in_fp8, require_fp32_weights
from drpo.rewards import checked_scores
from drpo.rollout.audit import Audit
from drpo.rollout.rollout_func import ROUTED_EXPERTS, SAMPLING_MASK
from drpo.tokens import TokenBatch
from drpo.trainer.arguments import check_model, check_prompts, check_rewards
from drpo.trainer.auditing import RolloutAudits
from drpo.trainer.batch import RolloutBatch, has_advantage, loss_mask
from drpo.trainer.checkpointed import CheckpointedTrainer
from drpo.trainer.config import DRPOConfig
from drpo.trainer.dynamic_sampling import DynamicSampling
from drpo.trainer.guard import UpdateGuard
from drpo.trainer.idle import IdleRollouts, refuse_too_few_prompts
from drpo.trainer.measurements import Measurements, Mode
from drpo.trainer.micro_batches import MicroBatches
from drpo.trainer.prompt_order import PromptSampler
from drpo.trainer.rewards import add_advantages, check_some_rewards, raising_together
from drpo.trainer.rollouts import check_log_probs, make_rollout_sampler
from drpo.trainer.scoring import make_scorer
from drpo.trainer.token_log import TokenLog


class DRPOTrainer(CheckpointedTrainer):
    """GRPOTrainer with the objective of its :class:`DRPOConfig`.

    The sampler's own log-probs are recorded as the tokens are drawn, also when Transformers generates, by the policy
    itself or by the copy that :class:`~drpo.rollout.behavior_policy.BehaviorPolicy` keeps. An objective anchored on μ
    takes its ratio against them; for one anchored on the trainer's old policy every rollout of several updates is
    scored once more before it is trained on. Advantages are :func:`~drpo.advantage.group_advantage`'s.

    Before the first update the sampler's log-probs are compared with the trainer's
    (:class:`~drpo.rollout.audit.Audit`); a run whose sampler and trainer disagree stops there. A run
    that is resumed makes the comparison again, unless it samples by older weights (``rollout_lag``).

    Arguments as for ``trl.GRPOTrainer``; models of text alone.

    Attributes:
        objective: the objective being optimised.
        anchor: what its ratio is taken against, ``sampler`` or ``old``.
        trust_region: what was measured over the updates last logged, on every rank, of the tokens trained on.
        token_log: where the tokens trained on are collected; None unless somebody wants them.
        announce: is told what begins: sampling, scoring or updating.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "drpo"]
    _name = "DRPO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Rethinking the Divergence Regularization in LLM RL",
        "id": "2606.09821",
        "citation": textwrap.dedent("""\
            @article{yao2026rethinking,
                title  = {{Rethinking the Divergence Regularization in LLM RL}},
                author = {Yao and Zhou and Qi and Lee and Bo and Pang},
                year   = 2026,
                eprint = {arXiv:2606.09821},
            }"""),
    }

    args: DRPOConfig
    num_generations: int
    num_generations_eval: int
    _buffered_inputs: list[RolloutBatch]

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: DRPOConfig | None = None, *more: Any, **kwargs: Any
    ) -> None:
        model = check_model(model)
        check_rewards([] if reward_funcs is None else reward_funcs)
        check_prompts(more[0] if more else kwargs.get("train_dataset"))
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = DRPOConfig(f"{name.rstrip('/').split('/')[-1]}-DRPO")
        if not isinstance(args, DRPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; expected a DRPOConfig")
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        if self._is_vlm:
            raise ValueError(
                f"processing_class is a {type(self.processing_class).__name__}, of a vision-language model; DRPOTrainer "
                "trains on text alone: pass its tokenizer as processing_class"
            )
        use_cpu_sdpa(self.bare_model)
        self.reward_funcs = [
            reward if isinstance(reward, nn.Module) else checked_scores(reward, args.reward_timeout)
            for reward in self.reward_funcs
        ]
        generation_kwargs: Any = args.generation_kwargs or {}
        if (stops := generation_kwargs.get("eos_token_id")) is not None:
            # These take the place of the model's own in generation; the completion mask has to end at the same tokens.
            self.eos_token_ids = [stops] if isinstance(stops, int) else list(stops)
        if self.aux_loss_enabled:
            # Transformers' generation fails with it; scoring asks for it by itself.
            self.bare_model.config.get_text_config().output_router_logits = False
        if args.train_precision is not None:
            require_fp32_weights(self.policy, args.train_precision)
        self.objective = args.make_objective()
        self.anchor: Anchor = args.anchor or self.objective.anchor
        self.trust_region: TrustRegion | None = None
        self.token_log: TokenLog | None = None
        self.announce: Callable[[str], None] = lambda phase: None
        self._measurements = Measurements(args.split_distance)
        self._rollout_sampler = make_rollout_sampler(self)
        if self.rollout_func is not None:
            needed = [SAMPLING_MASK] * args.replay_support + [ROUTED_EXPERTS] * args.router_replay
            self.rollout_func = self._rollout_sampler.sampling_elsewhere(self.rollout_func, needed)
        if args.train_precision == "fp8":
            multiply_in_fp8(self.bare_model)
        self._scorer = make_scorer(
            self.policy, args, self.objective, self.anchor, self.temperature, self.aux_loss_enabled
        )
        # DeepSpeed counts backward passes itself.
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self._micro_batches = MicroBatches(
            self.accelerator,
            budget=None if is_deepspeed else args.tokens_per_micro_batch,
            layout=self._scorer.layout,
        )
        self._guard = UpdateGuard(args)
        samples_elsewhere = self.use_vllm or self.rollout_func is not None
        self._audits = RolloutAudits(self, samples_elsewhere or self._rollout_sampler.behavior.is_copy)
        self._idle = IdleRollouts(needs_advantage=not self.objective.acts_without_advantage)
        self._dynamic_sampling = DynamicSampling(args, self.train_dataset, self.accelerator.process_index)
        self.stateful |= {"rollout_sampler": self._rollout_sampler, "dynamic_sampling": self._dynamic_sampling}
        self.stateful |= {"guard": self._guard, "audits": self._audits, "idle": self._idle}
        self._aux_loss = torch.zeros((), device=self.accelerator.device)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As TRL's, which names neither a model that is a folder nor one that is not on the hub yet."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            folder, model = Path(str(self.args.output_dir)), Path(str(self.bare_model.config._name_or_path))
            text = (folder / "README.md").read_text(encoding="utf-8")
            text = text.replace("[None](https://huggingface.co/None)", f"`{model.name}`")
            text = text.replace('model="None"', f'model="{folder.name}"')
            (folder / "README.md").write_text(text, encoding="utf-8")

    def _send_telemetry(self) -> None:
        """TRL reports each trainer it builds; a run of this library talks to nobody but the model hub."""

    # The policy, what samples from it and what scores its tokens.

    @property
    def policy(self) -> Any:
        """The model without what Accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def bare_model(self) -> Any:
        """The policy without what peft wraps around it."""
        policy = self.policy
        return policy.get_base_model() if hasattr(policy, "get_base_model") else policy

    @property
    def audit(self) -> Audit | None:
        """The comparison of sampler and trainer before the first update that has tokens; None until then."""
        return self._audits.first

    @property
    def precision(self) -> str:
        """What the policy computes in: ``fp32``, ``bf16``, ``fp16`` or ``fp8``."""
        return self.args.computing_precision(self.model.dtype)

    # A rollout.

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        refuse_too_few_prompts(self.train_dataset if dataset is None else dataset, self.args)
        sampler: Any = super()._get_train_sampler(dataset)
        return PromptSampler(sampler, seed, lambda: int(self.state.epoch or 0))

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]] | None]:
        if self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        with self._rollout_sampler.sampling(self.accelerator.unwrap_model(self.model_wrapped)) as recorder:
            completion_ids, _ = super()._generate_single_turn(*args, **kwargs)
        return completion_ids, recorder.log_probs([len(ids) for ids in completion_ids])

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """TRL scores every rollout for π_old here; :meth:`_generate_and_score_completions` does where it is needed."""
        return None, None, None

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Tensor:
        self.announce("scoring")
        with raising_together():
            try:
                self._rewards_per_func = super()._calculate_rewards(inputs, *args, **kwargs)
            except RewardError:
                # The other ranks wait at the end of TRL's method, to gather what each of them has.
                gather(torch.full((len(inputs), len(self.reward_funcs)), torch.nan, device=self.accelerator.device))
                raise
        return self._rewards_per_func

    def _log_metric(self, name: str, value: float) -> None:
        # What is no number fails in the reward that logs it.
        super()._log_metric(str(name), float(value))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        is_trained_on = self.model.training
        sampler = self._rollout_sampler
        with sampler.rollout(self.accelerator.unwrap_model(self.model_wrapped), is_trained_on):
            batch = self._sample(inputs)
            if is_trained_on:
                check_some_rewards(self._rewards_per_func, self.reward_func_names)
                batch = self._dynamic_sampling.fill(batch, self._sample, self._metrics["train"])
                sampler.measure(batch)
                self._idle.add(batch, self.state.global_step // self.args.updates_per_rollout + 1)
        is_old_needed = self.anchor == "old" and self.args.updates_per_rollout > 1
        if is_trained_on and (is_old_needed or self.args.split_distance):
            batch["old_per_token_logps"] = self._micro_batches.log_probs(batch, self._score_without_loss)
        if is_trained_on and not sampler.behavior.age:
            self._audits.begin_rollout(batch)
        elif is_trained_on and self.args.split_distance:
            with sampler.behavior.weights_of_samples(self.policy):
                batch["lagged_per_token_logps"] = self._micro_batches.log_probs(batch, self._score_without_loss)
        return cast(dict[str, Any], batch)

    def _sample(self, inputs: list[dict[str, Any]]) -> RolloutBatch:
        """Completions of this rank's prompts with their rewards and advantages; all ranks call it together."""
        self.announce("sampling")
        batch = cast(RolloutBatch, super()._generate_and_score_completions(inputs))
        check_log_probs(batch)
        add_advantages(batch, self, self._rewards_per_func)
        self._rollout_sampler.complete(batch)
        return batch

    # An update.

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        accumulated = self.args.gradient_accumulation_steps
        if not self.model.training:
            self._begin_update([cast(RolloutBatch, inputs)])
        elif self._step % accumulated == 0:
            first = self._step % (self.args.updates_per_rollout * accumulated)
            self._begin_update(self._buffered_inputs[first : first + accumulated])
        return inputs

    def _begin_update(self, batches: Sequence[RolloutBatch]) -> None:
        """Count an update's tokens, and tell an objective that looks at all of them. All ranks call it together."""
        self.announce("updating")
        self._micro_batches.begin_update(batches)
        if self.objective.over_updates:
            update = self._micro_batches.whole_update(batches, self._score_without_loss)
            self._scorer = replace(self._scorer, objective=self.objective.for_update(update))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        batch = cast(RolloutBatch, inputs)
        mode: Mode = "train" if self.model.training else "eval"
        *others, last = (
            self._micro_batches.split_to_train(batch, self._has_gradient(batch)) if mode == "train" else [batch]
        )
        total = torch.zeros((), device=self.accelerator.device)
        for micro_batch in others:
            # Of a batch taken in parts, the trainer differentiates the last; ranks exchange gradients there.
            with self.accelerator.no_sync(model):
                loss = self._loss(model, micro_batch, mode)
                self.accelerator.backward(loss)
            total += loss.detach()
        loss = self._loss(model, last, mode)
        if mode == "eval":
            self._end_replay()
        if mode == "eval" or self.accelerator.sync_gradients:
            self._end_update(mode)
        return loss + total

    def _has_gradient(self, batch: RolloutBatch) -> Tensor:
        """The sequences that have a gradient, [B], bool; all of them before a run's first update, whose audit compares all that was sampled."""
        if (
            not self.args.drop_zero_advantage
            or self.objective.acts_without_advantage
            # A load-balancing loss is over all tokens, whatever their advantage.
            or self.aux_loss_enabled
            or self.state.global_step == 0
        ):
            return torch.ones_like(batch["advantages"], dtype=torch.bool)
        return has_advantage(batch)

    def _loss(self, model: Any, batch: RolloutBatch, mode: Mode) -> Tensor:
        """The share of a micro-batch in the loss of the update; what its tokens say of the policy is measured on the way."""
        scale = token_scale(
            loss_mask(batch),
            self.args.aggregation,
            counts=self._micro_batches.counts,
            horizon=self.args.horizon,
            mean_lengths=batch.get("mean_lengths"),
        )
        scored = self._scorer(model, batch, scale, self._micro_batches.longest)
        is_on_policy = mode == "train" and self._is_on_policy(batch)
        self._measurements.add(mode, batch, scored, is_on_policy)
        if mode == "train":
            # The scaling of fp16's loss skips updates by itself.
            if self.accelerator.scaler is None:
                self._guard.add(batch, scored)
            if self.token_log is not None:
                self.token_log.add(batch, scored.sampled, scored.gradient_weight)
        loss = scored.loss
        if scored.aux_loss is not None:
            aux_loss = self._micro_batches.share(batch) * scored.aux_loss
            self._aux_loss += aux_loss.detach()
            loss = loss + self.router_aux_loss_coef * aux_loss
        # Data parallelism averages gradients over ranks; the counts already span them.
        return loss * self.accelerator.num_processes

    def _score_without_loss(self, batch: RolloutBatch) -> TokenBatch:
        """The sampled tokens of a micro-batch, which no loss is made of."""
        scale = torch.zeros_like(batch["sampling_per_token_logps"])
        sampled = self._scorer(self.model, batch, scale, self._micro_batches.longest).sampled
        self._end_replay()
        return sampled

    def _end_replay(self) -> None:
        if self._scorer.experts is not None:
            self._scorer.experts.end_update()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Transformers calls this between the backward pass and the optimizer's step; here a gradient that is not finite is cleared."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._end_replay()
        # The scaling of fp16's loss skips such updates by itself, to find its scale.
        if self.accelerator.scaler is None:
            if not (is_finite := math.isfinite(grad_norm)):
                # An optimizer leaves parameters without a gradient, and what it remembers of them, as they are.
                model.zero_grad(set_to_none=True)
            self._guard.end_update(self.state.global_step + 1, is_finite)
        return grad_norm

    def _end_update(self, mode: Mode) -> None:
        if self.aux_loss_enabled:
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(self._aux_loss).sum().item())
            self._aux_loss.zero_()
        if self._measurements.differences:
            self._audits.end_update(self._measurements.differences.take(self.accelerator.gather))

    # What is measured.

    def _is_on_policy(self, batch: RolloutBatch) -> bool:
        """Whether π is still what sampled: no update since, and no lag, as there is in a run that is resumed with one."""
        steps = self.args.updates_per_rollout * self.args.gradient_accumulation_steps
        return self._step % steps < self.args.gradient_accumulation_steps and not batch["age"].any()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        gather = self.accelerator.gather
        mode: Mode = "train" if self.model.training else "eval"
        measured, metrics = self._measurements.take(mode, gather)
        if mode == "train":
            # Transformers logs once more when training ends.
            if "loss" in logs:
                self.trust_region = measured
            metrics |= self._micro_batches.take_work()
            if self._guard.skipped:
                metrics["updates/skipped"] = float(self._guard.skipped)
            metrics |= as_metrics(self._idle.counts) | self._rollout_sampler.metrics(gather)
            metrics |= self._dynamic_sampling.metrics()
        self._metrics[mode].update({name: [value] for name, value in metrics.items()})
        super().log(logs, start_time)

    # A checkpoint.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._rollout_sampler.behavior.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._rollout_sampler.behavior.load(Path(checkpoint))
