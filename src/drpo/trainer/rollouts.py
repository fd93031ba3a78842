"""GRPOTrainer whose rollouts say what the behaviour policy was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from drpo.advantage import group_advantage
from drpo.objectives import Anchor, TopKObjective
from drpo.precision import require_fp32_weights
from drpo.rollout.behavior_policy import BehaviourPolicy
from drpo.rollout.recorder import LogProbRecorder, record_log_probs
from drpo.rollout.rollout_func import checked
from drpo.trainer.config import DRPOConfig
from drpo.trainer.micro_batches import loss_mask


class PromptSampler(Sampler[int]):
    """TRL's order of prompts, which here depends on seed and epoch alone: a resumed run begins its epoch in the same order.

    Args:
        sampler: TRL's, which draws a permutation an epoch from a generator that no checkpoint holds.
        seed: of that generator.
        epoch: says which epoch begins, from 0 on.
    """

    def __init__(self, sampler: RepeatSampler, seed: int, epoch: Callable[[], int]) -> None:
        self._sampler, self._seed, self._epoch = sampler, seed, epoch

    def __iter__(self) -> Iterator[int]:
        if self._sampler.shuffle:
            self._sampler.generator.manual_seed(self._seed)
            for _ in range(self._epoch()):
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


class RolloutTrainer(GRPOTrainer):
    """The half of :class:`~drpo.DRPOTrainer` that samples.

    The sampler's own log-probs are recorded as the tokens are drawn, also when Transformers
    generates, by the policy itself or by the copy that :class:`~drpo.rollout.behavior_policy.BehaviourPolicy`
    keeps; advantages are :func:`~drpo.advantage.group_advantage`'s.
    """

    args: DRPOConfig
    model: Any
    accelerator: Any
    num_generations: int
    num_generations_eval: int

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: DRPOConfig | None = None, *more: Any, **kwargs: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = DRPOConfig(f"{name.rstrip('/').split('/')[-1]}-DRPO")
        if not isinstance(args, DRPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; expected a DRPOConfig")
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        if self.rollout_func is not None:
            self.rollout_func = checked(self.rollout_func)
        generation_kwargs: Any = args.generation_kwargs or {}
        stops = generation_kwargs.get("eos_token_id")
        if stops is not None:
            # These take the place of the model's own in generation; the completion mask has to end at the same tokens.
            self.eos_token_ids = [stops] if isinstance(stops, int) else list(stops)
        if args.train_precision is not None:
            require_fp32_weights(self.accelerator.unwrap_model(self.model), args.train_precision)
        self.objective = args.make_objective()
        self.anchor: Anchor = args.anchor or self.objective.anchor
        self._top_k = self.objective.top_k if isinstance(self.objective, TopKObjective) else 0
        if self._top_k:
            self._refuse_unless_recorded(
                f"objective={args.objective!r} needs log-probs of the sampler's likeliest tokens, as"
            )
        if args.replay_support:
            self._refuse_unless_recorded("replay_support=True needs the tokens that could be drawn, as")
        self._behaviour = self._make_behaviour()
        self._sampling = False
        self._recorder: LogProbRecorder | None = None
        self._kept_mass: Tensor | None = None

    @property
    def _bare_model(self) -> Any:
        """The policy without what Accelerate and peft wrap around it."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        return unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped

    def _make_behaviour(self) -> BehaviourPolicy:
        """What samples; a copy of the policy where it should not be the policy as it is."""
        base = self._bare_model
        precision, lag = self.args.rollout_precision, self.args.rollout_lag
        if precision == self._precision == "fp32":
            precision = None
        elif precision is None and lag and self._precision == "fp8":
            precision = "fp8"
        for is_used, what in (
            (self.rollout_func is not None, "a rollout_func, which samples by weights of its own"),
            (base is not self.accelerator.unwrap_model(self.model), "adapters (peft)"),
            (self.is_fsdp_enabled or is_deepspeed_zero3_enabled(), "weights that are sharded over ranks"),
        ):
            if is_used and (lag or precision is not None):
                raise ValueError(f"rollout_precision and rollout_lag sample from a copy; they do not work with {what}")
        return BehaviourPolicy(base, lag, precision, self.accelerator.autocast)

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler: Any = super()._get_train_sampler(dataset)
        return PromptSampler(sampler, seed, lambda: int(self.state.epoch or 0))

    def _refuse_unless_recorded(self, needed: str) -> None:
        for is_used, what in (
            (self.use_vllm, "vLLM, of which TRL keeps the sampled token's log-prob alone"),
            (self.rollout_func is not None, "a rollout_func, which returns the sampled tokens' log-probs alone"),
            (bool(self.tools), "tools, whose turns are generated apart from one another"),
            (self._is_vlm, "a vision-language model"),
            (self.args.cast_lm_head_to_fp32, "cast_lm_head_to_fp32, which is TRL's fused head's"),
        ):
            if is_used:
                raise ValueError(f"{needed} Transformers generation records them; it does not work with {what}")

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]] | None]:
        if self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        unwrapped = self.accelerator.unwrap_model(self.model_wrapped)
        with ExitStack() as stack:
            # An evaluation samples from the policy itself.
            is_rollout = self._sampling and self.model.training
            model = stack.enter_context(self._behaviour.sampling(unwrapped)) if is_rollout else unwrapped
            top_k, support = (self._top_k, self.args.replay_support) if self._sampling else (0, False)
            recorder = stack.enter_context(record_log_probs(model, top_k, support))
            completion_ids, _ = super()._generate_single_turn(*args, **kwargs)
        if self._sampling:
            self._recorder = recorder
        return completion_ids, recorder.log_probs([len(ids) for ids in completion_ids])

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self._sampling and self.anchor == "sampler":
            # TRL scores every rollout once more for π_old, which the ratio is not taken against.
            return None, None, None
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._sampling = True
        if self.model.training:
            self._behaviour.begin_rollout(self.accelerator.unwrap_model(self.model_wrapped))
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._sampling = False
        _check_log_probs(output)
        if self.model.training and self.anchor == "old" and self.args.updates_per_rollout > 1:
            _check_old_log_probs(output)
        output["rewards"], output["advantages"] = self._rewards_and_advantages(len(inputs))
        if self._recorder is not None and (likeliest := self._recorder.likeliest(output["completion_ids"].shape[1])):
            output["top_k_ids"], output["top_k_sampling_logps"] = likeliest
        if self._recorder is not None and (support := self._recorder.support(output["completion_ids"].shape[1])):
            output["support_ids"], kept = support
            self._kept_mass = kept[loss_mask(output).bool()]
        self._recorder = None
        if self.model.training:
            output["age"] = torch.full_like(output["advantages"], self._behaviour.age, dtype=torch.long)
        return output

    def _rewards_and_advantages(self, own: int) -> tuple[Tensor, Tensor]:
        """Both of this rank's ``own`` samples, [own] each, from the rewards just calculated; logged in place of TRL's."""
        rewards = self._rewards_per_func
        unscored = rewards.isnan().all(dim=1)
        rewards = (rewards * self.reward_weights.to(rewards)).nansum(dim=1).masked_fill(unscored, torch.nan)
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        advantages = group_advantage(rewards, group_size, self.args.advantage)
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        first = self.accelerator.process_index * own
        return rewards[first : first + own], advantages[first : first + own]

    def _sampling_settings(self) -> dict[str, Any] | None:
        """What the rollout engine samples with; None where a rollout_func decides."""
        if self.rollout_func is not None:
            return None
        if self.use_vllm:
            overrides: Any = self.args.generation_kwargs or {}
            return {"temperature": self.temperature, **overrides}
        own: dict[str, Any] = self.generation_config.to_dict()
        if self._is_vlm and own.get("suppress_tokens") == [self._bare_model.config.image_token_id]:
            # TRL's own, so that no completion asks for an image; π(image) is next to nothing.
            own["suppress_tokens"] = None
        # What TRL leaves open, Transformers takes from the model's generation_config.json.
        inherited = self.accelerator.unwrap_model(self.model).generation_config.to_dict()
        return inherited | {name: value for name, value in own.items() if value is not None}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._behaviour.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._behaviour.load(Path(checkpoint))

    @property
    def _precision(self) -> str:
        if self.args.train_precision is not None:
            return self.args.train_precision
        dtype = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else str(self.model.dtype).split(".")[-1]
        return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            if self._behaviour.lag:
                self._metrics["train"]["rollout/age"] = [float(self._behaviour.age)]
            if self._kept_mass is not None:
                kept = self.accelerator.gather(self._kept_mass.mean())
                self._metrics["train"]["rollout/kept_mass"] = [kept.mean().item()]
        super().log(logs, start_time)


def _check_old_log_probs(output: dict[str, Any]) -> None:
    if output.get("old_per_token_logps") is None:
        raise ValueError(
            "the rollout has no old_per_token_logps, which TRL computes where a rollout has more than one update; "
            "the ratio to the old policy would be 1 throughout: set anchor='sampler' or updates_per_rollout=1"
        )


def _check_log_probs(output: dict[str, Any]) -> None:
    if "sampling_per_token_logps" not in output:
        raise ValueError(
            "the rollout returned no log-probs, so there is no behaviour policy to anchor the ratio on; "
            "return them from rollout_func as 'logprobs', or let Transformers or vLLM generate"
        )
    missing = (loss_mask(output).bool() & ~output["sampling_per_token_logps"].isfinite()).nonzero()
    if len(missing):
        row, token = missing[0].tolist()
        value = output["sampling_per_token_logps"][row, token].item()
        raise ValueError(
            f"the sampler's log-prob of token {token} of completion {row} is {value}, and so for {len(missing)} tokens "
            "of this rollout; a ratio needs a finite anchor, and nothing was trained on the rollout"
        )
