"""Attention on a CPU against Transformers' sdpa: a decoded token, and forward and backward on short sequences.

``decode`` is a query a row under a mask, without a gradient, as in generation; ``train`` is forward and backward of
causal attention. Rows, heads and widths are those of SmolLM2-135M and of Qwen3-0.6B.
"""

from __future__ import annotations

import statistics
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks import measure, tables
from drpo.kernels.attention import attend_on_cpu

PACKAGES = ("torch", "transformers")
ROUNDS = 15
HEADS = {"SmolLM2-135M": (9, 3, 64), "Qwen3-0.6B": (16, 8, 128)}
"""Heads of queries, of keys, and their width."""
DECODED, TRAINED = (64, 250, 1000), (16, 64, 128, 256)
ROWS = {"decode": 64, "train": 16}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def decode(attend: Any, layer: Any, states: list[Tensor], mask: Tensor) -> None:
    with torch.no_grad():
        attend(layer, *states, mask)


def train(attend: Any, layer: Any, states: list[Tensor]) -> None:
    output, _ = attend(layer, *states, None)
    torch.autograd.grad(output.sum(), states)


def run(command: str, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    provenance = tables.provenance(command, PACKAGES)
    cases = [("decode", keys) for keys in DECODED] + [("train", keys) for keys in TRAINED]
    rows = []
    for (model, (heads, kv_heads, width)), (pass_, keys), (precision, dtype) in product(
        HEADS.items(), cases, DTYPES.items()
    ):
        layer = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
        queries = 1 if pass_ == "decode" else keys
        shapes = [(heads, queries), (kv_heads, keys), (kv_heads, keys)]
        states = [torch.randn(ROWS[pass_], *shape, width, dtype=dtype, requires_grad=True) for shape in shapes]
        mask = torch.ones(ROWS[pass_], 1, 1, keys, dtype=torch.bool)
        attends = {"drpo": attend_on_cpu, "Transformers": sdpa_attention_forward}
        times = measure.seconds(
            {
                name: partial(decode, attend, layer, states, mask)
                if pass_ == "decode"
                else partial(train, attend, layer, states)
                for name, attend in attends.items()
            },
            rounds,
        )
        rows.append(
            {
                "model": model,
                "pass": pass_,
                "keys": keys,
                "precision": precision,
                "drpo_ms": f"{statistics.median(times['drpo']) * 1000:.2f}",
                "transformers_ms": f"{statistics.median(times['Transformers']) * 1000:.2f}",
                "times_faster": f"{measure.ratio(times['Transformers'], times['drpo']):.2f}",
                "rounds": rounds,
                **provenance,
            }
        )
    return rows
