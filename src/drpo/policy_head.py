"""A causal language model whose forward pass can return the fused loss of its objective instead of logits."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from drpo.kernels import fused_policy_loss
from drpo.objectives import Objective

# What models call the factor on their logits. Granite and MiniCPM3 divide by logits_scaling, HyperCLOVA X multiplies.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


@dataclass(frozen=True)
class ScoredTokens:
    """What :func:`fused_policy_loss` needs to know of a batch's tokens, beside hidden states and head.

    Args:
        places: [B, L], bool, where the next token is one that counts.
        objective: of the loss.
        tokens: the other arguments of ``fused_policy_loss``, over those tokens in order.
    """

    places: Tensor
    objective: Objective
    tokens: dict[str, Any]


def why_not_fused(model: Any) -> str | None:
    """Why the fused loss cannot take the place of the model's LM head; None where it can."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its LM head is a {type(head).__name__}, not a plain Linear"
    if model.base_model is model:
        return "its body cannot be told from its LM head"
    if model.config.get_text_config().model_type == "hyperclovax":
        return "its logits_scaling multiplies, where other models' divides"
    return None


def add_policy_loss(model: Any, temperature: float) -> None:
    """Let ``model(input_ids=..., scored=ScoredTokens(...))`` return a :class:`drpo.kernels.FusedLoss`; other calls stay as they are.

    Within the model's forward pass, so that what wraps it (DDP, FSDP2, autocast) sees an ordinary one.
    """
    forward: Callable[..., Any] = model.forward
    text_config = model.config.get_text_config()
    transform = {"temperature": temperature, **_transform(text_config)}

    @functools.wraps(type(model).forward)
    def with_policy_loss(
        self: Any, input_ids: Any = None, *args: Any, scored: ScoredTokens | None = None, **kwargs: Any
    ) -> Any:
        if scored is None:
            return forward(input_ids, *args, **kwargs)
        # PEFT passes what its own forward has a name for.
        kwargs.pop("labels", None)
        states = self.base_model(input_ids=input_ids, **kwargs, use_cache=False).last_hidden_state
        head = self.get_output_embeddings()
        return fused_policy_loss(
            states[scored.places],
            _whole(head.weight),
            bias=None if head.bias is None else _whole(head.bias),
            objective=scored.objective,
            **transform,
            **scored.tokens,
        )

    # A bound method: Accelerate takes it apart to put autocast around it.
    model.forward = types.MethodType(with_policy_loss, model)


def _whole(parameter: Tensor) -> Tensor:
    """The parameter, gathered where FSDP2 has it sharded as a module of its own; its gradient is the ranks' mean, as FSDP's are."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _transform(text_config: Any) -> dict[str, Any]:
    factor = next((value for name in _FACTORS if (value := getattr(text_config, name, None)) is not None), 1.0)
    divisor = getattr(text_config, "logits_scaling", None)
    return {
        "logit_scale": factor if divisor is None else 1 / divisor,
        "softcap": getattr(text_config, "final_logit_softcapping", None),
    }
