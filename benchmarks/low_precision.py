"""Rollout models in lower precision: how far their log-probs are from the FP32 policy's, and what they cost in time.

The model has random weights; the tokens are drawn uniformly. ``hardware`` says whether FP8 products run in the device's
matrix units or are emulated. The time is that of one forward pass over all sequences, over that of BF16.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, get_args

import torch
from rich.progress import track

from benchmarks import measure, tables
from benchmarks.training_phase import on_cpu, on_gpu
from drpo.precision import RolloutPrecision, has_fp8, make_rollout_model, quantized

PACKAGES = ("torch", "torchao", "transformers")


@torch.no_grad()
def run(command: str, *, small: bool = False) -> list[dict[str, Any]]:
    provenance = tables.provenance(command, PACKAGES)
    on_device = torch.cuda.is_available() and not small
    size, device = (on_gpu(), "cuda") if on_device else (on_cpu(), "cpu")
    sequences, length = (32, 1024) if on_device else (8, 64)
    policy = size.model().to(device).eval()
    ids = torch.randint(10, size.vocabulary, (sequences, length), device=device)

    def log_probs(model: Any) -> torch.Tensor:
        # A few sequences at a time: logits of a large vocabulary take gigabytes.
        chunks = []
        for rows in ids.split(4):
            logits = model(input_ids=rows[:, :-1]).logits.float()
            chunks.append(torch.log_softmax(logits, dim=-1).gather(2, rows[:, 1:, None]).squeeze(2))
        return torch.cat(chunks)

    exact = log_probs(policy)
    gaps, passes = {}, {}
    for precision in track(get_args(RolloutPrecision), description="low precision"):
        model = quantized(make_rollout_model(policy, precision), precision)
        gaps[precision] = (log_probs(model) - exact).abs().flatten()
        passes[precision] = _forward(model, ids)
    times = measure.seconds(passes, rounds=1 if small else 5)
    return [
        {
            "rollout": precision,
            "hardware": has_fp8() if precision == "fp8" else "",
            "log_ratio_mean": f"{gap.mean().item():.3g}",
            "log_ratio_p99": f"{gap.quantile(0.99).item():.3g}",
            "time_over_bf16": f"{measure.ratio(times[precision], times['bf16']):.2f}",
            "seconds": f"{statistics.median(times[precision]):.4f}",
            **provenance,
        }
        for precision, gap in gaps.items()
    ]


def _forward(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: model.model(input_ids=ids).last_hidden_state)
