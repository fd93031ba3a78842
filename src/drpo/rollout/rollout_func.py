"""What a rollout function returns, checked before it becomes tensors: whatever is too short TRL pads."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import wraps
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl.trainer.grpo_trainer import RolloutFunc

_IDS = ("prompt_ids", "completion_ids")
_PER_TOKEN = {"logprobs": "log-prob", "env_mask": "0 or 1"}
"""Fields with a number for each token of a completion, and what it is."""

SAMPLING_MASK = "sampling_mask"
"""The field with the ids of the tokens that filters left at each token of a completion, as vLLM calls them."""


def checked(rollout_func: RolloutFunc, needs_sampling_mask: bool = False) -> RolloutFunc:
    """The same rollout function, held to returning token ids and a log-prob of each.

    TRL pads log-probs that are too few with 0, which is μ = 1, and would train on them.

    Args:
        rollout_func: of a trainer.
        needs_sampling_mask: hold it to returning :data:`SAMPLING_MASK` too.

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
        if needs_sampling_mask:
            masks = _rows(SAMPLING_MASK, output.get(SAMPLING_MASK), len(prompts))
            for number, (mask, ids) in enumerate(zip(masks, rows.get("completion_ids", []), strict=False)):
                _check_sampling_mask(number, mask, ids, rows.get("env_mask", {number: [1] * len(ids)})[number])
        return output

    return rollout


def _rows(name: str, value: Any, expected: int) -> list[list[Any]]:
    try:
        rows = [row.tolist() if hasattr(row, "tolist") else list(row) for row in value]
    except TypeError:
        rows = []
    if len(rows) != expected:
        raise ValueError(
            f"rollout_func returned {reprlib.repr(value)} as {name}; expected a list for each of the {expected} prompts, "
            f"which are there once a completion"
        )
    return rows


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


def _check_sampling_mask(number: int, mask: list[Any], ids: list[int], env_mask: list[int]) -> None:
    if len(mask) != len(ids):
        raise ValueError(
            f"rollout_func: {SAMPLING_MASK}[{number}] has {len(mask)} lists and completion_ids[{number}] {len(ids)} tokens; "
            "expected for each token those that could be drawn in its place"
        )
    for place, (could_be_drawn, token, is_drawn) in enumerate(zip(mask, ids, env_mask, strict=True)):
        if is_drawn and token not in could_be_drawn:
            raise ValueError(
                f"rollout_func: {SAMPLING_MASK}[{number}][{place}] is {reprlib.repr(could_be_drawn)}; expected the tokens "
                f"that could be drawn, and among them {token}, which was"
            )


def _all_are(kinds: Any, values: list[Any]) -> bool:
    return all(issubclass(kind, kinds) for kind in set(map(type, values)))
