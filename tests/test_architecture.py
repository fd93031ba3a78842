"""Imports point one way, and the public names exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import drpo

SOURCE = Path(drpo.__file__).parent

# A module may import modules of earlier layers and of its own package only.
LAYERS = [
    {"names", "errors"},
    {"tokens", "tasks", "plain_yaml"},
    {"objectives", "aggregation", "advantage", "rewards", "recipe"},
    {"kernels", "micro_batches", "precision", "pretrained"},
    {"metrics"},
    {"rollout"},
    {"config", "policy_head"},
    {"scoring"},
    {"rollout_trainer", "run", "options"},
    {"trainer"},
    {"catalogue", "choose", "progress", "report"},
    {"evaluation", "data"},
    {"prepare", "inspect"},
    {"integrations"},
    {"doctor", "commands"},
    {"train"},
    {"cli"},
    {"__main__"},
]


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
    depth = next((i for i, layer in enumerate(LAYERS) if own in layer), None)
    assert depth is not None, f"{own} has no layer"
    below = set().union(*LAYERS[:depth])
    if own == "recipe":
        # What a recipe names is checked against the registries when it is read.
        below |= {"objectives", "rewards"}
    assert imports(path) - {own} <= below


@pytest.mark.parametrize("name", drpo.__all__)
def test_public_names_exist_and_are_not_modules(name: str) -> None:
    assert type(getattr(drpo, name)).__name__ != "module"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'DROP'"):
        _ = drpo.DROP
