"""Secrets, kept out of what is written and printed: by the name of their key, in URLs, and those of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "<hidden>"

# Repetitions are bounded: text of megabytes is searched too.
_NAME = (
    r"(?<![\w-])(?!(?:bos|eos|pad|unk|sep|cls|mask|stop)_token\b)[\w-]{0,40}"
    r"(?:token|password|passwd|passphrase|secret|api[_-]?key|access[_-]?key|private[_-]?key|credentials?|authorization)"
)
_IS_NAME = re.compile(_NAME, re.IGNORECASE)
_VALUE = r"[^\s\"'<{\[(,&}\])]+"

_SECRETS = (
    # https://user:password@host, perhaps with a slash in the password; pathlib leaves one slash of the two.
    re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]{1,20}:/{1,2})(?:[^\s/?#]{1,300}|[^\s/?#@:]{0,300}:(?!\d+/)[^\s@]{0,300})(?=@)", re.I),
    # ?token=..., key=value, and a key in quotes, as JSON and Python have it.
    re.compile(rf"(?P<before>{_NAME}=[\"'\[(]*){_VALUE}", re.I),
    re.compile(rf"(?P<before>(?P<quote>[\"']){_NAME}(?P=quote)\s?:\s?[\"'\[(]*){_VALUE}", re.I),
    # ... and {key: value}, as YAML has it.
    re.compile(rf"(?P<before>[{{,]\s?{_NAME}:\s?[\"'\[(]*){_VALUE}", re.I),
    re.compile(r"(?P<before>\bbearer )(?=[^\s\d_]{0,40}[\d_])[\w.~+/=-]{8,}", re.I),
)  # fmt: skip

SHORTEST = 8
"""Characters of a secret of the environment: shorter values are found in any text."""


def redact(text: str) -> str:
    """The text with every secret in it hidden."""
    for name, value in os.environ.items():
        if len(value.strip()) >= SHORTEST and _IS_NAME.fullmatch(name):
            text = text.replace(value.strip(), HIDDEN)
    for secret in _SECRETS:
        text = secret.sub(rf"\g<before>{HIDDEN}", text)
    return text


def find_secret(document: Any) -> str | None:
    """The dotted key of the first secret in mappings and lists; None if there is none."""
    return next(_secret_keys(document), None)


def _secret_keys(value: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _secret_keys(inner, (*path, str(key)))
    elif value is not None and (any(map(_IS_NAME.fullmatch, path)) or redact(str(value)) != str(value)):
        yield ".".join(path)
