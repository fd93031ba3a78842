"""Mixtures of experts of random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS |= {"experts_implementation": "eager"}
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {},
    "Qwen3_5Moe": {**LINEAR, "layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "Mixtral": {"sliding_window": None},
    "Olmoe": {},
    "GptOss": {"layer_types": ["full_attention"] * 3},
}


def make_mixture(architecture: str = "Qwen3Moe", std: float = 0.3) -> Any:
    """A mixture of random experts, which make a difference."""
    names = [f"{architecture}TextConfig", f"{architecture}Config"]
    config_type = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    # Without a load-balancing loss, which is of its own choice and over each micro-batch.
    config = config_type(**SMALL, **EXPERTS, **ARCHITECTURES[architecture], router_aux_loss_coef=0.0)
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()
