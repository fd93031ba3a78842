"""What is recorded of each token that is drawn: its log-prob, and if asked for the likeliest tokens or those that could be drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

NOT_IN_SUPPORT = -1
"""In place of a token id."""


class LogProbRecorder:
    """Sees each step's scores with the tokens drawn from them.

    Only one step's scores [B, V] are held at a time, and one fp32 log-prob a token is kept: of
    the distribution that was sampled from, after temperature and every filter.

    Args:
        top_k: how many of the likeliest tokens to keep at each position, with their log-probs.
        support: keep the tokens that could be drawn at each position too, and the probability
            that a filter (top-p, top-k, min-p) left to them.
    """

    def __init__(self, top_k: int = 0, support: bool = False) -> None:
        self._top_k = top_k
        self._keep_support = support
        self._supports: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._unfiltered: Tensor | None = None
        self._steps: list[Tensor] = []
        self._likeliest: list[tuple[Tensor, Tensor]] = []
        self._prompt_experts: list[Tensor] = []
        self._experts: list[Tensor] = []

    def see_logits(self, logits: Tensor, temperature: float) -> None:
        """See a step's logits [R, V] before they are filtered."""
        if self._keep_support:
            self._unfiltered = (logits / temperature).logsumexp(dim=1)

    def see_tokens(self, tokens: Tensor, scores: Tensor, log_total: Tensor, rows: Tensor, batch: int) -> None:
        """See what a step draws.

        Args:
            tokens: [R], drawn.
            scores: [R, V] that they were drawn from.
            log_total: [R], the log of the sum of exp(scores).
            rows: [R], which rows of the batch they are.
            batch: how many rows it has.
        """
        drawn = scores.gather(1, tokens[:, None]).squeeze(1)
        self._steps.append(of_all_rows((drawn - log_total).float(), rows, batch))
        if self._top_k:
            likeliest, ids = scores.topk(min(self._top_k, scores.shape[1]), dim=1)
            # A token that cannot be drawn has log-prob −inf; e^−10,000 is 0 as well.
            log_probs = (likeliest - log_total[:, None]).float().clamp(min=-1e4)
            self._likeliest.append((of_all_rows(ids, rows, batch), of_all_rows(log_probs, rows, batch)))
        if self._keep_support:
            assert self._unfiltered is not None
            size = int(scores.isfinite().sum(dim=1).amax())
            likeliest, ids = scores.topk(size, dim=1)
            ids = ids.masked_fill(~likeliest.isfinite(), NOT_IN_SUPPORT)
            self._supports.append(of_all_rows(ids, rows, batch, missing=NOT_IN_SUPPORT))
            self._kept.append(of_all_rows((log_total - self._unfiltered).exp().float(), rows, batch, missing=1))

    def see_prompt_experts(self, experts: Tensor) -> None:
        """See the experts that further columns of the prompts went to, [B, T, layers, K]."""
        self._prompt_experts.append(experts)

    def see_experts(self, experts: Tensor, rows: Tensor, batch: int) -> None:
        """See the experts that the last tokens went to, [R, 1, layers, K]; arguments as of :meth:`see_tokens`."""
        self._experts.append(of_all_rows(experts, rows, batch))

    def log_probs(self, lengths: Sequence[int]) -> list[list[float]] | None:
        """The log-probs of the first ``lengths[i]`` tokens drawn in each row i; None if none was seen drawn."""
        if not self._steps:
            return None
        steps = torch.stack(self._steps, dim=1).cpu()
        return [row[:length].tolist() for row, length in zip(steps, lengths, strict=True)]

    def likeliest(self, length: int) -> tuple[Tensor, Tensor] | None:
        """Ids and log-probs of the likeliest tokens at the first ``length`` positions, [B, length, K] each, zeros past the last; None unless asked for."""
        if not self._likeliest:
            return None
        ids, log_probs = (torch.stack(steps, dim=1)[:, :length] for steps in zip(*self._likeliest, strict=True))
        missing = (0, 0, 0, length - ids.shape[1])
        return pad(ids, missing), pad(log_probs, missing)

    def support(self, length: int) -> tuple[Tensor, Tensor] | None:
        """Of the first ``length`` positions: ids of the tokens that could be drawn, [B, length, K], :data:`NOT_IN_SUPPORT` in places left over; and the probability that they had before filtering, [B, length]. None unless asked for."""
        if not self._supports:
            return None
        size = max(ids.shape[1] for ids in self._supports)
        ids = torch.stack([pad(ids, (0, size - ids.shape[1]), value=NOT_IN_SUPPORT) for ids in self._supports], dim=1)
        kept = torch.stack(self._kept, dim=1)
        missing = max(0, length - ids.shape[1])
        return (
            pad(ids[:, :length], (0, 0, 0, missing), value=NOT_IN_SUPPORT),
            pad(kept[:, :length], (0, missing), value=1.0),
        )

    def experts(self, prompt: int, length: int) -> tuple[Tensor, Tensor] | None:
        """The experts of the last ``prompt`` tokens of prompts and of the first ``length`` of completions, [B, T, layers, K] each, zeros past the last that were chosen; None if none were seen."""
        if not self._prompt_experts:
            return None
        prompts = torch.cat(self._prompt_experts, dim=1)[:, -prompt:]
        completions = torch.cat([*self._experts, prompts[:, :0]], dim=1)[:, :length]
        return prompts, pad(completions, (0, 0, 0, 0, 0, length - completions.shape[1]))


def of_all_rows(values: Tensor, rows: Tensor, batch: int, missing: float = 0) -> Tensor:
    """The values [R, ...] of ``rows`` [R] among all rows of the batch, [batch, ...]; ``missing`` in the others."""
    if len(rows) == batch:
        return values
    return values.new_full((batch, *values.shape[1:]), missing).index_copy_(0, rows, values)
