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
            raise yaml.constructor.ConstructorError(None, None, "aliases are not supported", mark)
        return super().compose_node(parent, index)

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
    ("float", r"-?(?:0|[1-9][0-9]*)\.[0-9]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|nan)", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def parse(text: str, where: str) -> Any:
    """What the text says.

    Args:
        where: what it is called in an error.

    Raises:
        UserError: naming the line and what is wrong there.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n", 1)[0]
        raise UserError(f"{where}{line}: {problem}", fix=_fix(error)) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: is not valid YAML ({type(error).__name__}: {str(error)[:100]})") from error


# Of what the parser says: the usual mistakes, and how each is mended.
_FIXES = (
    (r"duplicate key (.+)", "{0} once, not again in line {line}"),
    (r"found character '\\t'", "spaces instead of the tab in line {line}"),
    (r"found character '[@%`]'", "quotes around the value in line {line}"),
    (r"mapping values", "line {line} indented as the fields beside it, or quotes around a value with a colon in it"),
    (r"aliases are not supported", "the value itself in line {line}, or quotes around text that begins with *"),
    (r"constructor for the tag|undefined tag", "a plain value without ! in line {line}"),
    (r"key .+ is not text", "quotes around the key in line {line}"),
    (r"unknown escape character", "single quotes around the text in line {line}"),
    (r"parsing a flow", "a closing bracket for each opening one up to line {line}, and commas between values"),
    (r"scanning a quoted", "a closing quote for each opening one up to line {line}"),
    (r"special characters", "text without control characters"),
    (r"", "valid YAML in line {line}"),
)


def _fix(error: yaml.YAMLError) -> str:
    """What to write in place of a mistake."""
    mark, said = getattr(error, "problem_mark", None), str(error)
    line = mark.line + 1 if mark else 1
    return next(
        fix.format(*found.groups(), line=line) for pattern, fix in _FIXES if (found := re.search(pattern, said))
    )


def dump(document: Any) -> str:
    """Text that :func:`parse` reads back."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False)
