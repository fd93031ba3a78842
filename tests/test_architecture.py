"""Imports point one way, and the public names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import drpo

SOURCE = Path(drpo.__file__).parent

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
"""Its line on the import order is the order: packages with commas between them may import each other."""


def layers() -> list[set[str]]:
    """The packages of the import order, lowest first; a module may import those before it, and its own layer's."""
    (line,) = re.findall(r"^Imports point one way: (.*?)\.(?: |$)", README, re.MULTILINE)
    return [set(re.findall(r"\w+", layer)) for layer in re.split("→", line.replace("`", ""))]


def package_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """Packages of this library that a file imports, inside functions too, but not for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("drpo."):
            found.add(package_of(node.module))
        elif isinstance(node, ast.Import):
            found |= {package_of(alias.name) for alias in node.names if alias.name.startswith("drpo.")}
    return found


MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_follow_the_layers(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own == "__main__":
        own = "cli"
    depth = next((i for i, layer in enumerate(layers()) if own in layer), None)
    assert depth is not None, f"{own} has no place in the README's import order"
    assert imports(path) - {own} <= set().union(*layers()[: depth + 1])


def test_the_top_level_has_few_modules() -> None:
    assert len([path for path in SOURCE.glob("*.py") if path.name != "__init__.py"]) <= 10


@pytest.mark.parametrize("name", drpo.__all__)
def test_public_names_exist_and_are_not_modules(name: str) -> None:
    assert type(getattr(drpo, name)).__name__ != "module"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'DROP'"):
        _ = drpo.DROP
