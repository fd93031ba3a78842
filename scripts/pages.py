"""The pages of the site, for MkDocs: this repository's own, what they link to, and a reference of each package.

A page has its path in the repository, so that links between pages are those that GitHub follows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
ROOMS = sorted(path.stem for path in (ROOT / "src" / "drpo").iterdir() if re.match(r"[a-z]+(\.py)?$", path.name))

_LANGUAGES = {".py": "python", ".yaml": "yaml"}
"""Of files that are shown; others, such as pictures and tables, are as they are."""

_LINK = re.compile(r"(?<=\]\()[^)#:]+(?=[)#])")
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?\.?([\w.]+)`")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference after the pages that are written."""
    assert config.nav is not None
    config.nav.append({"Reference": [{room: f"reference/{room}.md"} for room in ROOMS]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the theme, the written pages with all that they link to, and the reference."""
    site = Files([file for file in files if file.src_dir != config.docs_dir])
    for room in ROOMS:
        site.append(File.generated(config, f"reference/{room}.md", content=f"::: drpo.{room}\n"))
    waiting, added = [*PAGES], set()
    while waiting:
        path = waiting.pop()
        if path in added:
            continue
        added.add(path)
        if (text := _as_markdown(path)) is None:
            site.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
            continue
        waiting += [target for link in _LINK.findall(text) if (ROOT / (target := _target(path, link))).exists()]
        site.append(File.generated(config, _page(path), content=_LINK.sub(lambda link: _linked(path, link[0]), text)))  # noqa: B023
    return site


class Roles(griffe.Extension):
    """Makes links of the names in docstrings that have a role, such as ``:func:`token_scale```."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        for thing in _within(pkg):
            if thing.docstring is not None:
                thing.docstring.value = _ROLE.sub(lambda role: _reference(thing, role[1]), thing.docstring.value)  # noqa: B023


def _within(thing: griffe.Object) -> Iterator[griffe.Object]:
    yield thing
    for member in thing.members.values():
        if isinstance(member, griffe.Object):
            yield from _within(member)


def _reference(thing: griffe.Object, name: str) -> str:
    """A link from one thing's docstring to another thing, which may be named from where the first stands."""
    try:
        path = name if name.startswith("drpo.") else thing.resolve(name)
        target = thing.modules_collection[path]
    except (griffe.NameResolutionError, KeyError):
        target = None
    # The reference leaves out what has no docstring.
    is_shown = target is None or target.has_docstring
    return f"[`{name}`][{target.canonical_path if target else name}]" if is_shown else f"`{name}`"


def _as_markdown(path: str) -> str | None:
    """A page that shows a file, or what is in a folder; None of a file that is no text to read."""
    source = ROOT / path
    if source.is_dir():
        names = sorted(entry.name for entry in source.iterdir() if not entry.name.startswith(("_", ".")))
        return f"# {path}\n\n" + "".join(f"- [{name}]({source.name}/{name})\n" for name in names)
    if source.suffix == ".md":
        return source.read_text(encoding="utf-8")
    if source.suffix in _LANGUAGES:
        return f"# {path}\n\n````{_LANGUAGES[source.suffix]}\n{source.read_text(encoding='utf-8')}````\n"
    return None


def _page(path: str) -> str:
    """Where a file is shown."""
    return path if path.endswith(".md") or _as_markdown(path) is None else f"{path}.md"


def _target(path: str, link: str) -> str:
    """The file that a link in another one leads to."""
    return os.path.normpath(Path(path).parent / link)


def _linked(path: str, link: str) -> str:
    """The link, to the page that shows the file."""
    target = _target(path, link)
    return link + _page(target).removeprefix(target) if (ROOT / target).exists() else link
