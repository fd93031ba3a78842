"""The prompt of a group through the model once, however many completions are sampled from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_OF_TOKENS = ("attention_mask", "position_ids")
_OTHERS = ("past_key_values", "use_cache", "logits_to_keep")
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Whose keys and values of one row are another's to take, which is more than a state of a recurrence can say."""


@torch.no_grad()
def share_prompts(
    model: Any, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    """Fill the cache of a generation with all tokens of its prompts but the last, those of equal prompts once.

    The last goes through the model in Transformers' own loop. Nothing is done where no prompts are
    equal, the model takes more than tokens, or its cache is of another kind.

    Args:
        model: the one that generates.
        input_ids: [B, L], the prompts, padded on the left.
        generation_config: of the generation.
        model_kwargs: of its forward passes; the cache in it is filled.
    """
    cache = model_kwargs.get("past_key_values")
    last = input_ids.shape[1] - 1
    if (
        last < 1
        or not isinstance(cache, DynamicCache)
        or cache.get_seq_length()
        or not all(type(layer) in _LAYERS for layer in cache.layers)
        or not model_kwargs.keys() <= {*_OF_TOKENS, *_OTHERS}
        or generation_config.prefill_chunk_size is not None
    ):
        return
    named = {"input_ids": input_ids, **{name: model_kwargs[name] for name in _OF_TOKENS if name in model_kwargs}}
    prompts, group = torch.stack(list(named.values()), dim=1).unique(dim=0, return_inverse=True)
    if len(prompts) == len(input_ids):
        return
    prefix = dict(zip(named, prompts[:, :, :last].unbind(dim=1), strict=True))
    model._prefill(prefix.pop("input_ids"), generation_config, {**model_kwargs, **prefix})
    cache.batch_select_indices(group)
