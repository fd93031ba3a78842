"""Transformers generation as one loop of this library: what is drawn, what is recorded of it, and which rows still decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import logits_process, stopping_criteria
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from drpo.rollout.recorder import LogProbRecorder, of_all_rows
from drpo.rollout.routing import ChosenExperts, recording_experts

BLOCK = 256
"""Tokens of the vocabulary whose probability is summed before one of them is looked for."""

LEAVE_AT = 1 / 8
"""Ended rows are taken out once they are this share of the batch; each time the cache of the others is copied."""

_OF_TOKENS = ("attention_mask", "position_ids")
_CACHE = ("past_key_values", "cache")
"""The cache of a generation in Transformers, to 5.23 and after."""
_OTHERS = (*_CACHE, "use_cache", "logits_to_keep")
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache whose rows can be selected by index."""

_ROW_BY_ROW = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    stopping_criteria.MaxLengthCriteria,
    stopping_criteria.MaxTimeCriteria,
    stopping_criteria.StopStringCriteria,
    stopping_criteria.EosTokenCriteria,
)
"""What does the same to a row whichever rows are beside it."""


def draw_tokens(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens at which the distribution functions of softmax(scores) pass ``uniforms``, and the log of each row's sum of exp(scores).

    A block of the vocabulary is looked for first and a token in it then, with sums cumulated in float64: a token
    has its probability to 1e-6 of it however small that is, which one cumulated sum in fp32 would round to
    multiples of 6e-8. ``torch.multinomial`` draws a random number a token of the vocabulary for each row instead
    of one (``python -m benchmarks generation`` measures what that costs).

    Args:
        scores: [B, V], floating, −inf for what cannot be drawn. A row that has no probabilities (NaN) yields any
            token and NaN.
        uniforms: [B], in [0, 1), float64 or, where a device has none, float32, in which sums are cumulated too.

    Returns:
        Token ids [B], and the logarithms [B] in the dtype of ``uniforms``.
    """
    largest = scores.amax(dim=1, keepdim=True)
    mass = (scores - largest).exp_()
    blocks = pad(mass, (0, -mass.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    of_blocks = blocks.sum(dim=2).to(uniforms.dtype)
    block, rest = _passed(of_blocks, uniforms)
    of_tokens = blocks.take_along_dim(block[:, None, None], dim=1).squeeze(1).to(uniforms.dtype)
    token, _ = _passed(of_tokens, rest)
    token = (block * BLOCK + token).clamp(max=scores.shape[1] - 1)
    return token, of_blocks.sum(dim=1).log() + largest.squeeze(1).to(uniforms.dtype)


def _passed(mass: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulated share of ``mass`` [B, N] passes ``uniforms`` [B], and how far into that place, in [0, 1)."""
    cumulated = mass.cumsum(dim=1)
    total = cumulated[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(cumulated, target, right=True).clamp(max=mass.shape[1] - 1)
    here = mass.take_along_dim(place, dim=1)
    before = cumulated.take_along_dim(place, dim=1) - here
    return place.squeeze(1), ((target - before) / here).clamp(0, 1 - 2**-53).squeeze(1)


class Decoding:
    """A ``custom_generate`` method for Transformers' ``generate``: samples completions and tells a recorder of each token.

    Prompts that are equal go through the model once, but for their last token. Rows that have ended leave
    the batch and the cache once they are an eighth of it. Neither is done where the model keeps more than keys and
    values, takes more than tokens, or a processor of scores may look at other rows.

    Args:
        recorder: sees every token that is drawn.
        seeds: of each row's random numbers; None takes PyTorch's own generator. Which token a row gets depends on
            its distribution and its own numbers alone.
        chosen_experts: of the model's routers, for the recorder.
    """

    def __init__(
        self,
        recorder: LogProbRecorder,
        seeds: Sequence[int] | None = None,
        chosen_experts: ChosenExperts | None = None,
    ) -> None:
        self._recorder, self._seeds, self._chosen_experts = recorder, seeds, chosen_experts

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """Prompts and completions, [B, L + T], padded on the right after the end of each."""
        # Transformers sets synced_gpus for its own decoding methods only.
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        is_synced = ranks > 1 and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))
        is_selectable = not is_synced and _keeps_rows_apart(model_kwargs)
        may_leave = is_selectable and all(type(one) in _ROW_BY_ROW for one in (*logits_processor, *stopping_criteria))
        group = None
        if is_selectable and generation_config.prefill_chunk_size is None:
            group = share_prompts(model, input_ids, generation_config, model_kwargs)
        if group is not None and self._chosen_experts is not None:
            self._recorder.see_prompt_experts(self._chosen_experts.take(int(group.max()) + 1)[group])
        uniforms = self._uniforms(input_ids, generation_config.max_length - input_ids.shape[1])
        padding = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
        batch, device = len(input_ids), input_ids.device
        rows = torch.arange(batch, device=device)
        ended = torch.zeros_like(rows, dtype=torch.bool)
        sequences, columns = input_ids, []
        forward = (
            model.get_compiled_call(generation_config.compile_config)
            if model._valid_auto_compile_criteria(model_kwargs, generation_config)
            else model
        )
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        if self._chosen_experts is not None:
            self._recorder.see_prompt_experts(self._chosen_experts.take(batch))
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            # Other ranks may still decode, which they do together where the model is spread over them.
            if not ended.all():
                logits = outputs.logits[:, -1].to(dtype=torch.float32, device=device, copy=True)
                self._recorder.see_logits(logits, generation_config.temperature or 1.0)
                scores = logits_processor(sequences, logits)
                tokens, log_total = draw_tokens(scores, uniforms[rows, len(columns)])
                if not generation_config.do_sample:
                    tokens = scores.argmax(dim=1)
                self._recorder.see_tokens(tokens, scores, log_total, rows, batch)
                tokens = tokens.masked_fill(ended, padding)
                columns.append(of_all_rows(tokens, rows, batch, missing=padding))
                sequences = torch.cat([sequences, tokens[:, None]], dim=1)
                ended = ended | stopping_criteria(sequences, None)
            if not model._has_unfinished_sequences(bool(ended.all()), is_synced, device=device):
                return torch.cat([input_ids, torch.stack(columns, dim=1)], dim=1)
            if may_leave and ended.sum() >= LEAVE_AT * len(rows):
                staying = (~ended).nonzero().squeeze(1)
                rows, sequences, ended = rows[staying], sequences[staying], ended[staying]
                _cache_of(model_kwargs).batch_select_indices(staying)
                model_kwargs |= {name: model_kwargs[name][staying] for name in _OF_TOKENS if name in model_kwargs}
            next_length = 1 if model_kwargs["use_cache"] else None
            inputs = model.prepare_inputs_for_generation(sequences, next_sequence_length=next_length, **model_kwargs)
            # What holds the logits of the last step is let go of before the next are made.
            del outputs
            with model._optimize_model_for_decode():
                outputs = forward(**inputs, return_dict=True)
            if self._chosen_experts is not None:
                self._recorder.see_experts(self._chosen_experts.take(len(rows))[:, -1:], rows, batch)

    def _uniforms(self, input_ids: Tensor, steps: int) -> Tensor:
        """A random number for each row and position, [B, steps]."""
        dtype = torch.float32 if input_ids.device.type == "mps" else torch.float64
        like = {"dtype": dtype, "device": input_ids.device}
        if self._seeds is None:
            return torch.rand(len(input_ids), steps, **like)
        generators = [torch.Generator(input_ids.device).manual_seed(seed) for seed in self._seeds]
        return torch.stack([torch.rand(steps, generator=generator, **like) for generator in generators])


def share_prompts(
    model: Any, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> Tensor | None:
    """Fill the cache of a generation with all tokens of its prompts but the last, those of equal prompts once.

    Args:
        model: the one that generates.
        input_ids: [B, L], the prompts, padded on the left.
        generation_config: of the generation.
        model_kwargs: of its forward passes; the cache in it is filled.

    Returns:
        Which of the distinct prompts each row has, [B]; None where all are distinct, and nothing is done.
    """
    last = input_ids.shape[1] - 1
    if last < 1:
        return None
    named = {"input_ids": input_ids, **{name: model_kwargs[name] for name in _OF_TOKENS if name in model_kwargs}}
    prompts, group = torch.stack(list(named.values()), dim=1).unique(dim=0, return_inverse=True)
    if len(prompts) == len(input_ids):
        return None
    prefix = dict(zip(named, prompts[:, :, :last].unbind(dim=1), strict=True))
    model._prefill(prefix.pop("input_ids"), generation_config, {**model_kwargs, **prefix})
    _cache_of(model_kwargs).batch_select_indices(group)
    return group


def _cache_of(model_kwargs: dict[str, Any]) -> Any:
    return next((model_kwargs[name] for name in _CACHE if name in model_kwargs), None)


def _keeps_rows_apart(model_kwargs: dict[str, Any]) -> bool:
    """Whether all that a generation keeps of its rows are tokens and keys and values, none of them yet."""
    cache = _cache_of(model_kwargs)
    return (
        isinstance(cache, DynamicCache)
        and not cache.get_seq_length()
        and all(type(layer) in _LAYERS for layer in cache.layers)
        and model_kwargs.keys() <= {*_OF_TOKENS, *_OTHERS}
    )


@contextmanager
def record_log_probs(
    model: Any, top_k: int = 0, support: bool = False, experts: bool = False, seeds: Sequence[int] | None = None
) -> Iterator[LogProbRecorder]:
    """Within this context ``model.generate`` samples by :class:`Decoding` and records.

    Args:
        model: of Transformers.
        top_k: as in :class:`LogProbRecorder`.
        support: likewise.
        experts: record those that the model's routers choose.
        seeds: as in :class:`Decoding`.
    """
    recorder = LogProbRecorder(top_k, support)
    with recording_experts(model) if experts else nullcontext() as chosen_experts:
        model.generate = partial(model.generate, custom_generate=Decoding(recorder, seeds, chosen_experts))
        try:
            yield recorder
        finally:
            del model.generate
