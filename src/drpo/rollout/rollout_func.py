"""What a rollout function returns, checked before it becomes tensors: whatever is too short TRL pads."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from functools import wraps
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from drpo.rollout.recorder import NOT_IN_SUPPORT

if TYPE_CHECKING:
    from trl.trainer.grpo_trainer import RolloutFunc

_IDS = ("prompt_ids", "completion_ids")
_PER_TOKEN = {"logprobs": "log-prob", "env_mask": "0 or 1"}
"""Fields with a number for each token of a completion, and what it is."""

SAMPLING_MASK = "sampling_mask"
"""The field with the ids of the tokens that filters left at each token of a completion, as vLLM calls them."""

ROUTED_EXPERTS = "routed_experts"
"""The field with the experts of each token of prompt and completion, [L + T, layers, K] or without the last, likewise."""


def checked(rollout_func: RolloutFunc, needed: Sequence[str] = ()) -> RolloutFunc:
    """The same rollout function, held to returning token ids and a log-prob of each.

    TRL pads log-probs that are too few with 0, which is μ = 1, and would train on them.

    Args:
        rollout_func: of a trainer.
        needed: which of :data:`SAMPLING_MASK` and :data:`ROUTED_EXPERTS` it has to return too.

    Raises:
        ValueError: when called; names the field and the completion, what it has and what was expected.
    """

    @wraps(rollout_func)
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = rollout_func(prompts, trainer)
        if not isinstance(output, Mapping):
            raise ValueError(f"rollout_func returned a {type(output).__name__}; expected a dict")
        # A field that is missing, or log-probs that are None, the trainer has its own words for.
        fields = {name: output[name] for name in (*_IDS, *_PER_TOKEN) if output.get(name) is not None}
        rows = {name: _rows(name, value, len(prompts)) for name, value in fields.items()}
        for name in _IDS:
            _check_ids(name, rows.get(name, []))
        for name in _PER_TOKEN:
            _check_numbers(name, rows.get(name, []), rows.get("completion_ids", []))
        for name, check in ((SAMPLING_MASK, _check_sampling_mask), (ROUTED_EXPERTS, _check_experts)):
            if output.get(name) is not None or name in needed:
                check(_of_prompts(name, output.get(name), len(prompts)), rows)
        return output

    return rollout


def _rows(name: str, value: Any, expected: int) -> list[list[Any]]:
    return [row.tolist() if hasattr(row, "tolist") else list(row) for row in _of_prompts(name, value, expected)]


def _of_prompts(name: str, value: Any, expected: int) -> list[Any]:
    if not isinstance(value, Iterable) or len(rows := list(value)) != expected or not all(map(_has_rows, rows)):
        raise ValueError(
            f"rollout_func returned {reprlib.repr(value)} as {name}; expected a list for each of the {expected} prompts, "
            f"which are there once a completion"
        )
    return rows


def _has_rows(row: Any) -> bool:
    return isinstance(row, Iterable) and hasattr(row, "__len__") and not isinstance(row, str | Mapping)


def _check_ids(name: str, rows: list[list[Any]]) -> None:
    for number, ids in enumerate(rows):
        if not ids or not _all_are(Integral, ids) or min(ids) < 0:
            raise ValueError(f"rollout_func: {name}[{number}] is {reprlib.repr(ids)}; expected token ids, at least one")


def _check_numbers(name: str, rows: list[list[Any]], completions: list[list[Any]]) -> None:
    for number, (values, ids) in enumerate(zip(rows, completions, strict=False)):
        if len(values) != len(ids):
            raise ValueError(
                f"rollout_func: {name}[{number}] has {len(values)} values and completion_ids[{number}] {len(ids)} tokens; "
                f"expected one {_PER_TOKEN[name]} a token"
            )
        # vLLM returns None for a log-prob that is NaN, which the trainer refuses by its place.
        if not _all_are((Real, type(None)), values):
            raise ValueError(
                f"rollout_func: {name}[{number}] is {reprlib.repr(values)}; expected one {_PER_TOKEN[name]} a token, a number"
            )
        if name == "env_mask" and not set(values) <= {0, 1}:
            raise ValueError(
                f"rollout_func: env_mask[{number}] is {reprlib.repr(values)}; expected 0 or 1 for each token"
            )


def _check_sampling_mask(masks: list[Any], rows: dict[str, list[list[Any]]]) -> None:
    completions = rows.get("completion_ids", [])
    env_masks = rows.get("env_mask", [[1] * len(ids) for ids in completions])
    for number, (mask, ids, env_mask) in enumerate(zip(masks, completions, env_masks, strict=False)):
        if len(mask) != len(ids):
            raise ValueError(
                f"rollout_func: {SAMPLING_MASK}[{number}] has {len(mask)} lists and completion_ids[{number}] {len(ids)} "
                "tokens; expected for each token those that could be drawn in its place"
            )
        for place, (could_be_drawn, token, is_drawn) in enumerate(zip(mask, ids, env_mask, strict=True)):
            if is_drawn and token not in could_be_drawn:
                raise ValueError(
                    f"rollout_func: {SAMPLING_MASK}[{number}][{place}] is {reprlib.repr(could_be_drawn)}; expected the "
                    f"tokens that could be drawn, and among them {token}, which was"
                )


def _check_experts(experts: list[Any], rows: dict[str, list[list[Any]]]) -> None:
    both = zip(rows.get("prompt_ids", []), rows.get("completion_ids", []), strict=False)
    for number, (of_tokens, (prompt, completion)) in enumerate(zip(experts, both, strict=False)):
        tokens = len(prompt) + len(completion)
        if len(of_tokens) not in (tokens - 1, tokens):
            raise ValueError(
                f"rollout_func: {ROUTED_EXPERTS}[{number}] is of {len(of_tokens)} tokens; expected the {len(prompt)} of "
                f"prompt_ids[{number}] and the {len(completion)} of completion_ids[{number}], the last with or without"
            )


def pad_sampling_mask(masks: Sequence[Sequence[Sequence[int]]], columns: int) -> Tensor:
    """Ids [B, columns, K] of those in each token's list, then :data:`NOT_IN_SUPPORT`."""
    most = max((len(ids) for mask in masks for ids in mask), default=0)
    padded = torch.full((len(masks), columns, most), NOT_IN_SUPPORT)
    for row, mask in zip(padded, masks, strict=True):
        for place, ids in zip(row, mask, strict=False):
            place[: len(ids)] = torch.tensor(ids)
    return padded


def pad_experts(
    experts: Sequence[Any], prompt_lengths: Sequence[int], prompt: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Experts of ``prompt`` columns, padded on the left, and of ``columns`` of completions, padded on the right, [B, T, layers, K], int16."""
    of_rows = [torch.as_tensor(np.asarray(row)).to(torch.int16) for row in experts]
    layers = of_rows[0].shape[1:]
    prompts, completions = (torch.zeros(len(of_rows), width, *layers, dtype=torch.int16) for width in (prompt, columns))
    for row, (of_row, length) in enumerate(zip(of_rows, prompt_lengths, strict=True)):
        prompts[row, prompt - length :] = of_row[:length]
        completions[row, : len(of_row) - length] = of_row[length:]
    return prompts, completions


def _all_are(kinds: Any, values: list[Any]) -> bool:
    return all(issubclass(kind, kinds) for kind in set(map(type, values)))
