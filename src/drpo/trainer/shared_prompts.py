"""A prompt that completions share through the model once: all that a layer computes token by token, it computes once.

Of a decoder, attention alone looks at other tokens. The distinct tokens of a micro-batch are one row of the model's
input; attention takes them apart into the sequences they are of, has its ordinary rows, and puts its results together
again. So it may be of any kind that Transformers hands to ``sdpa`` or ``eager``: grouped, capped, over a window.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from drpo.kernels.attention import CPU_SDPA
from drpo.trainer.batch import INPUT_WIDTH, RolloutBatch, left_aligned, loss_mask, widths
from drpo.trainer.micro_batches import longest_first

TOLERANCE, HALF_TOLERANCE = 1e-4, 0.05
"""Of :func:`why_not_shared`, over the largest hidden state: above rounding in fp32, and in fp16 and bf16."""

_PREFIX = "shared_prompts|"


@dataclass(frozen=True)
class Rows:
    """Sequences whose attention is computed together; what is beyond a row's tokens repeats its last one.

    Attributes:
        queries: [n, Q], where in the model's input each query is.
        keys: [n, K], the same of the keys, which begin with the sequence.
        before: [n], how many tokens of the row are before its first query; None where each begins with the sequence.
        masks: those that were asked for, by window and precision. All layers have one, which each keeps for its backward pass.
    """

    queries: Tensor
    keys: Tensor
    before: Tensor | None = None
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to attention's logits, [n or 1, 1, Q, K]: a query sees itself and the keys before it, at most as many together as the window has."""
        if (window, dtype) not in self.masks:
            before = self.queries.new_zeros(1) if self.before is None else self.before
            query = before.view(-1, 1, 1, 1) + torch.arange(self.queries.shape[1], device=before.device).unsqueeze(1)
            key = torch.arange(self.keys.shape[1], device=before.device)
            hidden = (key > query) if window is None else (key > query) | (key <= query - window)
            self.masks[window, dtype] = torch.zeros_like(hidden, dtype=dtype).masked_fill(
                hidden, torch.finfo(dtype).min
            )
        return self.masks[window, dtype]


@dataclass(frozen=True)
class SharedTokens:
    """The distinct tokens of N sequences: their T inputs, prompts before completions, without padding.

    Attributes:
        ids: [1, T], tokens.
        position_ids: [1, T], each as if its completion stood alone.
        rows: for attention.
        outputs: [T], where among the rows' queries, flattened one after another, a token's result is.
        predicts: [N, C], which of the T predicts each token of a completion; the last one's place where there is none.
        experts: [T, layers, K], of the sampler, where they were recorded.
    """

    ids: Tensor
    position_ids: Tensor
    rows: tuple[Rows, ...]
    outputs: Tensor
    predicts: Tensor
    experts: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """Of a model that :func:`add_shared_attention` was called for."""
        # Transformers makes no mask where it gets one of four dimensions, and hands it to the attention, which has its own.
        mask = torch.zeros(1, 1, 1, 1, device=self.ids.device)
        return {
            "input_ids": self.ids,
            "position_ids": self.position_ids,
            "attention_mask": mask,
            "shared_tokens": self,
        }


def prompt_of(batch: RolloutBatch) -> Tensor:
    """Which of the distinct prompts each sequence has, [N], counted from 0."""
    return torch.stack([batch["prompt_ids"], batch["prompt_mask"]], dim=1).unique(dim=0, return_inverse=True)[1]


def share_tokens(batch: RolloutBatch, longest: int) -> SharedTokens:
    """Lay out the sequences of a micro-batch. The last token of a completion is no input.

    Where all completions of a prompt are shorter than it, attention computes the prompt's queries once as well: once
    with a mask takes less time there than in every row without one.

    Args:
        batch: of N sequences.
        longest: tokens of the longest sequence of the update; rows are padded as in :func:`left_aligned`.
    """
    device = batch["prompt_ids"].device
    prompt, completion = widths(batch).unbind(dim=1)
    completion = (completion - 1).clamp(min=0)
    group = prompt_of(batch)
    sequences = torch.arange(len(group), device=device)
    leader = torch.full_like(group[: int(group.max()) + 1], len(group)).scatter_reduce(0, group, sequences, "amin")

    is_input = torch.arange(batch["completion_ids"].shape[1], device=device) < completion.unsqueeze(1)
    is_prompt = batch["prompt_mask"][leader].bool()
    prompt_ids = batch["prompt_ids"][leader][is_prompt]
    ids = torch.cat([prompt_ids, batch["completion_ids"][is_input]])
    experts = None
    if "prompt_experts" in batch:
        experts = torch.cat([batch["prompt_experts"][leader][is_prompt], batch["completion_experts"][is_input]])
    prompt_begins = _before(prompt[leader])[group]
    completion_begins = len(prompt_ids) + _before(completion)

    def places(rows: Tensor, tokens: Tensor) -> Tensor:
        """Where in the input the tokens of sequences are, [n, columns] of [n, 1] and their numbers in the sequence."""
        in_completion = tokens - prompt[rows]
        return torch.where(
            in_completion < 0, prompt_begins[rows] + tokens, completion_begins[rows] + in_completion.clamp(min=0)
        )

    positions = torch.empty_like(ids)
    outputs = torch.empty_like(ids)
    together: list[Rows] = []
    queries = 0
    for rows, begin, end in _attended_together(prompt, completion, group, leader):
        rows, begin, end = rows.unsqueeze(1), begin.unsqueeze(1), end.unsqueeze(1)
        width, columns = (_padded(int(most), longest) for most in ((end - begin).max(), end.max()))
        tokens = begin + torch.arange(width, device=device)
        query_places = places(rows, tokens.minimum(end - 1))
        key_places = places(rows, torch.arange(columns, device=device).minimum(end - 1))
        together.append(Rows(query_places, key_places, begin.squeeze(1) if begin.any() else None))
        # Of a prompt that several rows have, the result is that of the first.
        own = (tokens < end) & ((tokens >= prompt[rows]) | (rows == leader[group[rows]]))
        positions[query_places[own]] = tokens[own]
        outputs[query_places[own]] = queries + own.flatten().nonzero().squeeze(1)
        queries += own.numel()
    before = prompt.unsqueeze(1) - 1 + torch.arange(batch["completion_ids"].shape[1], device=device)
    predicts = places(sequences.unsqueeze(1), before.minimum((prompt + completion - 1).unsqueeze(1)))
    return SharedTokens(ids.unsqueeze(0), positions.unsqueeze(0), tuple(together), outputs, predicts, experts)


def _padded(width: int, longest: int) -> int:
    """As :func:`left_aligned` pads the inputs of a row, and for its reason."""
    return max(width, min(longest - 1, -(-width // INPUT_WIDTH) * INPUT_WIDTH))


def _before(counts: Tensor) -> Tensor:
    """The sum of the counts before each."""
    return counts.cumsum(dim=0) - counts


def _attended_together(
    prompt: Tensor, completion: Tensor, group: Tensor, leader: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sequences, and from which token to which their queries are, of lengths that are within a factor of two."""
    most = torch.zeros_like(leader).scatter_reduce(0, group, completion, "amax")
    is_apart = most < prompt[leader]
    prompts = leader[is_apart]
    completions, whole = (
        torch.arange(len(group), device=group.device)[chosen] for chosen in (is_apart[group], ~is_apart[group])
    )
    for rows, begin, end in (
        (prompts, torch.zeros_like(prompts), prompt[prompts]),
        (completions, prompt[completions], (prompt + completion)[completions]),
        (whole, torch.zeros_like(whole), (prompt + completion)[whole]),
    ):
        has_queries = end > begin
        rows, begin, end = rows[has_queries], begin[has_queries], end[has_queries]
        octave = (end.clamp(min=INPUT_WIDTH) - 1).log2().floor()
        for one in octave.unique():
            chosen = octave == one
            yield rows[chosen], begin[chosen], end[chosen]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_tokens: SharedTokens | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function of the model, of rows where ``shared_tokens`` says which.

    Args:
        module: the attention layer.
        query: [1, heads, T, width], as ``key`` and ``value``.
        attention_mask: the model's own; not used where tokens are shared.
        shared_tokens: of the model's input.
        kwargs: what the layer says of itself, ``sliding_window`` among them.
    """
    name = module.config._attn_implementation.removeprefix(_PREFIX)
    # Each of Transformers' files of a model has an eager attention of its own.
    own: Any = sys.modules[type(module).__module__]
    attention: Any = own.eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    if shared_tokens is None:
        return attention(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    kwargs.pop("position_ids", None)
    results = []
    for rows in shared_tokens.rows:
        mask = None
        is_plain = rows.before is None and (window is None or window >= rows.keys.shape[1])
        if name == "eager" or not is_plain:
            mask = rows.mask(window, query.dtype)
        taken = (_take(query, rows.queries), _take(key, rows.keys), _take(value, rows.keys))
        # [n, Q, heads, width]
        results.append(attention(module, *taken, mask, **kwargs)[0].flatten(0, 1))
    return torch.cat(results).index_select(0, shared_tokens.outputs).unsqueeze(0), None


def _take(states: Tensor, places: Tensor) -> Tensor:
    """[n, heads, columns, width] of [1, heads, T, width] and [n, columns]."""
    taken = states.transpose(1, 2).squeeze(0).flatten(1).index_select(0, places.flatten())
    return taken.view(*places.shape, *states.shape[1::2]).transpose(1, 2)


def add_shared_attention(model: Any) -> None:
    """Let the model's body take ``shared_tokens``; other calls stay as they are."""
    name = model.config._attn_implementation.removeprefix(_PREFIX)
    AttentionInterface.register(_PREFIX + name, attend)
    AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.config._attn_implementation = _PREFIX + name


def why_not_shared(model: Any) -> str | None:
    """Why prompts of this model cannot be shared; None where they can."""
    config = model.config.get_text_config()
    # A model that was in another trainer before has the prefix.
    name = str(config._attn_implementation).removeprefix(_PREFIX)
    if name not in ("sdpa", "eager", CPU_SDPA):
        return f"its attention is {name}, not sdpa or eager"
    layer_types = getattr(config, "layer_types", None)
    others = set(layer_types or ()) - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of {', '.join(sorted(others))}, in which a token gets at others by other means"
    parameters = inspect.signature(model.base_model.forward).parameters.values()
    if not any(p.name == "position_ids" for p in parameters) or not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return "its body takes no position_ids, or nothing that it would hand on to its attention"
    if model.get_output_embeddings().weight.is_meta:
        return None
    error, windows = _probe(model)
    if not error <= (TOLERANCE if model.dtype.itemsize >= 4 else HALF_TOLERANCE):
        return f"its hidden states are {error:.2g} times their largest away from those of sequences by themselves"
    window = getattr(config, "sliding_window", None)
    if window is not None and (layer_types is None or "sliding_attention" in layer_types) and window not in windows:
        return "its layers do not say over which window they attend"
    return None


@torch.no_grad()
def _probe(model: Any) -> tuple[float, set[int | None]]:
    """How far hidden states of a few tokens are from those of their sequences by themselves, over the largest of them.

    Also the windows that layers asked for.
    """
    device = model.get_output_embeddings().weight.device
    ids = torch.linspace(0, model.config.get_text_config().vocab_size - 1, 4 * 11, device=device).long().view(4, 11)
    # Completions shorter than their prompt, and longer.
    prompts, completions = (torch.tensor(n, device=device).unsqueeze(1) for n in ([6, 6, 2, 2], [3, 2, 5, 3]))
    batch: RolloutBatch = {
        "prompt_ids": ids[[0, 0, 1, 1], :6],
        "prompt_mask": (torch.arange(6, device=device) >= 6 - prompts).long(),
        "completion_ids": ids[:, 6:],
        "completion_mask": (torch.arange(5, device=device) < completions).long(),
    }
    longest = 9
    tokens, (alone, places, _) = share_tokens(batch, longest), left_aligned(batch, longest)
    own_name, training = model.config._attn_implementation, model.training
    model.eval()
    expected = model.base_model(input_ids=alone[:, :-1], use_cache=False).last_hidden_state[places[:, 1:]]
    try:
        add_shared_attention(model)
        states = model.base_model(**tokens.inputs, use_cache=False).last_hidden_state[0]
    finally:
        model.config._attn_implementation = own_name
        model.train(training)
    error = (states[tokens.predicts[loss_mask(batch).bool()]] - expected).abs().amax() / expected.abs().amax()
    return error.item(), {window for rows in tokens.rows for window, _ in rows.masks}


class DistinctTokens:
    """The layout of :func:`share_tokens`, of which completions of one prompt are better not parted.

    Args:
        batch: of the sequences.
    """

    def __init__(self, batch: RolloutBatch) -> None:
        self._prompt_of = prompt_of(batch)
        self._prompts, self._completions = widths(batch).unbind(dim=1)

    def units(self, keep: Tensor) -> list[list[int]]:
        units: dict[int, list[int]] = {}
        for row in longest_first(self._prompts + self._completions, keep):
            units.setdefault(int(self._prompt_of[row]), []).append(row)
        return list(units.values())

    def positions(self, rows: list[int]) -> int:
        prompts = dict(zip(self._prompt_of[rows].tolist(), self._prompts[rows].tolist(), strict=True))
        return sum(prompts.values()) + int(self._completions[rows].sum())
