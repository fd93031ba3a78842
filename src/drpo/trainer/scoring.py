"""What a forward pass makes of sampled completions: the loss of an objective, and what there is to measure."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.nn.functional import pad
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from drpo.kernels import PackedTokens
from drpo.objectives import Anchor, Objective, TopKObjective
from drpo.rollout.recorder import NOT_IN_SUPPORT
from drpo.rollout.routing import ExpertReplay, find_routers
from drpo.tokens import TokenBatch, TopK
from drpo.trainer.batch import RolloutBatch, left_aligned, lengths, loss_mask, recorded_experts
from drpo.trainer.config import DRPOConfig
from drpo.trainer.fused_head import ScoredTokens, add_policy_loss, lengthens_prompts, why_not_fused
from drpo.trainer.micro_batches import Layout, PaddedRows
from drpo.trainer.shared_prompts import DistinctTokens, add_shared_attention, share_tokens, why_not_shared

logger = logging.getLogger(__name__)


class Scored(NamedTuple):
    """A micro-batch's loss and its tokens.

    Attributes:
        loss: scalar, its share of the update's.
        sampled: the tokens under the policy.
        gradient_weight: the objective's of each token, as ``sampled`` has them.
        entropy: of π at each, in nats.
        aux_loss: the load-balancing loss of a mixture of experts, if it was asked for.
        other_experts: [tokens that count, layers], which share of the experts that sampled each the policy would not
            choose, where they were recorded.
    """

    loss: Tensor
    sampled: TokenBatch
    gradient_weight: Tensor
    entropy: Tensor
    aux_loss: Tensor | None = None
    other_experts: Tensor | None = None


@dataclass(frozen=True)
class FusedScorer:
    """Scores in one pass over the LM head; the tokens that count are in one row, without padding.

    Args:
        objective: of the loss.
        anchor: what its ratio is taken against.
        with_aux_loss: ask a mixture of experts for its load-balancing loss.
        shares_prompts: let a prompt go through the model once, however many completions of it are in a micro-batch.
        experts: compares them with the sampler's, or takes those, in a mixture of experts.
    """

    objective: Objective
    anchor: Anchor
    with_aux_loss: bool = False
    shares_prompts: bool = False
    experts: ExpertReplay | None = None

    @property
    def layout(self) -> Callable[[RolloutBatch], Layout]:
        """Of the sequences of a batch."""
        return DistinctTokens if self.shares_prompts else PaddedRows

    def __call__(self, model: Any, batch: RolloutBatch, scale: Tensor, longest: int) -> Scored:
        """Score a micro-batch.

        Args:
            model: whose forward takes ``scored`` (:func:`drpo.trainer.fused_head.add_policy_loss`).
            batch: of B sequences and C completion columns.
            scale: [B, C], of each token's loss (:func:`drpo.token_scale`).
            longest: tokens of the longest sequence of the update.
        """
        counted = loss_mask(batch).bool()

        def values_of_tokens(name: str) -> Tensor | None:
            return batch[name][counted] if name in batch else None

        sequences, _ = counted.nonzero(as_tuple=True)
        tokens = PackedTokens(
            token_ids=batch["completion_ids"][counted],
            behavior_logp=batch["sampling_per_token_logps"][counted],
            advantage=batch["advantages"][sequences],
            scale=scale[counted],
            # The old policy is π itself where a rollout is a single update.
            old_logp=values_of_tokens("old_per_token_logps") if self.anchor == "old" else None,
            anchor=self.anchor,
            sequence_ids=sequences,
            top_k_ids=values_of_tokens("top_k_ids"),
            top_k_behavior_logp=values_of_tokens("top_k_per_token_logps"),
        )
        inputs, predicts, experts = self._inputs(batch, longest)
        if self.experts is not None:
            self.experts.expect(experts)
        (loss, logp, entropy, weight), aux_loss = model(**inputs, scored=ScoredTokens(predicts, self.objective, tokens))
        in_one_row = replace(tokens, sequence_ids=None)
        other_experts = self.experts and self.experts.differing_at(inputs["input_ids"].shape, predicts)
        return Scored(loss, in_one_row.batch(logp), weight.unsqueeze(0), entropy.unsqueeze(0), aux_loss, other_experts)

    def _inputs(
        self, batch: RolloutBatch, longest: int
    ) -> tuple[dict[str, Any], Tensor | tuple[Tensor, Tensor], Tensor | None]:
        """The model's inputs, where in them the next token is one that counts, and the sampler's experts of each."""
        if self.shares_prompts:
            shared = share_tokens(batch, longest)
            places = shared.predicts[loss_mask(batch).bool()]
            return shared.inputs, (torch.zeros_like(places), places), shared.experts
        ids, places, experts = left_aligned(batch, longest)
        if not self.with_aux_loss:
            return {"input_ids": ids[:, :-1]}, places[:, 1:], None if experts is None else experts[:, :-1]
        # It is over all tokens, also the last of the longest sequence, which predicts none.
        has_token = torch.arange(ids.shape[1], device=ids.device) < lengths(batch).unsqueeze(1)
        inputs = {"input_ids": ids, "attention_mask": has_token.long(), "output_router_logits": True}
        return inputs, pad(places[:, 1:], (0, 1)), experts


class LogProbs(NamedTuple):
    """What a forward pass that keeps no gradient of its own makes of completions.

    Attributes:
        logp: [B, C], log π of each token of them.
        entropy: [B, C], of π at each token, in nats; without gradient.
        aux_loss: the load-balancing loss of a mixture of experts, if asked for.
        top_k_logp: [B, C, K], log π of the sampler's likeliest tokens, if asked for.
    """

    logp: Tensor
    entropy: Tensor
    aux_loss: Tensor | None = None
    top_k_logp: Tensor | None = None


@dataclass(frozen=True)
class PaddedScorer:
    """Scores from log-probs that autograd differentiates, for models that the fused loss does not fit.

    Args:
        objective: of the loss.
        anchor: what its ratio is taken against.
        log_probs: from a model, a batch and the model's inputs: one of :func:`chunked_log_probs`,
            :func:`top_k_log_probs`, :func:`support_log_probs`.
        takes_positions: whether the model's forward takes ``position_ids``.
        with_aux_loss: ask a mixture of experts for its load-balancing loss.
        experts: as :class:`FusedScorer`'s.
    """

    objective: Objective
    anchor: Anchor
    log_probs: Callable[[Any, RolloutBatch, dict[str, Any]], LogProbs]
    takes_positions: bool
    with_aux_loss: bool = False
    experts: ExpertReplay | None = None

    @property
    def layout(self) -> Callable[[RolloutBatch], Layout]:
        """Of the sequences of a batch."""
        return partial(PaddedRows, apart=True)

    def __call__(self, model: Any, batch: RolloutBatch, scale: Tensor, longest: int) -> Scored:
        """Score a micro-batch; arguments as :class:`FusedScorer`'s, of which ``longest`` is not needed."""
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        inputs: dict[str, Any] = {
            "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            "attention_mask": attention_mask,
        }
        if self.takes_positions:
            # As in generation, positions do not count left padding.
            inputs["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        if self.with_aux_loss:
            inputs["output_router_logits"] = True
        if self.experts is not None:
            self.experts.expect(recorded_experts(batch))
        scores = self.log_probs(model, batch, inputs)
        predicts = pad(loss_mask(batch).bool(), (batch["prompt_ids"].shape[1] - 1, 1))
        other_experts = self.experts and self.experts.differing_at(attention_mask.shape, predicts)
        topk = None
        if scores.top_k_logp is not None:
            is_sampled = batch["top_k_ids"] == batch["completion_ids"].unsqueeze(2)
            topk = TopK(scores.top_k_logp, batch["top_k_per_token_logps"], is_sampled)
        tokens = TokenBatch(
            logp=scores.logp,
            behavior_logp=batch["sampling_per_token_logps"],
            advantage=batch["advantages"],
            mask=loss_mask(batch),
            old_logp=batch.get("old_per_token_logps", scores.logp.detach()) if self.anchor == "old" else None,
            anchor=self.anchor,
            topk=topk,
        )
        loss = (scale * self.objective.loss(tokens)).sum()
        weight = self.objective.gradient_weight(tokens)
        return Scored(loss, tokens, weight, scores.entropy, scores.aux_loss, other_experts)


Scorer = FusedScorer | PaddedScorer


def make_scorer(
    policy: Any, args: DRPOConfig, objective: Objective, anchor: Anchor, temperature: float, with_aux_loss: bool
) -> Scorer:
    """The fused loss, put into the policy's forward, where it fits; elsewhere one line says why not. All ranks call it together.

    Args:
        policy: perhaps with adapters, but not wrapped by Accelerate.
        args: the trainer's options.
        objective: of the loss.
        anchor: what its ratio is taken against.
        temperature: what logits are divided by.
        with_aux_loss: ask a mixture of experts for its load-balancing loss.
    """
    bare = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    reasons = (
        (not args.fused_loss, "fused_loss=False"),
        (args.cast_lm_head_to_fp32, "cast_lm_head_to_fp32 is TRL's fused head's"),
        (args.replay_support, "log-probs over the sampler's support need all logits"),
        (lengthens_prompts(policy), "its adapters put tokens before the prompt"),
        (is_deepspeed_zero3_enabled(), "DeepSpeed ZeRO-3 has the LM head's weight in parts"),
    )
    reason = next((text for applies, text in reasons if applies), None) or why_not_fused(bare)
    # Other ranks may have no weights yet to find out with.
    [reason] = broadcast_object_list([reason])
    shares_prompts = False
    if reason is None:
        add_policy_loss(bare, temperature)
        shares_prompts = args.share_prompts and _shares_prompts(policy, bare, with_aux_loss)
    # After the probes above, which nothing was recorded for.
    experts = ExpertReplay(bare, args.router_replay) if find_routers(bare) else None
    if reason is None:
        return FusedScorer(objective, anchor, with_aux_loss, shares_prompts, experts)
    if args.fused_loss and PartialState().is_main_process:
        logger.warning("No fused loss for this model: %s. TRL's chunked LM head takes its place.", reason)
    log_probs = chunked_log_probs
    if isinstance(objective, TopKObjective):
        log_probs = partial(top_k_log_probs, temperature=temperature)
    elif args.replay_support:
        log_probs = partial(support_log_probs, temperature=temperature)
    takes_positions = "position_ids" in inspect.signature(bare.forward).parameters
    return PaddedScorer(objective, anchor, log_probs, takes_positions, with_aux_loss, experts)


def _shares_prompts(policy: Any, bare: Any, with_aux_loss: bool) -> bool:
    """Whether the model's prompts are shared, as they are where that changes nothing; elsewhere one line says why not. All ranks call it together."""
    adapters = getattr(policy, "peft_config", {}).values()
    reasons = (
        (with_aux_loss, "its load-balancing loss counts the tokens of every sequence"),
        (any(adapter.is_prompt_learning for adapter in adapters), "its adapters put tokens before the prompt"),
    )
    reason = next((text for applies, text in reasons if applies), None) or why_not_shared(bare)
    [reason] = broadcast_object_list([reason])
    if reason is None:
        add_shared_attention(bare)
    elif PartialState().is_main_process:
        logger.warning("The prompt of a group is computed once a completion: %s.", reason)
    return reason is None


def chunked_log_probs(model: Any, batch: RolloutBatch, inputs: dict[str, Any]) -> LogProbs:
    """Score completions with the LM head that TRL puts into the model, which keeps no logits and divides by the temperature."""
    columns = batch["completion_ids"].shape[1]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-columns] = -100
    outputs = model(**inputs, labels=labels, fused_lm_head=True)
    return LogProbs(outputs.log_probs[:, -columns:], outputs.entropy[:, -columns:], getattr(outputs, "aux_loss", None))


def top_k_log_probs(model: Any, batch: RolloutBatch, inputs: dict[str, Any], *, temperature: float) -> LogProbs:
    """Score completions and the sampler's likeliest tokens at each of their positions.

    The completions' logits, [B, C, V] in fp32, are held a few times; they are divided by the temperature.
    """
    outputs, logits = _logits(model, batch, inputs, temperature)
    log_probs = logits.log_softmax(dim=2)
    detached = log_probs.detach()
    return LogProbs(
        logp=log_probs.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2),
        entropy=-(detached.exp() * detached).sum(dim=2),
        aux_loss=getattr(outputs, "aux_loss", None),
        top_k_logp=log_probs.gather(2, batch["top_k_ids"]),
    )


def support_log_probs(model: Any, batch: RolloutBatch, inputs: dict[str, Any], *, temperature: float) -> LogProbs:
    """Score completions over the tokens that the sampler could draw, as if π were filtered to them too.

    The entropy is that over the support. Memory as for :func:`top_k_log_probs`.
    """
    outputs, logits = _logits(model, batch, inputs, temperature)
    within = batch["support_ids"] != NOT_IN_SUPPORT
    # Padding has no support; a finite sum there keeps NaN out of the gradient.
    within = within | ~within.any(dim=2, keepdim=True)
    kept = logits.gather(2, batch["support_ids"].clamp(min=0)).masked_fill(~within, -torch.inf)
    total = kept.logsumexp(dim=2, keepdim=True)
    probs = (kept - total).detach().exp()
    terms = torch.where(within, probs * (kept - total).detach().clamp(min=-1e4), 0.0)
    return LogProbs(
        logp=(logits.gather(2, batch["completion_ids"].unsqueeze(2)) - total).squeeze(2),
        entropy=-terms.sum(dim=2),
        aux_loss=getattr(outputs, "aux_loss", None),
    )


def _logits(model: Any, batch: RolloutBatch, inputs: dict[str, Any], temperature: float) -> tuple[Any, Tensor]:
    """The model's outputs, and its logits of the completions over the temperature, [B, C, V] in fp32."""
    outputs = model(**inputs, use_cache=False, logits_to_keep=batch["completion_ids"].shape[1] + 1)
    return outputs, outputs.logits[:, :-1].float() / temperature
