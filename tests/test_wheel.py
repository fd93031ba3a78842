"""Somebody who has the wheel and no clone trains, evaluates, and looks at what came of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from drpo.recipes import FOLDER

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Installed:
    """The wheel in an environment of its own.

    Args:
        wheel: its file.
        command: ``drpo``.
        folder: where commands run.
    """

    wheel: Path
    command: Path
    folder: Path

    def run(self, *arguments: object) -> str:
        """What a command says that ends well."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.command), *map(str, arguments)]
        process = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-2000:]
        return process.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    wheels, venv, folder = (tmp_path_factory.mktemp(name) for name in ("wheels", "venv", "folder"))
    options = ["--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    build = [sys.executable, "-m", "pip", "wheel", *options, "--no-deps", "--wheel-dir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", *options, f"{wheel}[trl]"], check=True)
    yield Installed(wheel, venv / "bin" / "drpo", folder)
    # Gigabytes, of which pytest would keep three.
    for path in (venv, folder):
        shutil.rmtree(path)


def sets(**settings: object) -> list[str]:
    return [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")]


def documented_files() -> list[str]:
    """What the documentation says a run folder has."""
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## The run folder\n(.*?)^An existing folder", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"`([\w.]+(?:jsonl?|yaml|html|/))`", section)


def test_the_wheel_has_every_recipe_and_lists_it(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        shipped = set(archive.namelist())
    assert {f"drpo/recipes/{path.relative_to(FOLDER).as_posix()}" for path in FOLDER.rglob("*.yaml")} <= shipped
    assert "smollm2-addition" in installed.run("recipes")


def test_a_run_is_made_evaluated_reported_and_inspected(installed: Installed) -> None:
    settings = sets(rollouts=2, heldout_problems=20, record_rollouts="true")
    assert "held-out accuracy" in installed.run("train", "--output", "run", *settings)
    files = documented_files()
    assert {"recipe.yaml", "rollouts.jsonl", "model/", "report.html"} <= set(files)
    assert [name for name in files if not (installed.folder / "run" / name).exists()] == []
    asked = ["--data", "arithmetic", "--reward", "exact_answer", "--samples", 2, "--max-tokens", 20, "--problems", 10]
    installed.run("eval", "run", *asked)
    assert (installed.folder / "run" / "evaluations" / "arithmetic" / "evaluation.json").is_file()
    for arguments in (["report", "run"], ["inspect", "run/rollouts.jsonl"]):
        installed.run(*arguments, "--output", f"{arguments[0]}.html")
        page = (installed.folder / f"{arguments[0]}.html").read_text(encoding="utf-8")
        assert "Plotly.newPlot" in page


def test_the_doctor_finds_nothing_amiss(installed: Installed) -> None:
    installed.run("doctor")


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="SMOLLM2 names no folder that scripts/smollm2.py made")
def test_a_real_model_trains(installed: Installed) -> None:
    small = sets(rollouts=1, prompts_per_rollout=2, num_generations=2, updates_per_rollout=1, heldout_problems=4)
    installed.run("train", "smollm2-addition", "--output", "real", *sets(model=os.environ["SMOLLM2"]), *small)
    assert (installed.folder / "real" / "report.html").is_file()
