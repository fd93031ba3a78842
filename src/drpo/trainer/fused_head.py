"""A causal language model whose forward pass can return the fused loss of its objective instead of logits."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from drpo.kernels import PackedTokens, fused_policy_loss
from drpo.kernels.logits import LogitTransform
from drpo.objectives import Objective

# What models call the factor on their logits.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


LOGIT_TOLERANCE = 0.02
"""Of :func:`why_not_fused`, over the largest logit: above bf16's rounding of a head's output and a soft-cap."""


@dataclass(frozen=True)
class ScoredTokens:
    """What :func:`fused_policy_loss` needs beside hidden states and head.

    Args:
        places: where among [B, L] hidden states the next token is one that counts: bool, or rows and columns.
        objective: of the loss.
        tokens: those tokens, in order.
    """

    places: Tensor | tuple[Tensor, Tensor]
    objective: Objective
    tokens: PackedTokens


def why_not_fused(model: Any) -> str | None:
    """Why the fused loss cannot take the place of the model's LM head; None where it can."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its LM head is a {type(head).__name__}, not a plain Linear"
    if model.base_model is model:
        return "its body cannot be told from its LM head"
    if not head.weight.is_meta and not (error := _logit_error(model)) <= LOGIT_TOLERANCE:
        return f"its logits are {error:.2g} times their largest away from those of its body and LM head"
    return None


def lengthens_prompts(model: Any) -> bool:
    """Whether peft's prompt tuning is on; prefix tuning has its tokens in the cache, out of the states."""
    adapters = getattr(model, "peft_config", {}).values()
    return any(adapter.is_prompt_learning and adapter.peft_type != "PREFIX_TUNING" for adapter in adapters)


@torch.no_grad()
def _logit_error(model: Any) -> float:
    """How far the model's logits of a few tokens are from what the fused loss takes them to be, over the largest of them.

    There are models that have more between body and head, or another factor, than can be read from their config.
    """
    head = model.get_output_embeddings()
    ids = torch.linspace(0, head.out_features - 1, 8, device=head.weight.device).long().unsqueeze(0)
    training = model.training
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    model.train(training)
    transform = _transform(model.config.get_text_config())
    return ((transform(head(states).float()) - logits).abs().amax() / logits.abs().amax()).item()


def add_policy_loss(model: Any, temperature: float) -> None:
    """Let ``model(input_ids=..., scored=ScoredTokens(...))`` return a :class:`drpo.kernels.FusedLoss` and, with
    ``output_router_logits=True``, the load-balancing loss of its experts, else None. Other calls stay as they are.

    Within the model's forward pass, so that what wraps it (DDP, FSDP2, autocast) sees an ordinary one.
    """
    forward: Callable[..., Any] = model.forward
    transform = _transform(model.config.get_text_config())

    @functools.wraps(type(model).forward)
    def with_policy_loss(
        self: Any, input_ids: Any = None, *args: Any, scored: ScoredTokens | None = None, **kwargs: Any
    ) -> Any:
        if scored is None:
            return forward(input_ids, *args, **kwargs)
        # PEFT passes what its own forward has a name for.
        kwargs.pop("labels", None)
        kwargs |= {"input_ids": input_ids, "use_cache": False}
        if kwargs.get("output_router_logits"):
            # The model makes its load-balancing loss beside the logits, of which one a sequence is the least it makes.
            with _last_hidden_state_of(self.base_model) as body:
                aux_loss = forward(**kwargs, logits_to_keep=1).aux_loss
            states = body["last_hidden_state"]
        else:
            aux_loss, states = None, self.base_model(**kwargs).last_hidden_state
        head = self.get_output_embeddings()
        fused_loss = fused_policy_loss(
            states[scored.places],
            _whole(head.weight),
            scored.tokens,
            scored.objective,
            bias=None if head.bias is None else _whole(head.bias),
            temperature=temperature,
            logit_scale=transform.scale,
            softcap=transform.softcap,
        )
        return fused_loss, aux_loss

    # A bound method: Accelerate takes it apart to put autocast around it.
    model.forward = types.MethodType(with_policy_loss, model)


@contextmanager
def _last_hidden_state_of(body: Any) -> Iterator[dict[str, Any]]:
    """Within this context a forward pass of the body leaves its ``last_hidden_state`` in the dict."""
    outputs: dict[str, Any] = {}
    handle = body.register_forward_hook(lambda _module, _args, output: outputs.update(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _whole(parameter: Tensor) -> Tensor:
    """The parameter, gathered where FSDP2 has it sharded as a module of its own; its gradient is the ranks' mean, as FSDP's are."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _transform(text_config: Any) -> LogitTransform:
    factor = next((value for name in _FACTORS if (value := getattr(text_config, name, None)) is not None), 1.0)
    divisor = getattr(text_config, "logits_scaling", None)
    return LogitTransform(
        scale=factor if divisor is None else 1 / divisor,
        softcap=getattr(text_config, "final_logit_softcapping", None),
    )
