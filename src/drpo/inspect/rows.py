"""A row of a rollout file, checked: the numbers of the tokens that count, and what belongs to the sequence."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LARGEST = 1e18
"""No log-prob, advantage or reward is larger in size: products of them with ratios and weights are finite in fp32."""

_LOG_PROBS = f"a log-probability, at most 0 and at least {-LARGEST:g}, at every token that counts"
_NUMBERS = f"a number of at most {LARGEST:g} in size"

_NUMBER_OR_NULL = (float, int, type(None))

# A log-prob computed in low precision can exceed 0 by a rounding error, not by more.
_ROUNDING = 1e-2


@dataclass(frozen=True)
class Row:
    """A sequence: the values of its tokens that count, fp32, and its own. A field whose column the file has not is None.

    Args:
        reward: NaN where there is none.
        step: 0 if the file has none.
        text: of each token, or what stands for its id.
    """

    logp: np.ndarray
    behavior_logp: np.ndarray
    old_logp: np.ndarray | None
    advantage: np.ndarray | None
    reward: float | None
    group: str | None
    step: int
    age: int | None
    text: list[str] | None


def checked_row(record: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    """What a record says, those of its tokens that do not count left out.

    Args:
        record: a row of the file.
        names: its column of each field.

    Raises:
        ValueError: a column that is not there, or a value that cannot be used.
    """
    missing = next((name for name in names.values() if name not in record), None)
    if missing is not None:
        raise ValueError(f"has no {missing}, which the first row has; expected the same columns in every row")
    columns = {field: (name, record[name]) for field, name in names.items()}
    counted = _counted(columns, len(_listed(*columns["logp"])))

    def read(field: str, check: Callable[..., Any], *context: Any) -> Any:
        return check(*columns[field], *context) if field in columns else None

    return Row(
        logp=read("logp", _log_probs, counted),
        behavior_logp=read("behavior_logp", _log_probs, counted),
        old_logp=read("old_logp", _log_probs, counted),
        advantage=read("advantage", _advantages, counted),
        reward=read("reward", _reward, counted),
        group=read("group", _group),
        step=read("step", _whole) or 0,
        age=read("age", _whole),
        text=read("text" if "text" in columns else "tokens", _texts, counted),
    )


def _counted(columns: Mapping[str, tuple[str, Any]], size: int) -> np.ndarray:
    """Which of the tokens count, [size], bool."""
    if "mask" in columns:
        name, mask = columns["mask"]
        values = _numbers(name, mask)
        if len(values) != size:
            raise ValueError(f"{name} has {len(values):,} values; expected {size:,} of 0 and 1, one for each log-prob")
        _refuse(name, mask, ~np.isin(values, (0, 1)), "0 or 1")
        return values.astype(bool)
    length = size
    if "length" in columns:
        name, value = columns["length"]
        length = _whole(name, value)
        if length > size:
            raise ValueError(f"{name} is {length:,}; expected at most {size:,}, as many as there are log-probs")
    elif "tokens" in columns:
        name, tokens = columns["tokens"]
        if not isinstance(tokens, list):
            raise ValueError(f"{name} is {_shown(tokens)}; expected a list of token ids")
        length = len(tokens)
        if length > size:
            raise ValueError(f"{name} has {length:,} tokens; expected at most {size:,}, one for each log-prob")
    return np.arange(size) < length


def _log_probs(name: str, value: Any, counted: np.ndarray) -> np.ndarray:
    values = _numbers(name, value)
    if len(values) != len(counted):
        raise ValueError(
            f"{name} has {len(values):,} log-probs; expected {len(counted):,}, as many as the other policy's"
        )
    _refuse(name, value, counted & ~((values <= _ROUNDING) & (values >= -LARGEST)), _LOG_PROBS)
    return values[counted].astype(np.float32)


def _advantages(name: str, value: Any, counted: np.ndarray) -> np.ndarray:
    if isinstance(value, list):
        values = _of_tokens(name, value, counted)
        return values[counted].astype(np.float32)
    # A sequence of which nothing counts is left out, whatever it has.
    number = _number(name, value, f"{_NUMBERS}, or a list with one for each log-prob") if counted.any() else 0.0
    return np.full(int(counted.sum()), number, dtype=np.float32)


def _reward(name: str, value: Any, counted: np.ndarray) -> float:
    """Of a sequence, NaN where it could not be scored; of tokens, their sum, as their host has it: over the others too."""
    if isinstance(value, list):
        return float(np.nansum(_of_tokens(name, value, counted)))
    return math.nan if value is None else _number(name, value, f"{_NUMBERS}, or null where nothing could be scored")


def _of_tokens(name: str, value: list[Any], counted: np.ndarray) -> np.ndarray:
    """A number for each token, NaN for what cannot be used where it does not count."""
    values = _numbers(name, value)
    if len(values) != len(counted):
        raise ValueError(f"{name} has {len(values):,} values; expected one, or {len(counted):,}, one for each log-prob")
    usable = np.abs(values) <= LARGEST
    _refuse(name, value, counted & ~usable, f"{_NUMBERS} at every token that counts")
    return np.where(usable, values, math.nan)


def _texts(name: str, value: Any, counted: np.ndarray) -> list[str]:
    """Of the tokens that count; a token id stands between brackets."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {_shown(value)}; expected a list with one text or token id for each log-prob")
    # Hosts pad log-probs further than tokens.
    if len(value) > len(counted) or counted[len(value) :].any():
        raise ValueError(f"{name} has {len(value):,} tokens; expected {len(counted):,}, one for each log-prob")
    tokens = [token for token, counts in zip(value, counted[: len(value)].tolist(), strict=True) if counts]
    return [token if isinstance(token, str) else f"⟨{token}⟩" for token in tokens]


def _group(name: str, value: Any) -> str:
    # What every row lacks would make one group of all of them.
    if value is None:
        raise ValueError(f"{name} is null; expected what the completions of one prompt have in common")
    return repr(value)


def _whole(name: str, value: Any) -> int:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # In this order: a number that is too large has no float.
    if not is_number or not 0 <= value < 2**53 or not float(value).is_integer():
        raise ValueError(f"{name} is {_shown(value)}; expected a whole number, at least 0")
    return int(value)


def _number(name: str, value: Any, expected: str) -> float:
    # A whole number may have more digits than a float can say.
    if not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} is {_shown(value)}; expected {expected}")
    return float(value)


def _listed(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {_shown(value)}; expected a list of numbers, one a token")
    return value


def _numbers(name: str, value: Any) -> np.ndarray:
    """fp64, NaN where a value is null."""
    values = _listed(name, value)
    # numpy would read numbers from text.
    if not all(issubclass(of, _NUMBER_OR_NULL) for of in set(map(type, values))):
        wrong = next(i for i, v in enumerate(values) if not isinstance(v, _NUMBER_OR_NULL))
        raise ValueError(f"{name} is {_shown(values[wrong])} at token {wrong:,}; expected a number")
    try:
        return np.asarray(values, dtype=np.float64)
    except OverflowError:
        # A whole number with more digits than fp64 can say.
        wrong = next(i for i, v in enumerate(values) if isinstance(v, int) and abs(v) > LARGEST)
        raise ValueError(f"{name} is {_shown(values[wrong])} at token {wrong:,}; expected {_NUMBERS}") from None


def _refuse(name: str, value: list[Any], wrong: np.ndarray, expected: str) -> None:
    if wrong.any():
        token = int(wrong.argmax())
        raise ValueError(f"{name} is {_shown(value[token])} at token {token:,}; expected {expected}")


def _shown(value: Any) -> str:
    """As a file has it, and no longer than a line."""
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else reprlib.repr(value)
