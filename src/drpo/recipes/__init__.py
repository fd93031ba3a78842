"""The recipes that come with the package: those of ``drpo train``, and in ``verl`` configurations of verl's own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from drpo.errors import UserError
from drpo.registry import unknown_name

Engine = Literal["trl", "verl"]

FOLDER = Path(__file__).parent


def recipe_paths(engine: Engine = "trl") -> dict[str, Path]:
    """The recipes of an engine by name."""
    if engine == "trl":
        return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    # What others are composed of has no list of defaults.
    paths = sorted(FOLDER.glob("verl/*.yaml"))
    return {path.stem: path for path in paths if "\ndefaults:\n" in path.read_text(encoding="utf-8")}


def find_recipe(path: Path, engine: Engine = "trl", option: str = "") -> Path:
    """The path itself where there is such a file, else the recipe of that name.

    Args:
        path: as it was given.
        engine: what the recipe is for.
        option: that the path was given with, for messages.

    Raises:
        UserError: neither is there.
    """
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):  # a name the system does not take
        pass
    name, where = str(path), f"{option} {path}".lstrip()
    recipes = recipe_paths(engine)
    if name in recipes:
        return recipes[name]
    if engine == "trl" and name in recipe_paths("verl"):
        raise UserError(
            f"{where}: is a configuration of verl's own trainer; expected {verl_command(name)}, "
            f"or drpo doctor --verl {name}"
        )
    raise UserError(f"{where}: no such file; {unknown_name('recipe', name, recipes)}")


def verl_command(name: str) -> str:
    """What trains by a recipe of verl."""
    return f"python -m verl.trainer.main_ppo --config-path pkg://drpo.recipes.verl --config-name {name}"
