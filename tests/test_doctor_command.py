"""The command drpo doctor: what is printed where, exit codes, and mistakes of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drpo.cli.main import main
from drpo.doctor.examine import examine

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def doctor(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        before = sorted(here.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["drpo", "doctor", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        assert sorted(here.rglob("*")) == before
        return (int(end.value.code or 0), *capfd.readouterr())

    return run


@pytest.mark.parametrize(
    ("overrides", "code", "verdicts"),
    [
        ([], 0, {"ok"}),
        (["objective.delta=12.5"], 0, {"ok", "warning"}),
        (["trainer.top_k=5"], 1, {"ok", "warning", "stop"}),
    ],
    ids=["healthy", "warning", "stop"],
)
def test_json_is_all_there_is_on_both_streams_and_a_stop_is_exit_code_1(
    doctor: Any, overrides: list[str], code: int, verdicts: set[str]
) -> None:
    options = [part for override in overrides for part in ("--set", override)]
    ended, out, err = doctor("--json", *options)
    assert (ended, err) == (code, "")
    found = json.loads(out)
    assert {row["verdict"] for row in found} == verdicts
    for row in found:
        assert row.keys() == {"verdict", "what", "fix"}
        assert row["what"]
        assert "\n" not in row["what"]
        assert row["verdict"] == "ok" or row["fix"]


LOUD = """
import atexit, ctypes, os, subprocess, sys

SAID = sys.stdout
atexit.register(print, "at exit")


def say():
    print("print")
    SAID.write("a stream that was kept\\n")
    os.write(1, b"os.write\\n")
    ctypes.CDLL(None).puts(b"puts")
    subprocess.run(["echo", "a subprocess"])


say()


def score(completions, answer, **_):
    say()
    return [float(c == a) for c, a in zip(completions, answer)]
"""


def test_what_rewards_plug_ins_and_their_subprocesses_print_is_not_on_standard_output(here: Path) -> None:
    (here / "loud.py").write_text(LOUD)
    command = [sys.executable, "-m", "drpo", "doctor", "--json", "--set", "reward=loud:score"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert {row["verdict"] for row in json.loads(ended.stdout)} == {"ok"}


def test_without_a_standard_output_the_exit_code_is_what_there_is(here: Path) -> None:
    line = f"{sys.executable} -m drpo doctor --no-rollout --set objective.delta=-1 >&-"
    assert subprocess.run(line, shell=True, capture_output=True).returncode == 1


def test_people_see_a_line_a_finding_and_its_fix_below(doctor: Any) -> None:
    code, out, err = doctor("--no-rollout", "--set", "updates_per_rollout=1")
    assert (code, err) == (0, "")
    assert "ok      dropout: none\n" in out
    assert "warning updates: " in out
    assert "        fix: updates_per_rollout: 4\n" in out
    assert "μ against π" not in out


@pytest.mark.parametrize(
    "text", ["a: [", "", "- 1", "model: arithmetic", "seed: !!python/object:os.system x", "\udcff"]
)
def test_a_broken_recipe_is_a_stop_after_what_could_be_checked(doctor: Any, here: Path, text: str) -> None:
    (here / "broken.yaml").write_text(text, errors="surrogateescape")
    code, out, _ = doctor("broken.yaml", "--json")
    assert code == 1
    *others, last = json.loads(out)
    assert last["verdict"] == "stop"
    assert last["what"].startswith("broken.yaml")
    assert last["fix"]
    assert "packages" in others[0]["what"]


@pytest.mark.parametrize("name", ["nowhere.yaml", "model", "n" * 300])
def test_what_is_no_file_is_a_mistake_of_the_command_line(doctor: Any, name: str) -> None:
    code, out, err = doctor(name)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {name}")
    assert len(err.splitlines()) == 1


def test_who_gives_a_configuration_of_verl_is_told_the_option_for_it(here: Path) -> None:
    path = RECIPES / "verl" / "qwen3-4b-base.yaml"
    assert examine(path)[-1].fix == f"drpo doctor --verl {path}, if it is verl's"


def test_a_recipe_and_a_configuration_of_verl_are_one_too_many(doctor: Any) -> None:
    code, _, err = doctor("a.yaml", "--verl", "b.yaml")
    assert (code, err) == (2, "error: a.yaml and --verl b.yaml: expected one of them\n")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_of_a_shipped_recipe_only_data_model_and_engine_are_wanting(
    here: Path, monkeypatch: pytest.MonkeyPatch, recipe: Path
) -> None:
    findings = examine(recipe, rollout=False)
    stops = {f.what.split(":")[0] for f in findings if f.verdict == "stop"}
    assert stops <= {"task.train", "task.heldout", "model", "trainer.use_vllm"}
