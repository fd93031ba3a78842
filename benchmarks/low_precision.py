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
from benchmarks.training_phase import Size, on_cpu, on_gpu
from drpo.precision import RolloutPrecision, has_fp8, make_rollout_model, quantized

PACKAGES = ("torch", "torchao", "transformers")


def run(command: str) -> list[dict[str, Any]]:
    return compare(cases(), 5, command)


def cases(*, small: bool = False) -> list[Size]:
    return [on_gpu() if torch.cuda.is_available() and not small else on_cpu()]


@torch.no_grad()
def compare(sizes: list[Size], rounds: int, command: str) -> list[dict[str, Any]]:
    """A row for each size and precision."""
    provenance = tables.provenance(command, PACKAGES)
    return [{**row, **provenance} for size in sizes for row in _measured(size, rounds)]


def _measured(size: Size, rounds: int) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = size.model().to(device).eval()
    ids = torch.randint(10, size.vocabulary, (4 * size.batch, size.longest), device=device)

    def log_probs(model: Any) -> torch.Tensor:
        # A few sequences at a time: logits of a large vocabulary take gigabytes.
        chunks = []
        for rows in ids.split(4):
            logits = model(input_ids=rows[:, :-1]).logits.float()
            chunks.append(torch.log_softmax(logits, dim=-1).gather(2, rows[:, 1:, None]).squeeze(2))
        return torch.cat(chunks)

    def forward(model: Any) -> Callable[[], object]:
        return lambda: model.model(input_ids=ids).last_hidden_state

    exact = log_probs(policy)
    gaps, passes = {}, {}
    for precision in track(get_args(RolloutPrecision), description="low precision"):
        model = quantized(make_rollout_model(policy, precision), precision)
        gaps[precision] = (log_probs(model) - exact).abs().flatten()
        passes[precision] = forward(model)
    times = measure.seconds(passes, rounds)
    return [
        {
            "rollout": precision,
            "hardware": has_fp8() if precision == "fp8" else "",
            "log_ratio_mean": f"{gap.mean().item():.3g}",
            "log_ratio_p99": f"{gap.quantile(0.99).item():.3g}",
            "time_over_bf16": f"{measure.ratio(times[precision], times['bf16']):.2f}",
            "seconds": f"{statistics.median(times[precision]):.4f}",
        }
        for precision, gap in gaps.items()
    ]
