"""YAML 1.2 with plain values alone: the YAML of recipes, read as it was meant."""

from __future__ import annotations

import re
from typing import Any

import yaml

from drpo.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: no octal, no yes/no; no duplicate keys, no aliases, no tags of other languages."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(
                None, None, "aliases are not supported; expected the value itself", mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either the loader above or a YAML 1.1 reader would take for something else."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(?:~|null|)", ["~", "n", ""]),
    ("bool", r"(?:true|false)", ["t", "f"]),
    ("int", r"-?(?:0|[1-9][0-9]*)", list("-0123456789")),
    ("float", r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|nan)", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_KEY = re.compile(r"\s*(?:- )?(?P<name>[^\s:#{\[]{1,60})\s*:")
"""At the beginning of a line."""


def parse(text: str, where: str) -> Any:
    """What the text says.

    Args:
        where: what it is called in an error.

    Raises:
        UserError: naming the line and what is wrong there.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply; expected mappings of a few levels") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        before = text[: mark.index if mark else getattr(error, "position", 0)]
        line = len(_LINE_BREAK.findall(before))
        key = _KEY.match(_LINE_BREAK.split(text)[line])
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "is not YAML"
        if key and key["name"] not in problem:
            problem += f" (in {key['name']})"
        # The error itself is not told: it quotes the text around, which may hold a secret without the key that says so.
        raise UserError(f"{where}, line {line + 1}: {problem}", fix=f"valid YAML in line {line + 1}") from None


def dump(document: Any) -> str:
    """Text that :func:`parse` reads back."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False)
