"""The command ``drpo recipes``."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from drpo.recipes import FOLDER, Engine, recipe_paths, verl_command


def recipes() -> None:
    """List the recipes that come with the package: what each is, its engine, model and data.

    Examples:

      drpo recipes

      drpo train smollm2-addition
    """
    tables = {}
    for engine in ("trl", "verl"):
        tables[engine] = Table.grid(padding=(0, 2))
        for name in recipe_paths(engine):
            tables[engine].add_row(Text(name, style="bold"), Text(summary(engine, name)))
            tables[engine].add_row("", Text(f"{engine}; {'; '.join(model_and_data(engine, name))}", style="dim"))
    Console(highlight=False).print(
        Group(
            "To be run by drpo train NAME, checked by drpo doctor NAME:\n",
            tables["trl"],
            f"\nTo be run by {verl_command('NAME')}, checked by drpo doctor --verl NAME:\n",
            tables["verl"],
        )
    )


def summary(engine: Engine, name: str) -> str:
    """What a recipe is: its first line."""
    first, *_ = recipe_paths(engine)[name].read_text(encoding="utf-8").splitlines()
    return first.removeprefix("# ")


def model_and_data(engine: Engine, name: str) -> tuple[str, str]:
    """The model and the training data of a recipe."""
    from drpo.run.yaml import parse

    def read(path: Any) -> Any:
        return parse(path.read_text(encoding="utf-8"), str(path))

    recipe = read(recipe_paths(engine)[name])
    if engine == "trl":
        return recipe["model"], recipe["task"]["train"]
    shared = read(FOLDER / "verl" / "paper.yaml")
    return recipe["actor_rollout_ref"]["model"]["path"], {**shared["data"], **recipe.get("data", {})}["train_files"]
