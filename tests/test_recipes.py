"""The recipes that come with the package: in the wheel, listed, and found by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import drpo
from drpo.cli.main import app
from drpo.errors import UserError
from drpo.recipes import FOLDER, find_recipe, recipe_paths
from drpo.run.recipe import load_recipe


def test_recipes_are_in_the_package() -> None:
    assert FOLDER.is_relative_to(Path(drpo.__file__).parent)
    assert {"arithmetic", "gsm8k"} <= recipe_paths().keys()
    assert "paper" not in recipe_paths("verl")
    assert len(recipe_paths("verl")) == 6


def test_each_is_listed_with_its_engine_model_data_and_what_it_is() -> None:
    result = CliRunner().invoke(app, ["recipes"], env={"COLUMNS": "240"})
    assert result.exit_code == 0
    lines = [line.rstrip() for line in result.output.splitlines()]
    for engine in ("trl", "verl"):
        for name, path in recipe_paths(engine).items():
            (place,) = [number for number, line in enumerate(lines) if line.split("  ")[0] == name]
            assert lines[place].endswith(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
            assert lines[place].endswith(".")
            assert lines[place + 1].strip().startswith(f"{engine}; ")
    assert "trl; Qwen/Qwen3-0.6B; gsm8k_train.jsonl" in result.output
    assert "verl; Qwen/Qwen3-4B-Base; data/verl/dapo-math-filtered.jsonl" in result.output


def test_a_recipe_is_found_by_its_name_and_a_file_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("arithmetic"), ["seed=3"]) == load_recipe(None, ["seed=3"])
    assert find_recipe(Path("qwen3-4b-base"), "verl") == FOLDER / "verl" / "qwen3-4b-base.yaml"
    (tmp_path / "arithmetic").write_text("mine")
    assert find_recipe(Path("arithmetic")) == Path("arithmetic")


@pytest.mark.parametrize(
    ("name", "engine", "option", "message"),
    [
        ("gsm8", "trl", "", "gsm8: no such file; unknown recipe 'gsm8'; did you mean 'gsm8k'"),
        ("qwen3-4b-bas", "verl", "--verl", "--verl qwen3-4b-bas: no such file; unknown recipe 'qwen3-4b-bas'; did you"),
        ("qwen3-4b-base", "trl", "", "is a configuration of verl's own trainer; expected python -m verl.trainer"),
    ],
)
def test_a_name_that_is_no_recipe_gets_the_nearest_one(name: str, engine: str, option: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        find_recipe(Path(name), engine, option)  # pyright: ignore[reportArgumentType]
    assert message in str(raised.value)


def test_verl_composes_a_recipe_out_of_the_package() -> None:
    pytest.importorskip("verl")
    from hydra import compose, initialize_config_module

    with initialize_config_module("drpo.recipes.verl", version_base=None):
        config = compose("qwen3-4b-base", ["objective=dppo_tv"])
    assert config.actor_rollout_ref.actor.policy_loss.hyperparameters.delta == 0.15
