"""Whatever an output is called, nothing but it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drpo.data.problems import builtin_problems
from drpo.errors import UserError
from drpo.evaluation.folder import EvaluationFolder
from drpo.report.html import write_page
from drpo.run.folder import RunFolder
from drpo.run.recipe import load_recipe
from support.model_folder import write_problems
from test_cli import drpo, here  # noqa: F401

NAMES = [
    *("plain", "a b", "-", "--overwrite", "~", "$HOME", "%2e%2e", "a;touch b", "`x`", "*", "?", "\n", "ü\u202e", "a\\b"),
    *(".", "..", "../..", "a/..", "./a", "a/../b", "../outside", "../outside/new", "../outside/kept", "//", "/"),
    *("link", "link/new", "dangling", "link to a file", "file/new", "full", "full/new", "missing/a/b"),
    *("nul\0", "a\0/../../outside", "x" * 255, "x" * 300, "x/" * 2100 + "x", "\udcff", "con", "CON.", " ", "locked/new"),
]  # fmt: skip


@pytest.fixture
def world(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A folder in whose ``work`` commands run."""
    work = here / "work"
    (here / "outside").mkdir()
    (here / "outside" / "kept").write_text("mine")
    (work / "full").mkdir(parents=True)
    (work / "full" / "kept").write_text("mine")
    (work / "file").write_text("mine")
    (work / "link").symlink_to("../outside")
    (work / "dangling").symlink_to("../nowhere")
    for ending in ("", ".html", ".jsonl", ".json", ".svg"):
        (work / f"link to a file{ending}").symlink_to("../outside/kept")
    monkeypatch.chdir(work)
    return here


def files(folder: Path) -> dict[str, bytes]:
    return {
        os.path.join(parent, name): Path(parent, name).read_bytes()
        for parent, _, names in os.walk(folder)
        for name in names
        if not os.path.islink(os.path.join(parent, name))
    }


def create_run(name: str) -> None:
    folder = RunFolder(Path(name))
    folder.check_free(overwrite=True)
    with folder.locked():
        folder.create(load_recipe(), overwrite=True)


def begin_evaluation(name: str) -> None:
    folder = EvaluationFolder(Path(name))
    with folder.locked():
        folder.open({}, [], resume=False, overwrite=True)


def write(page: str) -> None:
    write_page("page", Path(page))


def may_write(target: str, path: str) -> bool:
    """Whether a file is the target, is in it, or is of its name with another ending, beside it."""
    real = os.path.realpath(target)
    beside = os.path.dirname(path) == os.path.dirname(real) and os.path.basename(path).startswith(Path(real).stem)
    return path == real or path.startswith(real.rstrip("/") + "/") or beside


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:30])
@pytest.mark.parametrize(
    ("function", "ending"), [(create_run, ""), (begin_evaluation, ""), (write, ".html")], ids=lambda value: getattr(value, "__name__", "")
)  # fmt: skip
def test_nothing_but_the_output_is_written(
    world: Path, function: Callable[[str], None], ending: str, name: str
) -> None:
    if name in ("//", "/") and os.access("/", os.W_OK):
        pytest.skip("the root folder can be written to")
    before = files(world)
    message = None
    try:
        function(name + ending)
    except UserError as error:
        message = str(error)
    after = files(world)
    assert message is None or (message.startswith("--out") and after == before)
    changed = [path for path in after if before.get(path) != after[path]]
    assert before.keys() <= after.keys()
    assert [path for path in changed if not may_write(name.split("\0")[0] + ending, path)] == []
    assert (world / "outside" / "kept").read_text() == "mine"


OPTIONS = {
    "report": (["report", "run", "--output"], ".html"),
    "data": (["data", "gsm8k", "--from", "gsm8k.jsonl", "--out"], ""),
    "verl": (["data", "verl", "train.jsonl", "--out"], ".jsonl"),
    "inspect": (["inspect", "rollouts.jsonl", "--output"], ".html"),
    "json": (["inspect", "rollouts.jsonl", "--json"], ".json"),
    "weights": (["weights", "drpo", "--output"], ".svg"),
}


@pytest.mark.parametrize("command", OPTIONS)
def test_no_command_writes_outside_of_its_output(world: Path, drpo: Any, command: str) -> None:  # noqa: F811
    work = world / "work"
    RunFolder(work / "run").create(load_recipe())
    (work / "gsm8k.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    write_problems(work / "train.jsonl", builtin_problems("train", 2, seed=0))
    row = {"logp": [-1.0], "behavior_logp": [-1.0], "advantage": 1.0}
    (work / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    arguments, ending = OPTIONS[command]
    for name in ("plain", "../outside/kept", "link/new", "link to a file", "nul\0", "x" * 300):
        before = files(world)
        code, _, err = drpo(*arguments, name + ending)
        after = files(world)
        changed = {path for path in after if before.get(path) != after[path]}
        assert code in (0, 2), (name, err)
        assert "Traceback" not in err, name
        allowed = {str(work / "rollouts.html")} if command == "json" else set()
        assert [path for path in changed - allowed if not may_write(name.split("\0")[0] + ending, path)] == [], name
        assert (world / "outside" / "kept").read_text() == "mine", name
