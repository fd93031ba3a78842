"""Behaviour log-probs from Transformers generation, recorded as the tokens are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from drpo.rollout.prefill import share_prompts

NOT_IN_SUPPORT = -1
"""In place of a token id."""


class LogProbRecorder:
    """Sees the final scores of each step as the last logits processor, and the token drawn from them as a stopping criterion.

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
        self._scores: Tensor | None = None
        self._steps: list[Tensor] = []
        self._likeliest: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See a step's scores, as a logits processor does."""
        self._scores = scores
        return scores

    def _see_unfiltered(self, temperature: float, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._unfiltered = (scores.float() / temperature).logsumexp(dim=1)
        return scores

    def _see_draw(self, input_ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        assert self._scores is not None
        drawn = self._scores.gather(1, input_ids[:, -1:])
        total = self._scores.logsumexp(dim=1, keepdim=True)
        self._steps.append((drawn - total).squeeze(1).float())
        if self._top_k:
            scores, ids = self._scores.topk(min(self._top_k, self._scores.shape[1]), dim=1)
            # A token that cannot be drawn has log-prob −inf; e^−10,000 is 0 as well.
            self._likeliest.append((ids, (scores - total).float().clamp(min=-1e4)))
        if self._keep_support:
            assert self._unfiltered is not None
            size = int(self._scores.isfinite().sum(dim=1).amax())
            scores, ids = self._scores.topk(size, dim=1)
            self._supports.append(ids.masked_fill(~scores.isfinite(), NOT_IN_SUPPORT))
            self._kept.append((total.squeeze(1).float() - self._unfiltered).exp())
        self._scores = None
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def sample(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Transformers' own sampling loop with this recorder in it (a ``custom_generate`` method)."""
        # Transformers sets synced_gpus for its own decoding methods only.
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        is_synced = ranks > 1 and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))
        if not is_synced:
            share_prompts(model, input_ids, generation_config, model_kwargs)
        first = [partial(self._see_unfiltered, generation_config.temperature or 1.0)] if self._keep_support else []
        return model._sample(
            input_ids,
            LogitsProcessorList([*first, *logits_processor, self]),
            StoppingCriteriaList([*stopping_criteria, self._see_draw]),
            generation_config,
            synced_gpus=is_synced,
            **model_kwargs,
        )

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


@contextmanager
def record_log_probs(model: Any, top_k: int = 0, support: bool = False) -> Iterator[LogProbRecorder]:
    """Within this context ``model.generate`` samples through a recorder."""
    recorder = LogProbRecorder(top_k, support)
    model.generate = partial(model.generate, custom_generate=recorder.sample)
    try:
        yield recorder
    finally:
        del model.generate
