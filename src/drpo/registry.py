"""Registries: dicts of names, and error messages about names that are not in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")


def unknown_name(kind: str, name: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """One line: the unknown name, the nearest known ones, or what it is here if it is one of ``elsewhere``, all known ones."""
    # The columns of a damaged file may be a million.
    choices = list(islice(known, 1000))
    nearest = get_close_matches(name, choices, n=2, cutoff=0.75) or get_close_matches(name, choices, n=1)
    hint = (
        f"; here that is {elsewhere[name]}."
        if elsewhere and name in elsewhere
        else f"; did you mean {' or '.join(map(repr, nearest))}?"
        if nearest
        else ""
    )
    listed = f" Known: {', '.join(choices)}." if choices else " There are none."
    return f"unknown {kind} {name!r}{hint or '.'}{listed}"


def make(
    kind: str,
    registry: Mapping[str, type[T]],
    name: str,
    hyperparameters: Mapping[str, Any],
    elsewhere: Mapping[str, str] | None = None,
) -> T:
    """The dataclass called ``name`` in a registry with these hyperparameters; ``elsewhere`` as in :func:`unknown_name`.

    Raises:
        ValueError: an unknown name or hyperparameter, or a value that the class refuses.
    """
    if name not in registry:
        raise ValueError(unknown_name(kind, name, registry, elsewhere))
    known = [field.name for field in fields(registry[name])]  # type: ignore[arg-type]
    for given in hyperparameters:
        if given not in known:
            raise ValueError(unknown_name(f"hyperparameter of {name}", given, known))
    return registry[name](**hyperparameters)
