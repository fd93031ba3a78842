"""The fused loss of DRPO against its peers and against three bare matrix products: time and memory of loss and gradients.

The three products are ``torch.mm`` into memory that is there. All peers are given the same hidden states, head and tokens,
and asked for the gradients of both. Liger's loss is PPO's clip, its only kind; the others compute DRPO's from the log-probs
they return. The last case is the first beside a process that keeps a core busy.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from benchmarks import measure, tables
from drpo import PackedTokens, make_objective
from drpo.kernels import fused_policy_loss
from drpo.kernels.lm_head import workspace
from drpo.kernels.reference import reference_policy_loss

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "verl")
SEQUENCE = 1024 if torch.cuda.is_available() else 128
"""Tokens of a sequence, for the peer that wants sequences, and takes one at a time."""

FLOOR = "three products"

SHAPE = ("tokens", "width", "vocabulary", "dtype", "busy")

OBJECTIVE = make_objective("drpo", delta=0.2)
TRL_VOCABULARY_CHUNK = 32_768
"""As TRL 1.16 sets it (``trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE``)."""


@dataclass(frozen=True)
class Shape:
    """Of the tensors, and how many other processes keep a core busy meanwhile."""

    tokens: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    busy: int = 0


def cases(*, small: bool = False) -> list[Shape]:
    """One that all are compared at first, then growth in tokens and in vocabulary; on a GPU the head of Qwen3-4B."""
    if small:
        return [Shape(256, 64, 4096, torch.float32)]
    if torch.cuda.is_available():
        return [Shape(tokens, 2560, 151_936, torch.bfloat16) for tokens in (8192, 16_384, 32_768, 65_536)]
    base = Shape(1024, 512, 32_768, torch.float32)
    tokens = [Shape(n, base.width, base.vocabulary, base.dtype) for n in (256, 512, 2048)]
    vocabularies = [Shape(base.tokens, base.width, n, base.dtype) for n in (8192, 16_384, 65_536)]
    wide, beside_a_process = replace(base, width=1024), replace(base, busy=1)
    return [base, *tokens, *vocabularies, wide, beside_a_process]


@dataclass
class Tensors:
    """Hidden states, head and tokens of a shape; gradients are wanted of the first two."""

    hidden: Tensor
    weight: Tensor
    tokens: PackedTokens

    @classmethod
    def of(cls, shape: Shape) -> Tensors:
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        hidden = torch.randn(shape.tokens, shape.width, device=device).to(shape.dtype)
        weight = (torch.randn(shape.vocabulary, shape.width, device=device) * shape.width**-0.5).to(shape.dtype)
        token_ids = torch.randint(shape.vocabulary, (shape.tokens,), device=device)
        with torch.no_grad():
            logp = ChunkedLogProbFunction.apply(hidden, weight, None, token_ids, 1.0, TRL_VOCABULARY_CHUNK)[0]
        tokens = PackedTokens(
            token_ids=token_ids,
            behavior_logp=(logp.float() + 0.1 * torch.randn_like(logp, dtype=torch.float32)).clamp(max=0),
            advantage=torch.randn(shape.tokens, device=device),
            scale=torch.full((shape.tokens,), 1 / shape.tokens, device=device),
        )
        return cls(hidden.requires_grad_(), weight.requires_grad_(), tokens)

    def backward(self, loss: Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        loss.backward()

    def loss_of(self, logp: Tensor) -> Tensor:
        return (self.tokens.scale * OBJECTIVE.loss(self.tokens.batch(logp))).sum()


def _peers(given: Tensors) -> dict[str, Callable[[], object]]:
    hidden, weight, tokens = given.hidden, given.weight, given.tokens
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    by_hidden, by_weight = torch.empty_like(hidden), torch.empty_like(weight)

    @torch.no_grad()
    def three_products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=by_hidden)
        torch.mm(logits.t(), hidden, out=by_weight)

    def drpo() -> None:
        given.backward(fused_policy_loss(hidden, weight, tokens, OBJECTIVE).loss)

    def pytorch() -> None:
        given.backward(reference_policy_loss(hidden, weight, tokens, OBJECTIVE).loss)

    def trl() -> None:
        arguments = (hidden, weight, None, tokens.token_ids, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ("entropy",))
        given.backward(given.loss_of(ChunkedLogProbFunction.apply(*arguments)[0]))

    def in_sequences(tensor: Tensor) -> Tensor:
        return tensor.view(-1, SEQUENCE, *tensor.shape[1:])

    @lru_cache(maxsize=1)
    def liger_loss() -> Any:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        on_gpu = torch.cuda.is_available()
        return LigerFusedLinearGRPOLoss(beta=0.0, compiled=on_gpu, use_ref_model=False, loss_type="grpo")

    def liger() -> None:
        ids, behavior_logp, advantage = map(in_sequences, (tokens.token_ids, tokens.behavior_logp, tokens.advantage))
        loss, _ = liger_loss()(
            in_sequences(hidden),
            weight,
            ids,
            torch.ones_like(ids),
            advantage[:, 0],
            old_per_token_logps=behavior_logp,
        )
        given.backward(loss)

    def cut_cross_entropy() -> None:
        from cut_cross_entropy import linear_cross_entropy as cut

        impl = "cce" if torch.cuda.is_available() else "torch_compile"
        given.backward(given.loss_of(-cut(hidden, weight, tokens.token_ids, reduction="none", impl=impl)))

    def verl() -> None:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        logp, _ = linear_cross_entropy(hidden, weight, tokens.token_ids, 1.0, "none")
        given.backward(given.loss_of(logp))

    return {
        FLOOR: three_products,
        "drpo": drpo,
        "PyTorch": pytorch,
        "TRL": trl,
        "Liger": liger,
        "cut-cross-entropy": cut_cross_entropy,
        "verl": verl,
    }


def run(command: str) -> list[dict[str, Any]]:
    return compare(cases(), 7, command)


def compare(shapes: list[Shape], rounds: int, command: str) -> list[dict[str, Any]]:
    """A row for each shape and peer."""
    provenance = tables.provenance(command, PACKAGES)
    timed = [(shape, _timed(shape, rounds)) for shape in track(shapes, description="fused loss: time")]
    for shape, rows in track(timed, description="fused loss: memory"):
        given = Tensors.of(shape)
        peers = _peers(given)
        for row in rows:
            if row["seconds"] and row["peer"] != FLOOR and not shape.busy:
                row["extra_mib"] = f"{_extra_bytes(given, peers[row['peer']]) / 2**20:.1f}"
    return [{**row, **provenance} for _, rows in timed for row in rows]


def _timed(shape: Shape, rounds: int) -> list[dict[str, Any]]:
    peers, why_not = {}, {}
    for name, function in _peers(Tensors.of(shape)).items():
        try:
            function()
            peers[name] = function
        except Exception as error:  # a peer that does not run here is a row that says so
            torch.cuda.empty_cache()
            why_not[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
    with measure.busy_processes(shape.busy):
        times = measure.seconds(peers, rounds)
    floor = times[FLOOR]
    return [
        {
            "peer": name,
            "tokens": shape.tokens,
            "width": shape.width,
            "vocabulary": shape.vocabulary,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "busy": shape.busy,
            "time_over_products": f"{measure.ratio(times[name], floor):.3f}" if name in peers else "",
            "seconds": f"{statistics.median(times[name]):.4f}" if name in peers else "",
            "extra_mib": "",
            "rounds": rounds,
            "note": why_not.get(name, ""),
        }
        for name in (*peers, *why_not)
    ]


def _extra_bytes(given: Tensors, peer: Callable[[], object]) -> int:
    """Memory at the peak of a call beyond inputs and gradients."""
    given.hidden.grad = given.weight.grad = None
    workspace.cache_clear()
    return measure.peak_bytes(peer) - given.hidden.nbytes - given.weight.nbytes


def growth(rows: list[dict[str, str]], by: str) -> list[tuple[int, float, float]]:
    """Size, seconds and extra MiB of drpo as ``by``, tokens or vocabulary, grows from the first shape and all else stays."""
    fixed = [name for name in SHAPE if name != by]
    line = [row for row in rows if row["peer"] == "drpo" and all(row[name] == rows[0][name] for name in fixed)]
    return sorted((int(row[by]), float(row["seconds"]), float(row["extra_mib"])) for row in line)


def fit(line: list[tuple[int, float, float]]) -> tuple[float, float, float]:
    """Seconds at size 0 and for each more of it, by least squares, and R²: 1 where the points are on that line."""
    sizes, times = (np.array([point[i] for point in line]) for i in (0, 1))
    slope, intercept = np.polyfit(sizes, times, 1)
    unexplained = np.square(times - intercept - slope * sizes).sum() / np.square(times - times.mean()).sum()
    return float(intercept), float(slope), 1 - float(unexplained)


def plot(rows: list[dict[str, str]]) -> Figure:
    """Time over the three products at the first shape, and how ours grows with tokens and vocabulary."""
    first = [row for row in rows if _shape(row) == _shape(rows[0]) and row["time_over_products"]]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names = [row["peer"] for row in first][::-1]
    bars = left.barh(names, [float(row["time_over_products"]) for row in first][::-1], color="#8fa8c8")
    left.bar_label(bars, fmt="%.2f", padding=3)
    left.margins(x=0.25)
    left.set_title("Time over three bare products")
    for axis, by in ((middle, "tokens"), (right, "vocabulary")):
        line = growth(rows, by)
        sizes, seconds, mib = zip(*line, strict=True)
        intercept, slope, r_squared = fit(line)
        axis.plot(sizes, seconds, "o", color="#2b5c8a", label="seconds (left)")
        axis.plot([0, sizes[-1]], [intercept, intercept + slope * sizes[-1]], color="#2b5c8a", label="line fitted")
        memory = axis.twinx()
        memory.plot(sizes, mib, "s--", color="#b0662f", label="extra MiB (right)")
        axis.set_ylim(bottom=0)
        memory.set_ylim(0, 100)
        axis.set_xlabel(by)
        axis.set_title(f"drpo: {intercept:.3f} s + {1000 * slope:.4f} s for 1,000\n(R² = {r_squared:.4f})", fontsize=10)
    middle.legend(handles=[*middle.get_lines(), *memory.get_lines()], loc="upper left", fontsize=8)
    return figure


def _shape(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in SHAPE)
