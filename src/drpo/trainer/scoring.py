"""What a forward pass makes of sampled completions: the loss of an objective, and what there is to measure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drpo.kernels import PackedTokens
from drpo.objectives import Anchor, Objective
from drpo.rollout.recorder import NOT_IN_SUPPORT
from drpo.tokens import TokenBatch, TopK
from drpo.trainer.fused_head import ScoredTokens
from drpo.trainer.micro_batches import left_aligned, loss_mask


class Scored(NamedTuple):
    """A micro-batch's loss and its tokens.

    Attributes:
        loss: scalar, its share of the update's.
        sampled: the tokens under the policy.
        gradient_weight: the objective's of each token, as ``sampled`` has them.
        entropy: of π at each, in nats.
        aux_loss: the load-balancing loss of a mixture of experts, if it was asked for.
    """

    loss: Tensor
    sampled: TokenBatch
    gradient_weight: Tensor
    entropy: Tensor
    aux_loss: Tensor | None = None


class Scores(NamedTuple):
    """What a forward pass that keeps no gradient of its own makes of completions.

    Attributes:
        logp: [B, T], log π of each token of them.
        entropy: [B, T], of π at each token, in nats; without gradient.
        aux_loss: the load-balancing loss of a mixture of experts, if asked for.
        top_k_logp: [B, T, K], log π of the sampler's likeliest tokens, if asked for.
    """

    logp: Tensor
    entropy: Tensor
    aux_loss: Tensor | None = None
    top_k_logp: Tensor | None = None


def score_fused(
    model: Any, inputs: dict[str, Any], scale: Tensor, objective: Objective, anchor: Anchor, longest: int
) -> Scored:
    """In one pass over the LM head; the tokens that count are in one row, without padding.

    Args:
        model: whose forward takes ``scored`` (:func:`drpo.trainer.fused_head.add_policy_loss`).
        inputs: the trainer's, of one micro-batch.
        scale: [B, T], of each token's loss (:func:`drpo.token_scale`).
        objective: of the loss.
        anchor: what its ratio is taken against.
        longest: tokens of the longest sequence of the update.
    """
    counted = loss_mask(inputs).bool()

    def of_tokens(name: str) -> Tensor | None:
        return inputs[name][counted] if inputs.get(name) is not None else None

    ids, places = left_aligned(inputs, longest)
    sequences, _ = places.nonzero(as_tuple=True)
    tokens = PackedTokens(
        token_ids=ids[places],
        behavior_logp=inputs["sampling_per_token_logps"][counted],
        advantage=inputs["advantages"][sequences],
        scale=scale[counted],
        # TRL keeps no log-probs of the old policy where a rollout is a single update: it is π then.
        old_logp=of_tokens("old_per_token_logps") if anchor == "old" else None,
        anchor=anchor,
        sequence_ids=sequences,
        top_k_ids=of_tokens("top_k_ids"),
        top_k_behavior_logp=of_tokens("top_k_sampling_logps"),
    )
    loss, logp, entropy, weight = model(input_ids=ids[:, :-1], scored=ScoredTokens(places[:, 1:], objective, tokens))
    in_one_row = replace(tokens, sequence_ids=None)
    return Scored(loss, in_one_row.batch(logp), weight.unsqueeze(0), entropy.unsqueeze(0))


def score_plain(scores: Scores, inputs: dict[str, Any], scale: Tensor, objective: Objective, anchor: Anchor) -> Scored:
    """The same from log-probs that autograd differentiates; other arguments as :func:`score_fused`'s."""
    topk = None
    if scores.top_k_logp is not None:
        is_sampled = inputs["top_k_ids"] == inputs["completion_ids"].unsqueeze(2)
        topk = TopK(scores.top_k_logp, inputs["top_k_sampling_logps"], is_sampled)
    batch = TokenBatch(
        logp=scores.logp,
        behavior_logp=inputs["sampling_per_token_logps"],
        advantage=inputs["advantages"],
        mask=loss_mask(inputs),
        old_logp=inputs.get("old_per_token_logps", scores.logp.detach()) if anchor == "old" else None,
        anchor=anchor,
        topk=topk,
    )
    loss = (scale * objective.loss(batch)).sum()
    return Scored(loss, batch, objective.gradient_weight(batch), scores.entropy, scores.aux_loss)


def score_top_k(
    model: Any, completion_ids: Tensor, top_k_ids: Tensor, temperature: float, model_inputs: dict[str, Any]
) -> Scores:
    """Score completions and the tokens in ``top_k_ids`` at each of their positions.

    For models that the fused loss does not fit. TRL's head keeps no logits, so this holds the
    completions' [B, T, V] in fp32 a few times.

    Args:
        model: a causal language model whose forward takes ``logits_to_keep``.
        completion_ids: [B, T], the last T tokens of the inputs.
        top_k_ids: [B, T, K].
        temperature: what logits are divided by.
        model_inputs: of the forward pass: ids, attention mask and whatever else it takes.
    """
    outputs, logits = _logits(model, completion_ids, temperature, model_inputs)
    log_probs = logits.log_softmax(dim=2)
    detached = log_probs.detach()
    return Scores(
        logp=log_probs.gather(2, completion_ids.unsqueeze(2)).squeeze(2),
        entropy=-(detached.exp() * detached).sum(dim=2),
        aux_loss=getattr(outputs, "aux_loss", None),
        top_k_logp=log_probs.gather(2, top_k_ids),
    )


def score_support(
    model: Any, completion_ids: Tensor, support_ids: Tensor, temperature: float, model_inputs: dict[str, Any]
) -> Scores:
    """Score completions over the tokens that the sampler could draw, as if π were filtered to them too.

    Arguments and memory as :func:`score_top_k`'s, but for ``support_ids``, [B, T, K], with
    :data:`~drpo.rollout.recorder.NOT_IN_SUPPORT` in places left over. The entropy is that over the support.
    """
    outputs, logits = _logits(model, completion_ids, temperature, model_inputs)
    within = support_ids != NOT_IN_SUPPORT
    # Padding has no support; a finite sum there keeps NaN out of the gradient.
    within = within | ~within.any(dim=2, keepdim=True)
    kept = logits.gather(2, support_ids.clamp(min=0)).masked_fill(~within, -torch.inf)
    total = kept.logsumexp(dim=2, keepdim=True)
    probs = (kept - total).detach().exp()
    terms = torch.where(within, probs * (kept - total).detach().clamp(min=-1e4), 0.0)
    return Scores(
        logp=(logits.gather(2, completion_ids.unsqueeze(2)) - total).squeeze(2),
        entropy=-terms.sum(dim=2),
        aux_loss=getattr(outputs, "aux_loss", None),
    )


def _logits(model: Any, completion_ids: Tensor, temperature: float, model_inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """The model's outputs, and its logits of the completions over the temperature, [B, T, V] in fp32."""
    outputs = model(**model_inputs, use_cache=False, logits_to_keep=completion_ids.shape[1] + 1)
    return outputs, outputs.logits[:, :-1].float() / temperature
