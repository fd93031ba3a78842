"""Arguments of the fused loss, and what is made of them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from drpo.kernels import FusedLoss, PackedTokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

HEAD = {"temperature": 0.7, "logit_scale": 1.3}


def case(seed: int, tokens: int = 37, width: int = 16, vocabulary: int = 101, top_k: int = 5) -> dict[str, Any]:
    """Arguments of the fused loss in fp64, on the GPU if there is one, a third of the advantages 0; sequences of seven tokens."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=DEVICE)

    hidden, weight, bias = normal(tokens, width), normal(vocabulary, width) * width**-0.5, 0.1 * normal(vocabulary)
    token_ids = torch.randint(vocabulary, (tokens,), generator=generator, device=DEVICE)
    logits = (hidden @ weight.t() + bias) * HEAD["logit_scale"] / HEAD["temperature"]
    behavior = (logits + 0.3 * normal(tokens, vocabulary)).log_softmax(dim=1)
    behavior_logp = behavior.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    likeliest = behavior.topk(min(top_k, vocabulary), dim=1)
    advantage = normal(tokens) * (torch.rand(tokens, generator=generator, device=DEVICE) > 1 / 3)
    return {
        "hidden": hidden,
        "lm_head_weight": weight,
        "bias": bias,
        "token_ids": token_ids,
        "behavior_logp": behavior_logp,
        "old_logp": (behavior_logp + 0.3 * normal(tokens)).clamp(max=0),
        "advantage": advantage,
        "scale": torch.rand(tokens, generator=generator, dtype=torch.float64, device=DEVICE) / max(tokens, 1),
        "sequence_ids": torch.arange(tokens, device=DEVICE) // 7,
        "top_k_ids": likeliest.indices,
        "top_k_behavior_logp": likeliest.values,
        **HEAD,
    }


LEAVES = ("hidden", "lm_head_weight", "bias")


def called(function: Any, given: dict[str, Any]) -> FusedLoss:
    """The function of these arguments, those of the tokens packed."""
    of_tokens = {field.name for field in fields(PackedTokens)} & given.keys()
    tokens = PackedTokens(**{name: given[name] for name in of_tokens})
    return function(tokens=tokens, **{name: value for name, value in given.items() if name not in of_tokens})


def differentiated(function: Any, given: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Loss, log-probs, entropies and three times the loss's gradients, with states and head in ``dtype``."""
    leaves = {name: given[name].to(dtype, copy=True).requires_grad_() for name in LEAVES if given[name] is not None}
    result = called(function, {**given, **leaves})
    (3 * result.loss).backward()
    grads = {f"by {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(grads) == len(leaves)
    return {**{name: value.detach() for name, value in result._asdict().items()}, **grads}


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()
