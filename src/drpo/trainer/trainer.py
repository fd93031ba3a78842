"""DRPO and its relatives in TRL: GRPOTrainer's rollouts and rewards, this library's objective, anchored on the sampler."""

from __future__ import annotations

import inspect
import logging
import textwrap
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from drpo.aggregation import Counts, token_scale
from drpo.metrics import TrustRegion, TrustRegionMetrics
from drpo.precision import train_in_fp8
from drpo.rollout.audit import APPROXIMATE_THRESHOLD, EXACT_THRESHOLD, Audit, Differences, likely_causes
from drpo.rollout.sampling import sampling_mismatches
from drpo.trainer.config import DRPOConfig
from drpo.trainer.fused_head import add_policy_loss, lengthens_prompts, why_not_fused
from drpo.trainer.micro_batches import Work, lengths, loss_mask, select, split_by_length, widths
from drpo.trainer.mismatch import BEGUN_WITH, SAMPLED_WITH, Split
from drpo.trainer.rollouts import RolloutTrainer
from drpo.trainer.scoring import Scored, Scores, score_fused, score_plain, score_support, score_top_k
from drpo.trainer.token_log import TokenLog

logger = logging.getLogger(__name__)

_MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class DRPOTrainer(RolloutTrainer):
    """GRPOTrainer with the objective of its :class:`DRPOConfig`.

    The sampler's own log-probs are recorded as the tokens are drawn, also when Transformers
    generates. An objective anchored on μ takes its ratio against them; for one anchored on the
    trainer's old policy every rollout is scored once more before it is trained on. Before the first
    update the sampler's log-probs are compared with the trainer's
    (:class:`~drpo.rollout.audit.Audit`); a run whose sampler and trainer disagree stops there. A run
    that is resumed makes the comparison again, unless it samples by older weights (``rollout_lag``).

    Arguments as for ``trl.GRPOTrainer``.

    Attributes:
        objective: the objective being optimised.
        anchor: what its ratio is taken against, ``sampler`` or ``old``.
        audit: the comparison made before the first update that has tokens; None until then.
        trust_region: what was measured over the updates last logged, on every rank: of the tokens trained on,
            which those of dropped sequences are not.
        token_log: where the tokens trained on are collected; None unless somebody wants them.
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

    _buffered_inputs: list[dict[str, Any]]

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: DRPOConfig | None = None, *more: Any, **kwargs: Any
    ) -> None:
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        base = self._bare_model
        parameters = inspect.signature(base.forward).parameters
        if self.args.train_precision == "fp8":
            train_in_fp8(base)
        self._takes_positions = "position_ids" in parameters and not self._is_vlm
        self.audit: Audit | None = None
        self.trust_region: TrustRegion | None = None
        self.token_log: TokenLog | None = None
        self._why_not_fused = self._fuse(base)
        self._work = Work()
        self._measured = {"train": TrustRegionMetrics(), "eval": TrustRegionMetrics()}
        self._differences = Differences()
        self._split = Split() if self.args.split_distance else None

    def _fuse(self, base: Any) -> str | None:
        """Give the model its fused loss, or say once why it has none."""
        if not self.args.fused_loss:
            return "fused_loss=False"
        reasons = (
            (self._is_vlm, "a vision-language model's inputs are more than tokens"),
            (self.aux_loss_enabled, "a load-balancing loss is wanted beside it"),
            (self.args.cast_lm_head_to_fp32, "cast_lm_head_to_fp32 is TRL's fused head's"),
            (self.args.replay_support, "log-probs over the sampler's support need all logits"),
            (
                lengthens_prompts(self.accelerator.unwrap_model(self.model)),
                "its adapters put tokens before the prompt",
            ),
            (is_deepspeed_zero3_enabled(), "DeepSpeed ZeRO-3 has the LM head's weight in parts"),
        )
        reason = next((text for applies, text in reasons if applies), None) or why_not_fused(base)
        # Other ranks may have no weights yet to find out with.
        [reason] = broadcast_object_list([reason])
        if reason is None:
            add_policy_loss(base, self.temperature)
        elif self.accelerator.is_main_process:
            logger.warning("No fused loss for this model: %s. TRL's chunked LM head takes its place.", reason)
        return reason

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._takes_positions:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

        def scored_where_sampled(*, attention_mask: Tensor, **inputs: Any) -> Any:
            return model(attention_mask=attention_mask, position_ids=_positions(attention_mask), **inputs)

        return super()._get_per_token_logps_and_entropies(scored_where_sampled, *args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and self._split is not None:
            output[BEGUN_WITH] = self._log_probs(output)
            if self._behaviour.age:
                with self._behaviour.weights_of_samples(self.accelerator.unwrap_model(self.model)):
                    output[SAMPLED_WITH] = self._log_probs(output)
        return output

    @torch.no_grad()
    def _log_probs(self, inputs: dict[str, Any]) -> Tensor:
        """The trainer's log-probs of the sampled tokens, [B, T], as training computes them."""
        self._count([inputs])
        log_probs = torch.zeros_like(inputs["sampling_per_token_logps"])
        counted = loss_mask(inputs).bool()
        groups = split_by_length(self._widths(inputs), counted.any(dim=1), self.args.tokens_per_micro_batch)
        for idle in self._idle(inputs, len(groups)):
            self._score(self.model, idle, torch.zeros_like(idle["sampling_per_token_logps"]))
        for rows in groups:
            part = select(inputs, rows)
            sampled = self._score(self.model, part, torch.zeros_like(part["sampling_per_token_logps"])).sampled
            log_probs[rows] = log_probs[rows].masked_scatter(counted[rows], sampled.logp[sampled.mask])
        return log_probs

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            self._count([inputs])
        elif self._step % self.args.gradient_accumulation_steps == 0:
            first = self._step % (self.args.updates_per_rollout * self.args.gradient_accumulation_steps)
            self._count(self._buffered_inputs[first : first + self.args.gradient_accumulation_steps])
        return inputs

    def _count(self, micro_batches: list[dict[str, Any]]) -> None:
        """The denominators of an update, and its longest sequence, over all its micro-batches and ranks."""
        counts = [Counts.of(loss_mask(inputs)) for inputs in micro_batches]
        longest = [lengths(inputs).amax() for inputs in micro_batches]
        local = [torch.stack([c.tokens, c.sequences, most]) for c, most in zip(counts, longest, strict=True)]
        tokens, sequences, longest = self.accelerator.gather(torch.stack(local)).unbind(dim=1)
        self._counts = Counts(tokens=tokens.sum(), sequences=sequences.sum())
        self._longest = int(longest.max())

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        *others, last = self._micro_batches(inputs, mode)
        total = torch.zeros((), device=self.accelerator.device)
        for micro_batch in others:
            # Of a batch taken in parts, the trainer differentiates the last; ranks exchange gradients there.
            with self.accelerator.no_sync(model):
                loss = self._loss(model, micro_batch, mode)
                if mode == "train":
                    self.accelerator.backward(loss)
            total += loss.detach()
        loss = self._loss(model, last, mode)
        if self._differences and self.accelerator.sync_gradients:
            self._audit()
        return loss + total

    def _micro_batches(self, inputs: dict[str, Any], mode: str) -> list[dict[str, Any]]:
        """What goes through the model together: the sequences that have a gradient, by length."""
        is_whole = mode == "eval" or any(inputs.get(name) is not None for name in _MULTIMODAL)
        if is_whole:
            return [inputs]
        counted = loss_mask(inputs).bool().any(dim=1)
        keep = torch.ones_like(counted)
        # The audit of a run's first update compares all that was sampled, not what is worth training on.
        can_drop = self.args.drop_zero_advantage and not self.objective.acts_without_advantage
        # A load-balancing loss is over all tokens, whatever their advantage.
        can_drop = can_drop and not self.aux_loss_enabled
        if can_drop and self.state.global_step > 0:
            keep = counted & (inputs["advantages"] != 0)
        # DeepSpeed counts backward passes itself.
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        budget = None if is_deepspeed else self.args.tokens_per_micro_batch
        groups = split_by_length(self._widths(inputs), keep, budget)
        micro_batches = self._idle(inputs, len(groups)) + [select(inputs, rows) for rows in groups]
        self._work.sequences += len(keep)
        self._work.dropped += len(keep) - int(keep.sum())
        self._work.padded_tokens += inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
        widest = [self._widths(batch).amax(dim=0).sum() * len(batch["completion_ids"]) for batch in micro_batches]
        self._work.computed_tokens += int(torch.stack(widest).sum())
        return micro_batches

    def _idle(self, inputs: dict[str, Any], busy: int) -> list[dict[str, Any]]:
        """Micro-batches in which no token counts, so that every rank makes as many forward passes as the busiest."""
        passes = max(1, busy)
        if self.accelerator.num_processes > 1:
            passes = int(self.accelerator.gather(torch.tensor([passes], device=self.accelerator.device)).max())
        idle = select(inputs, lengths(inputs).argmin().unsqueeze(0))
        idle["tool_mask"] = torch.zeros_like(idle["completion_mask"])
        return [idle] * (passes - busy)

    def _widths(self, inputs: dict[str, Any]) -> Tensor:
        """Of each sequence, the tokens of what is padded by itself: TRL's head takes prompts and completions apart."""
        return widths(inputs) if self._why_not_fused else lengths(inputs).unsqueeze(1)

    def _loss(self, model: Any, inputs: dict[str, Any], mode: str) -> Tensor:
        """The share of a micro-batch in the loss of the update; what its tokens say of the policy is measured on the way."""
        scale = token_scale(loss_mask(inputs), self.args.aggregation, counts=self._counts, horizon=self.args.horizon)
        loss, sampled, weight, entropy, aux_loss = self._score(model, inputs, scale)
        # How far π has gone is measured from what was sampled from, whatever the ratio is taken against.
        self._measured[mode].update(sampled, weight, entropy)
        if self.token_log is not None and mode == "train":
            self.token_log.add(inputs, sampled, weight)
        if self._split is not None and mode == "train":
            self._split.update(inputs, sampled)
        if self.audit is None and mode == "train" and self._is_sampled_by_now(inputs):
            self._differences.add(sampled)
        # Data parallelism averages gradients over ranks; the counts already span them.
        loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled and aux_loss is not None:
            # The weights of an update's micro-batches sum to 1 over all ranks, whose gradients are averaged.
            share = loss_mask(inputs).sum() * self.accelerator.num_processes / self._counts.tokens.clamp(min=1)
            loss = loss + self.router_aux_loss_coef * share * aux_loss
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        return loss

    def _score(self, model: Any, inputs: dict[str, Any], scale: Tensor) -> Scored:
        if self._why_not_fused is None:
            return score_fused(model, inputs, scale, self.objective, self.anchor, self._longest)
        completion_ids = inputs["completion_ids"]
        input_ids = torch.cat([inputs["prompt_ids"], completion_ids], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        if self._top_k or self.args.replay_support:
            model_inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
            if self._takes_positions:
                model_inputs["position_ids"] = _positions(attention_mask)
            if self.aux_loss_enabled:
                model_inputs["output_router_logits"] = True
            with self.accelerator.autocast():
                score, ids = (score_top_k, "top_k_ids") if self._top_k else (score_support, "support_ids")
                scores = score(model, completion_ids, inputs[ids], self.temperature, model_inputs)
        else:
            scores = Scores(
                *self._get_per_token_logps_and_entropies(
                    model,
                    input_ids,
                    attention_mask,
                    completion_ids.shape[1],
                    compute_entropy=True,
                    compute_aux_loss=self.aux_loss_enabled,
                    **{name: inputs.get(name) for name in _MULTIMODAL},
                )
            )
        return score_plain(scores, inputs, scale, self.objective, self.anchor)

    def _is_sampled_by_now(self, inputs: dict[str, Any]) -> bool:
        """Whether π is still what sampled: no update since, and no lag, as there is in a run that is resumed with one."""
        steps = self.args.updates_per_rollout * self.args.gradient_accumulation_steps
        return self._step % steps < self.args.gradient_accumulation_steps and not inputs["age"].any()

    def _audit(self) -> None:
        mean, maximum, tokens = self._differences.take(self.accelerator.gather)
        if not tokens:
            return
        sampling = self._sampling_settings()
        threshold = self.args.audit_threshold
        if threshold is None:
            precisions = {self._precision, self.args.rollout_precision or self._precision}
            exact = sampling is not None and not self.use_vllm and precisions == {"fp32"}
            threshold = EXACT_THRESHOLD if exact else APPROXIMATE_THRESHOLD
        self.audit = Audit(
            mean=mean,
            maximum=maximum,
            tokens=tokens,
            threshold=threshold,
            mismatches=sampling_mismatches(self.temperature, sampling or {}, self.args.replay_support),
        )
        if self.accelerator.is_main_process:
            print(self.audit)
        self._metrics["train"]["audit/logp_difference_mean"].append(self.audit.mean)
        self._metrics["train"]["audit/logp_difference_max"].append(self.audit.maximum)
        self.audit.check(
            likely_causes(
                self.accelerator.unwrap_model(self.model),
                scoring_temperature=self.temperature,
                knows_sampling=sampling is not None,
                precision=self._precision,
                rollout_precision=self.args.rollout_precision or self._precision,
            )
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            sums = self.accelerator.gather(torch.tensor([self._work.sums()], device=self.accelerator.device))
            work = Work(*sums.sum(dim=0).tolist()).metrics()
            self._metrics[mode].update({name: [value] for name, value in work.items()})
            self._work = Work()
            if self._split is not None:
                origins = self._split.take(self.accelerator.gather)
                self._metrics[mode].update({name: [value] for name, value in origins.items()})
        measured = self._measured[mode].compute(self.accelerator.gather)
        self._measured[mode].reset()
        self._metrics[mode].update({name: [value] for name, value in measured.scalars.items()})
        if mode == "train":
            self.trust_region = measured
        super().log(logs, start_time)


def _positions(attention_mask: Tensor) -> Tensor:
    """Positions that do not count left padding, as in generation."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
