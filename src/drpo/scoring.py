"""Log-probs of the sampler's likeliest tokens under the policy being trained, from the logits of a whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What a forward pass makes of completions.

    Args:
        logp: [B, T], log π of each token of them.
        entropy: [B, T], of π at each token, in nats; without gradient.
        top_k_logp: [B, T, K], log π of the tokens asked for.
        aux_loss: the load-balancing loss of a mixture of experts, if asked for.
    """

    logp: Tensor
    entropy: Tensor
    top_k_logp: Tensor
    aux_loss: Tensor | None


def score_top_k(
    model: Any, completion_ids: Tensor, top_k_ids: Tensor, temperature: float, model_inputs: dict[str, Any]
) -> Scores:
    """Score completions and the tokens in ``top_k_ids`` at each of their positions.

    TRL's fused head keeps no logits, so this holds the completions' [B, T, V] in fp32 a few times.

    Args:
        model: a causal language model whose forward takes ``logits_to_keep``.
        completion_ids: [B, T], the last T tokens of the inputs.
        top_k_ids: [B, T, K].
        temperature: what logits are divided by.
        model_inputs: of the forward pass: ids, attention mask and whatever else it takes.
    """
    outputs = model(**model_inputs, use_cache=False, logits_to_keep=completion_ids.shape[1] + 1)
    log_probs = (outputs.logits[:, :-1].float() / temperature).log_softmax(dim=2)
    detached = log_probs.detach()
    return Scores(
        logp=log_probs.gather(2, completion_ids.unsqueeze(2)).squeeze(2),
        entropy=-(detached.exp() * detached).sum(dim=2),
        top_k_logp=log_probs.gather(2, top_k_ids),
        aux_loss=getattr(outputs, "aux_loss", None),
    )
