"""The run folder: what is written is read back, and nothing but a run is replaced."""

from __future__ import annotations

import json
import math
import operator
import sys
from pathlib import Path
from typing import Any

import pytest

from drpo.errors import UserError
from drpo.files import append_jsonl, read_jsonl, write_json
from drpo.run.folder import RunFolder
from drpo.run.recipe import load_recipe


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create(load_recipe())
    return folder


def add_checkpoint(folder: RunFolder, name: str) -> None:
    (folder.checkpoints / name).mkdir(parents=True)


def contents(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def test_rows_come_back_in_order_over_several_writes(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"update": 1, "loss": 0.1}, {"update": 2, "text": "ü\n\r\u2028"})
    append_jsonl(path)
    append_jsonl(path, {"update": 3, "nested": {"list": [1, None, True]}})
    assert read_jsonl(path) == [
        {"update": 1, "loss": 0.1},
        {"update": 2, "text": "ü\n\r\u2028"},
        {"update": 3, "nested": {"list": [1, None, True]}},
    ]


def test_a_file_that_is_missing_or_empty_has_no_rows(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert read_jsonl(tmp_path / "missing.jsonl") == read_jsonl(tmp_path / "empty.jsonl") == []


@pytest.mark.parametrize(("value", "text"), [(math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan")])
def test_numbers_that_json_has_no_word_for_become_text(tmp_path, value, text):
    row = {"top": value, "list": [1.0, value], "tuple": (value,), "nested": {"deep": [{"er": value}]}}
    expected = {"top": text, "list": [1.0, text], "tuple": [text], "nested": {"deep": [{"er": text}]}}
    append_jsonl(tmp_path / "rows.jsonl", row)
    write_json(tmp_path / "value.json", row)
    assert read_jsonl(tmp_path / "rows.jsonl") == [expected]
    assert json.loads((tmp_path / "value.json").read_text()) == expected
    for name in ("rows.jsonl", "value.json"):
        # A strict reader, which knows neither NaN nor Infinity, takes every file.
        json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d\ude00"[::-1], "\0\x1b[31m"])
def test_any_text_a_model_can_produce_survives(tmp_path, text):
    append_jsonl(tmp_path / "rows.jsonl", {"completion": text})
    write_json(tmp_path / "value.json", {"completion": text})
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"completion": text}]
    assert json.loads((tmp_path / "value.json").read_text()) == {"completion": text}
    assert (tmp_path / "rows.jsonl").read_bytes().isascii()


def test_a_last_line_cut_short_anywhere_is_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"update": 1}, {"update": 2, "text": "ü😀"})
    written = path.read_bytes()
    first = written.index(b"\n") + 1
    for end in range(first, len(written)):
        path.write_bytes(written[:end])
        assert read_jsonl(path) == [{"update": 1}]


def test_rewind_drops_what_was_logged_after_an_update(run):
    for path in (run.metrics, run.evaluations, run.samples):
        append_jsonl(path, *({"update": update, "of": path.name} for update in (0, 4, 4, 5, 8)))
    with run.metrics.open("a") as file:
        file.write('{"update": 9, "lo')
    run.rewind(4)
    for path in (run.metrics, run.evaluations, run.samples):
        assert read_jsonl(path) == [{"update": update, "of": path.name} for update in (0, 4, 4)]
    append_jsonl(run.metrics, {"update": 5})
    assert read_jsonl(run.metrics)[-1] == {"update": 5}


def test_rewind_of_a_run_that_logged_nothing_leaves_no_rows(run):
    run.rewind(4)
    assert read_jsonl(run.metrics) == read_jsonl(run.evaluations) == read_jsonl(run.samples) == []


@pytest.mark.parametrize("written", [0, 3])
def test_rewind_says_that_rows_are_lost(run, caplog, written):
    append_jsonl(run.metrics, *({"update": update} for update in range(1, written + 1)))
    run.rewind(4)
    assert f"metrics.jsonl has rows of {written} updates of 4; those of the others are lost" in caplog.text


def test_rewind_says_nothing_where_no_row_is_lost(run, caplog):
    append_jsonl(run.metrics, *({"update": update} for update in (1, 2, 3, 4, 5)))
    run.rewind(4)
    assert not caplog.text


@pytest.mark.parametrize("row", [{}, {"update": "4"}, {"update": None}], ids=str)
def test_rewind_names_a_log_with_a_row_of_no_update(run, row):
    append_jsonl(run.metrics, {"update": 1}, row)
    with pytest.raises(UserError, match=r"metrics\.jsonl: is damaged; expected the number of an update"):
        run.rewind(4)


def test_the_accuracy_before_is_that_before_the_first_update(run):
    append_jsonl(run.metrics, {"update": 4, "rollout": 1, "seconds": 1.0})
    append_jsonl(run.evaluations, {"update": 4, "accuracy": 0.75})
    summary = run.write_summary(load_recipe(None))
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (None, 0.75)


def test_an_evaluation_has_the_right_completions_of_each_problem(run):
    # Three problems of two completions: both, none and one of them right.
    samples = [{"prompt": str(row), "reward": reward} for row, reward in enumerate((1.0, 2.0, 0.0, 0.5, 1.0, 0.0))]
    assert run.append_evaluation({"update": 4, "rollout": 1}, samples, samples_per_problem=2) == 0.5
    (row,) = read_jsonl(run.evaluations)
    assert row == {"update": 4, "rollout": 1, "accuracy": 0.5, "completions": 6, "correct": [2, 0, 1]}
    assert read_jsonl(run.samples) == [{"update": 4, "rollout": 1, **sample} for sample in samples]


def test_a_new_run_folder_holds_its_recipe_and_is_recognised(tmp_path):
    recipe = load_recipe(None, ["seed=7"])
    folder = RunFolder(tmp_path / "runs" / "new")
    assert not folder.is_run
    folder.create(recipe)
    assert folder.is_run
    assert load_recipe(folder.recipe) == recipe
    assert json.loads(folder.info.read_text())["seed"] == 7


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_path_that_is_free_or_an_empty_folder_may_be_written_to(tmp_path, overwrite):
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "missing").check_free(overwrite)
    RunFolder(tmp_path / "empty").check_free(overwrite)


def test_a_run_may_be_replaced_only_with_overwrite(run):
    with pytest.raises(UserError, match=r"already exists; choose another, or give --resume or --overwrite"):
        run.check_free(overwrite=False)
    run.check_free(overwrite=True)


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_full_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def make_half_a_run(path: Path) -> None:
    make_full_folder(path)
    (path / "run.json").write_text("{}")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_link_to_a_run(path: Path) -> None:
    RunFolder(path.with_name("target")).create(load_recipe())
    path.symlink_to("target")


def make_link_to_a_folder(path: Path) -> None:
    make_full_folder(path.with_name("target"))
    path.symlink_to("target")


def make_link_to_an_empty_folder(path: Path) -> None:
    path.with_name("target").mkdir()
    path.symlink_to("target")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        make_file,
        make_full_folder,
        make_half_a_run,
        make_dangling_link,
        make_link_to_a_run,
        make_link_to_a_folder,
        make_link_to_an_empty_folder,
    ],
)
def test_what_is_no_run_is_never_replaced(tmp_path, make, overwrite):
    make(tmp_path / "output")
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        RunFolder(tmp_path / "output").check_free(overwrite)
    assert str(error.value).startswith(f"--output {tmp_path / 'output'}: ")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["n" * 300, "nul\0", "file/run"])
def test_a_path_that_no_folder_can_have_is_refused_at_the_check(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output"):
        RunFolder(tmp_path / name).check_free(overwrite=False)


def test_the_current_folder_can_become_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(Path())
    folder.check_free(overwrite=False)
    folder.create(load_recipe())
    assert (tmp_path / "run.json").is_file()


def test_creating_replaces_the_run_that_was_there_and_nothing_else(run):
    append_jsonl(run.metrics, {"update": 1})
    add_checkpoint(run, "checkpoint-4")
    (run.path / "notes.md").write_text("mine")
    run.create(load_recipe(None, ["seed=3"]), overwrite=True)
    assert sorted(contents(run.path)) == ["notes.md", "recipe.yaml", "run.json"]
    assert load_recipe(run.recipe).seed == 3


def test_creating_does_not_replace_a_run_that_began_meanwhile(run):
    append_jsonl(run.metrics, {"update": 1})
    before = contents(run.path)
    with pytest.raises(UserError, match="another process has begun a run there"):
        run.create(load_recipe(None, ["seed=3"]))
    assert contents(run.path) == before


@pytest.mark.parametrize("left", [["run.partial.json"], ["run.json"], ["run.json", "recipe.partial.yaml"]], ids=str)
def test_a_folder_whose_making_was_killed_can_be_overwritten(tmp_path, left):
    for name in ("run.lock", *left):
        (tmp_path / name).touch()
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match="already exists; choose another, or give --resume or --overwrite"):
        folder.check_free(overwrite=False)
    folder.check_free(overwrite=True)
    folder.create(load_recipe(None, ["seed=3"]), overwrite=True)
    assert load_recipe(folder.recipe).seed == 3


def test_overwriting_that_is_killed_anywhere_can_be_repeated(run, monkeypatch):
    add_checkpoint(run, "checkpoint-4")
    append_jsonl(run.metrics, {"update": 1})
    calls = ["shutil.rmtree", "pathlib.Path.unlink", "os.replace"]
    killed_after = 0
    while True:
        left = killed_after

        def counted(call: Any) -> Any:
            def act(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return call(*arguments, **options)

            return act

        with monkeypatch.context() as patched:
            for call in calls:
                patched.setattr(
                    call, counted(operator.attrgetter(call.partition(".")[2])(sys.modules[call.partition(".")[0]]))
                )
            try:
                run.create(load_recipe(None, ["seed=3"]), overwrite=True)
            except KeyboardInterrupt:
                killed_after += 1
            else:
                break
        run.check_free(overwrite=True)
    assert killed_after > 3
    assert load_recipe(run.recipe).seed == 3


@pytest.mark.parametrize("line", ['{"update": 2, "rol\n', "\0\n", "\xff\n", "5\n", "null\n", "[1]\n"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"update": 1})
    with path.open("ab") as file:
        file.write(line.encode("latin-1"))
    append_jsonl(path, {"update": 3})
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: is damaged"):
        read_jsonl(path)


def test_one_process_at_a_time_writes_a_run(run):
    refused = pytest.raises(UserError, match="another process is writing this run")
    with run.locked(), refused, RunFolder(run.path).locked():
        pass
    with RunFolder(run.path).locked():
        pass


def test_a_run_with_a_checkpoint_and_no_summary_can_be_resumed(run):
    add_checkpoint(run, "checkpoint-8")
    assert run.check_resumable() == load_recipe()


def complete(folder: RunFolder) -> None:
    add_checkpoint(folder, "checkpoint-8")
    write_json(folder.summary, {})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda run: None, "holds no checkpoint to resume from; expected a run from the start in another"),
        (
            lambda run: add_checkpoint(run, "global_step_4"),
            "holds no checkpoint of DRPOTrainer to resume from, but .*global_step_4$",
        ),
        (lambda run: add_checkpoint(run, "checkpoint-best"), "holds no checkpoint of DRPOTrainer.*checkpoint-best$"),
        (complete, "this run is complete; there is nothing to resume"),
        (lambda run: run.info.unlink(), "holds no run to resume"),
        (lambda run: run.recipe.unlink(), "holds no run to resume"),
    ],
    ids=["no checkpoint", "of verl", "a folder of another name", "complete", "no run.json", "no recipe.yaml"],
)
def test_what_cannot_be_resumed_says_why(run, change, expected):
    change(run)
    with pytest.raises(UserError, match=expected) as error:
        run.check_resumable()
    assert str(error.value).startswith(f"--output {run.path}: ")
