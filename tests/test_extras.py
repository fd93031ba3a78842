"""The extras of this library: what runs without one, and what is said where one is missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run_without(package: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process in which a package is not installed."""
    hidden = f"import sys; sys.modules['{package}'] = None\n"
    command = [sys.executable, "-c", hidden + script, *arguments]
    return subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "module",
    [
        *("drpo.objectives", "drpo.kernels", "drpo.metrics", "drpo.rewards", "drpo.cli.main", "drpo.run.recipe"),
        *("drpo.report", "drpo.inspect.page", "drpo.evaluation.evaluate", "drpo.doctor.verl"),
        *("drpo.integrations.verl", "drpo.integrations.verl.grader", "drpo.integrations.verl.reward"),
    ],
)
def test_what_does_not_train_with_trl_does_without_it(module: str) -> None:
    process = run_without("trl", f"import {module}")
    assert process.returncode == 0, process.stderr[-2000:]


@pytest.mark.parametrize(
    ("package", "module", "user"),
    [
        ("verl", "drpo.integrations.verl", "drpo.integrations.verl"),
        ("trl", "drpo.trainer.trainer", "drpo.trainer"),
        ("trl", "drpo.run.train", "drpo.trainer"),
        ("trl", "drpo.doctor.examine", "drpo.trainer"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_extra(package: str, module: str, user: str) -> None:
    process = run_without(package, f"try:\n import {module}\nexcept ImportError as error:\n print(error)")
    assert process.stdout == f"{user}: {package} is not installed; expected pip install 'drpo[{package}]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "drpo.trainer: trl is not installed; expected pip install 'drpo[trl]'"),
        (
            ["train", "--engine=verl"],
            "--engine verl: drpo.trainer: trl is not installed; expected pip install 'drpo[trl]'",
        ),
    ],
)
def test_a_command_without_its_extra_is_one_line(arguments: list[str], message: str) -> None:
    process = run_without("trl", "from drpo.cli.main import main; main()", *arguments)
    assert (process.returncode, process.stderr.splitlines()[-1:]) == (2, [f"error: {message}"])
    assert "Traceback" not in process.stderr
