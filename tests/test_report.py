"""The report shows what a run wrote, and nothing that a run wrote becomes markup, script or a request."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs_version
from typer.testing import CliRunner

from drpo.cli.main import app
from drpo.errors import UserError
from drpo.files import append_jsonl, write_json
from drpo.metrics.histograms import DIVERGENCE_EDGES, WEIGHT_EDGES
from drpo.report import write_report
from drpo.report.figures import MOST_WEIGHT_TICKS, divergence, tick_whole, weight_distribution
from drpo.report.html import table
from drpo.report.page import render
from drpo.report.read import read_run
from drpo.report.verl_log import read_verl_log
from drpo.run.folder import RunFolder
from drpo.run.recipe import load_recipe
from support.browser import BROWSER
from support.browser import opened as opened_in_browser

UPDATES_PER_ROLLOUT = 4
ROLLOUTS = 3


def metrics_row(update: int) -> dict[str, Any]:
    step = (update - 1) % UPDATES_PER_ROLLOUT
    effects = {
        f"weight/{effect}_{sign}": 0.02 * step
        for effect in ("attenuated", "zeroed", "reversed", "amplified")
        for sign in ("positive", "negative")
    }
    divergence = [0] * (len(DIVERGENCE_EDGES) + 1)
    divergence[0], divergence[120 + step] = 300, 40
    weight = [0] * (len(WEIGHT_EDGES) + 1)
    # the bins of w = 0, w = 1 and around
    weight[len(weight) // 2], weight[len(weight) // 2 - 5], weight[0] = 250, 80, step
    return {
        "update": update,
        "rollout": (update - 1) // UPDATES_PER_ROLLOUT + 1,
        "reward": 0.25 + 0.01 * update,
        "ratio/mean": 1.0,
        "ratio/max": 1.0 + 0.5 * step,
        "divergence/mean": 1e-6 * 10**step,
        "divergence/p99": 1e-5 * 10**step,
        "divergence/max": 1e-4 * 10**step,
        **effects,
        "divergence_histogram": divergence,
        "weight_histogram": weight,
    }


def without_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def evaluation(text: str) -> dict[str, Any]:
    """What drpo eval writes, with ``text`` wherever it can have text of any kind."""
    estimate = {"mean": 0.5, "low": 0.25, "high": 0.75}
    return {
        "samples": 16,
        "average": estimate,
        "pass_at": {"1": estimate, "16": {"mean": 0.875, "low": 0.75, "high": 1.0}},
        "majority": estimate,
        "truncated": 0.125,
        "no_answer": 0.0625,
        "engine_description": {"name": text, "version": text, "precision": text},
        "problems_table": [{"prompt": text}] * 30,
    }


def make_run(path: Path, text: str = "42,34,68", overrides: tuple[str, ...] = ()) -> RunFolder:
    """A complete run, in whose folder ``text`` stands wherever a run can have text of any kind."""
    folder = RunFolder(path)
    recipe = load_recipe(None, [f"rollouts={ROLLOUTS}", *overrides])
    valid = without_surrogates(text)
    task = recipe.task.model_copy(update={"train": valid, "template": valid + "{prompt}"})
    reward = [recipe.reward[0].model_copy(update={"name": valid})]
    recipe = recipe.model_copy(update={"model": valid, "reward": reward, "task": task, "trainer": {valid: valid}})
    folder.create(recipe)
    append_jsonl(folder.metrics, *map(metrics_row, range(1, ROLLOUTS * UPDATES_PER_ROLLOUT + 1)))
    for rollout, correct in ((0, [1, 0]), (ROLLOUTS, [2, 0])):
        where = {"update": rollout * UPDATES_PER_ROLLOUT, "rollout": rollout}
        row = {**where, "accuracy": sum(correct) / 4, "completions": 4, "correct": correct}
        append_jsonl(folder.evaluations, row)
        append_jsonl(
            folder.samples,
            {**where, "prompt": "17+25-8+34=", "answer": "68", "completion": "42,34,68", "reward": 1.0},
            {**where, "prompt": text, "answer": text, "completion": text, "reward": 0.0},
        )
    (folder.evaluated / "aime24").mkdir(parents=True)
    write_json(folder.evaluated / "aime24" / "evaluation.json", evaluation(text))
    write_json(folder.info, {"seed": 0, "versions": {"python": text, text: "1"}, "platform": text})
    write_json(
        folder.summary,
        {
            "objective": text,
            "objective_kwargs": {"delta": text, text: 1},
            "train_seconds": text,
            "audit": {"tokens": text, "mean": 1e-6, "maximum": 1e-5, "threshold": 1e-3},
        },
    )
    return folder


@dataclass
class Page:
    """What a parser of HTML makes of a page."""

    elements: list[tuple[str, tuple[tuple[str, str | None], ...]]] = field(default_factory=list)
    contents: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    text: str = ""
    other: list[str] = field(default_factory=list)

    @property
    def cells(self) -> list[str]:
        return self.contents["td"]

    @property
    def figures(self) -> list[str]:
        return [script for script in self.contents["script"] if script.startswith("{")]

    def attributes(self, *names: str) -> list[str]:
        return [value or "" for _, given in self.elements for name, value in given if not names or name in names]


def parse(html: str) -> Page:
    page, inside = Page(), [""]

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            page.elements.append((tag, tuple(attrs)))
            inside[0] = tag
            page.contents[tag].append("")

        def handle_endtag(self, tag: str) -> None:
            inside[0] = ""

        def handle_data(self, data: str) -> None:
            if inside[0]:
                page.contents[inside[0]][-1] += data
            if inside[0] not in ("script", "style"):
                page.text += data

        def handle_comment(self, data: str) -> None:
            page.other.append(data)

        handle_decl = handle_pi = unknown_decl = handle_comment

    reader = Reader()
    reader.feed(html)
    reader.close()
    return page


def report_of(*folders: RunFolder) -> Page:
    target = folders[0].path.parent / "page.html"
    write_report(folders, target)
    return parse(target.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def benign(tmp_path_factory) -> Page:
    folder = tmp_path_factory.mktemp("benign")
    return report_of(make_run(folder / "one"), make_run(folder / "two"))


PAYLOADS = [
    "<script>document.title='owned'</script>",
    "</script><img src=x onerror=\"document.title='owned'\">",
    "\"><svg onload=document.title='owned'>",
    "'><svg/onload=document.title='owned'>",
    "&lt;script&gt;document.title='owned'&lt;/script&gt;",
    "&#60;img src=x onerror=alert(1)&#62;",
    "<a href=\"javascript:document.title='owned'\">click</a>",
    "<a href='https://example.com/'>click</a>",
    "javascript:document.title='owned'",
    "<!--<script>",
    "--><script>alert(1)</script><!--",
    "<![CDATA[<script>alert(1)</script>]]>",
    "</title><script>alert(1)</script>",
    "</pre></details></table></body></html><script>alert(1)</script>",
    "</style><style>@import 'https://example.com/x.css';</style>",
    "<style>body { background: url(https://example.com/x.png) }</style>",
    "<iframe srcdoc='<script>parent.document.title=1</script>'></iframe>",
    "<meta http-equiv=refresh content='0;url=https://example.com/'>",
    "<base href='https://example.com/'>",
    "<link rel=stylesheet href=//example.com/x.css>",
    "<form action=https://example.com/><input autofocus onfocus=alert(1)>",
    "<object data=https://example.com/></object><embed src=https://example.com/>",
    "<math><mtext><img src=x onerror=alert(1)></mtext></math>",
    "<details open ontoggle=alert(1)>",
    "<b>bold</b><i onclick=alert(1)>",
    "\u2028</script\n><script\n>alert(1)</script\n>",
    "\ud800<script>alert(1)</script>",
    "\\u003cscript\\u003ealert(1)\\u003c/script\\u003e",
    "${alert(1)}{{constructor.constructor('alert(1)')()}}",
    "%{x}<extra></extra><br>\x00\x1b",
]  # fmt: skip


def as_name(text: str) -> str:
    """The text as a file name: without what no file name can have."""
    return without_surrogates(text.translate({ord("/"): "∕", 0: None}))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_from_a_run_is_never_an_element_or_attribute(tmp_path, benign, payload):
    page = report_of(make_run(tmp_path / as_name(payload), payload), make_run(tmp_path / "two", payload))
    assert page.elements == benign.elements
    assert page.other == benign.other
    assert without_surrogates(payload) in page.cells
    # A browser ends a script in more ways than this parser knows; all of them need this character.
    assert [figure for figure in page.figures if "<" in figure] == []


@pytest.mark.parametrize("key", ["rollout", "completions", "correct"])
def test_text_in_place_of_a_number_is_refused(tmp_path, key):
    folder = make_run(tmp_path / "run")
    append_jsonl(folder.evaluations, {"update": 12, "rollout": 3, "completions": 1, "correct": [1], key: "<b>3</b>"})
    with pytest.raises(UserError, match=rf"evaluations\.jsonl, row \d+: expected an object with {key}, a "):
        report_of(folder)


def test_the_page_needs_no_network(benign):
    assert benign.attributes("src", "href", "xlink:href", "action", "formaction", "poster", "data", "srcset") == []
    for style in (*benign.contents["style"], *benign.attributes("style")):
        assert "url(" not in style
        assert "@import" not in style
    assert not any(re.search(r"https?://|^//", value) for value in benign.attributes())


def test_a_content_security_policy_allows_the_pages_own_scripts_alone(benign):
    tags = [tag for tag, _ in benign.elements]
    policies = [dict(given) for tag, given in benign.elements if tag == "meta" and "http-equiv" in dict(given)]
    assert [policy["http-equiv"] for policy in policies] == ["Content-Security-Policy"]
    directives = {name: values for name, *values in map(str.split, policies[0]["content"].split(";"))}
    assert directives["default-src"] == ["'none'"]
    assert all(re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", source) for source in directives["script-src"])
    assert len(directives["script-src"]) == 2
    assert not {"connect-src", "script-src-elem", "script-src-attr", "form-action", "frame-src"} & set(directives)
    sources = {source for name in directives for source in directives[name] if name not in ("script-src", "style-src")}
    assert sources == {"'none'", "data:", "blob:"}
    # A policy says nothing about what came before it.
    assert "script" not in tags[: tags.index("meta") + 2]


def test_a_report_shows_the_run(tmp_path):
    page = report_of(make_run(tmp_path / "demo", overrides=("objective.delta=0.25", "seed=7")))
    assert page.cells[0] == "demo"
    # Two samples of each of two problems, of which one problem never is right.
    assert page.cells[2:5] == ["0.250 [0.000, 0.500]", "0.500 [0.000, 1.000]", "4 of 2 problems"]
    assert page.cells[5] == str(ROLLOUTS)
    assert page.cells[8] == "7"
    assert page.cells[19:23] == ["17+25-8+34=", "42,34,68", "68", "1"]
    assert "demo, after 0 rollouts:" in page.text
    assert f"demo, after {ROLLOUTS} rollouts:" in page.text
    assert "delta: 0.25" in page.text


def test_a_report_of_several_runs_shows_each(tmp_path):
    page = report_of(make_run(tmp_path / "left", "one text"), make_run(tmp_path / "right", "another text"))
    for name, text in (("left", "one text"), ("right", "another text")):
        assert name in page.cells
        assert text in page.cells
        assert f"{name}: training reward" in page.figures[0]
        assert f"{name}: recipe" in page.text


def traces(page: Page) -> list[dict[str, Any]]:
    return [trace for figure in page.figures for trace in json.loads(figure)["data"]]


def test_a_series_with_one_point_is_seen(tmp_path):
    folder = make_run(tmp_path / "run")
    after_one_update(folder)
    single = [trace for trace in traces(report_of(folder)) if trace["type"] == "scatter" and len(trace["x"]) == 1]
    # 1 of learning, 3 of divergence, 2 of the ratio, 2 x 4 of effects
    assert len(single) == 14
    assert all("markers" in trace["mode"] for trace in single)


@pytest.mark.parametrize(
    ("last", "step"), [(1, 1), (4, 1), (10, 1), (11, 2), (21, 5), (60, 10), (200, 20), (2000, 200)]
)
def test_an_axis_ticks_at_most_ten_steps_at_whole_numbers(last, step):
    axis = tick_whole(go.Figure(go.Scatter(x=[0, last]))).layout.xaxis
    assert (axis.tick0, axis.dtick) == (0, step)


def test_every_axis_of_rollouts_ticks_whole_ones(benign):
    axes = [
        axis
        for layout in (json.loads(figure)["layout"] for figure in benign.figures)
        for axis in layout.values()
        if isinstance(axis, dict) and axis.get("title", {}).get("text") == "rollouts"
    ]
    assert len(axes) == 5
    assert [axis["dtick"] for axis in axes] == [1] * 5


def test_weights_have_few_ticks_one_of_them_at_1(tmp_path):
    folder = make_run(tmp_path / "run")
    folder.metrics.unlink()
    append_jsonl(folder.metrics, {**metrics_row(1), "weight_histogram": [1] * (len(WEIGHT_EDGES) + 1)})
    axis = weight_distribution([read_run(folder)]).layout.xaxis
    assert "1" in axis.tickvals
    assert 3 <= len(axis.tickvals) <= MOST_WEIGHT_TICKS
    assert set(axis.tickvals) <= set(axis.categoryarray)


@pytest.mark.parametrize(
    ("deltas", "lines"),
    [
        ([0.2], {"δ = 0.2": 0.2}),
        ([0.2, 0.2], {"δ = 0.2": 0.2}),
        ([0.2, 0.3], {"run 0: δ = 0.2": 0.2, "run 1: δ = 0.3": 0.3}),
        ([0.2, 0.3, 0.2], {"run 0, run 2: δ = 0.2": 0.2, "run 1: δ = 0.3": 0.3}),
        ([12.5], {}),
    ],
)
def test_each_delta_of_the_runs_has_a_line(tmp_path, deltas, lines):
    folders = [make_run(tmp_path / f"run {n}", overrides=(f"objective.delta={d}",)) for n, d in enumerate(deltas)]
    drawn = [trace for trace in divergence([read_run(folder) for folder in folders]).data if "δ" in trace.name]
    assert {trace.name: set(trace.y) for trace in drawn} == {name: {delta} for name, delta in lines.items()}
    assert len({trace.line.dash for trace in drawn}) == len(lines)


def test_a_prompt_keeps_its_lines(tmp_path):
    page = report_of(make_run(tmp_path / "run", "first line\n  second line"))
    assert "first line\n  second line" in page.cells
    assert re.search(r"\btd \{[^}]*white-space: pre-wrap", page.contents["style"][0])


@pytest.mark.parametrize("other", ["not measured", 2])
def test_a_column_with_numbers_is_to_the_right_with_its_heading(other):
    page = parse(table(["run", "accuracy"], [["a", 0.5], ["b", other]]))
    kinds = [(tag, dict(given).get("class")) for tag, given in page.elements if tag in ("th", "td")]
    assert kinds == [("th", None), ("th", "number"), *[("td", None), ("td", "number")] * 2]


def test_a_wide_table_scrolls_by_itself(benign):
    kinds = [(tag, dict(given).get("class")) for tag, given in benign.elements]
    before = [kinds[place - 1] for place, (tag, _) in enumerate(kinds) if tag == "table"]
    assert before == [("div", "table")] * len(before)
    assert before
    assert re.search(r"\.table \{ overflow-x: auto }", benign.contents["style"][0])


def test_a_page_is_small_with_a_script_that_draws_all_its_traces(tmp_path, benign):
    assert (make_run(tmp_path / "run").path.parent).is_dir()
    write_report([RunFolder(tmp_path / "run")], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 0.7e6
    assert {trace["type"] for trace in traces(benign)} == {"scatter", "bar"}
    # The script is of the version whose figures Python writes.
    version = f"plotly.js (basic - minified) v{get_plotlyjs_version()}"
    packed = [script for script in benign.contents["script"] if script.startswith("H4sI")]
    assert [version in gzip.decompress(base64.b64decode(script)).decode() for script in packed] == [True]


def unfinished(folder: RunFolder) -> None:
    folder.summary.unlink()


def without_evaluations(folder: RunFolder) -> None:
    unfinished(folder)
    folder.evaluations.unlink()
    folder.samples.unlink()


def without_metrics(folder: RunFolder) -> None:
    unfinished(folder)
    folder.metrics.unlink()


def just_started(folder: RunFolder) -> None:
    without_evaluations(folder)
    folder.metrics.unlink()


def cut_short(folder: RunFolder) -> None:
    unfinished(folder)
    for path in (folder.metrics, folder.evaluations, folder.samples):
        path.write_text(path.read_text()[:-7])


def after_one_update(folder: RunFolder) -> None:
    without_evaluations(folder)
    folder.metrics.unlink()
    append_jsonl(folder.metrics, metrics_row(1))


def with_infinite_metrics(folder: RunFolder) -> None:
    row = metrics_row(ROLLOUTS * UPDATES_PER_ROLLOUT)
    append_jsonl(folder.metrics, {**row, "ratio/max": float("inf"), "reward": float("nan")})


@pytest.mark.parametrize(
    ("change", "rollouts", "state", "figures"),
    [
        (unfinished, "3 of 3", "not finished", 5),
        (without_evaluations, "3 of 3", "not measured", 5),
        (without_metrics, "0 of 3", "not finished", 1),
        (just_started, "0 of 3", "not measured", 0),
        (cut_short, "3 of 3", "not finished", 5),
        (after_one_update, "1 of 3", "not measured", 5),
        (with_infinite_metrics, "3", "0.250 [0.000, 0.500]", 5),
    ],
)
def test_a_run_in_any_state_has_a_report_with_figures_of_what_it_measured(tmp_path, change, rollouts, state, figures):
    folder = make_run(tmp_path / "run")
    change(folder)
    page = report_of(folder)
    assert rollouts in page.cells[:9]
    assert state in page.cells[:9]
    assert len(page.figures) == figures


def test_a_run_of_verl_says_what_its_rows_are_of(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    note = "verl logs the updates of a rollout together"
    assert note not in render([read_run(folder)])
    write_json(folder.info, {**json.loads(folder.info.read_text()), "engine": {"verl": "0.9.1", "ray": "2.60.0"}})
    page = render([read_run(folder)])
    assert note in page
    assert "at the last update of each rollout" not in page
    assert "π/μ of the sampled tokens as the mean over the updates of each rollout" in page


def verl_log(path: Path) -> Path:
    """What verl's logger "file" writes of a validation before training and three rollouts."""
    histogram = {f"actor/weight_histogram/{index:03d}": 0.0 for index in range(len(WEIGHT_EDGES) + 1)}
    middle = len(histogram) // 2
    histogram |= {f"actor/weight_histogram/{middle:03d}": 30.25, f"actor/weight_histogram/{middle - 5:03d}": 10.0}
    rows: list[dict[str, Any]] = [{"step": 0, "data": {"val-core/aime24/acc/mean@16": 0.125}}]
    for step in (1, 2, 3):
        metrics = {"actor/divergence/mean": 1e-4 * step, "actor/ratio/mean": 1.0, "actor/ratio/max": 2.0}
        rollout = {"critic/score/mean": 0.25 * step, "timing_s/step": 2.0, "actor/grad_norm": 0.5}
        rows.append({"step": step, "data": metrics | rollout | histogram})
    rows[-1]["data"]["val-core/aime24/acc/mean@16"] = 0.75
    append_jsonl(path, *rows)
    return path


def test_a_log_of_main_ppo_has_a_page_without_a_run_folder(tmp_path: Path) -> None:
    run = read_verl_log(verl_log(tmp_path / "qwen3.jsonl"))
    assert run.series("reward") == ([1, 2, 3], [0.25, 0.5, 0.75])
    assert run.series("verl/val-core/aime24/acc/mean@16") == ([0, 3], [0.125, 0.75])
    # 30.25 and 10 are the means over a rollout's updates, in each of three rollouts.
    assert sum(run.histogram("weight_histogram")) == 3 * (30 + 10)
    assert CliRunner().invoke(app, ["report", str(tmp_path / "qwen3.jsonl")]).exit_code == 0
    page = parse((tmp_path / "qwen3.html").read_text())
    assert {f"{tmp_path.name}/qwen3", "3", "6", "not logged"} <= set(page.cells)
    for heading in (
        "Reward and held-out accuracy",
        "Validation by verl",
        "Distance from the behaviour policy",
        "Ratio",
    ):
        assert heading in page.text
    assert "as the mean over the updates of each rollout" in page.text
    both = CliRunner().invoke(
        app,
        [
            "report",
            str(tmp_path / "qwen3.jsonl"),
            str(make_run(tmp_path / "run").path),
            "--output",
            str(tmp_path / "both.html"),
        ],
    )
    assert both.exit_code == 0


@pytest.mark.parametrize(
    "text",
    ['{"update": 1}\n', '{"step": "1", "data": {}}\n', '{"step": true, "data": {}}\n', '{"step": -1, "data": {}}\n'],
)
def test_a_file_that_is_no_log_of_verl_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(
        UserError, match=r"log\.jsonl, row 1: has no step and data; expected a log of verl's logger file"
    ):
        read_verl_log(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "data": {"actor/weight_histogram/-1": 2.0}}\n')
    with pytest.raises(UserError, match=r"row 1: actor/weight_histogram/-1 is no bin"):
        read_verl_log(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(UserError, match="has no rows"):
        read_verl_log(tmp_path / "log.jsonl")


def test_weights_of_no_token_have_no_figure(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    folder.metrics.unlink()
    append_jsonl(folder.metrics, *({**row, "weight_histogram": [0] * len(row["weight_histogram"])} for row in rows))
    assert not weight_distribution([read_run(folder)]).data


def test_what_is_no_number_in_a_log_of_verl_is_left_out(tmp_path: Path) -> None:
    text = '{"step": 1, "data": {"timing_s/step": null, "critic/score/mean": 0.5, "actor/loss": NaN, "note": "x"}}\n'
    (tmp_path / "log").write_text(text)
    run = read_verl_log(tmp_path / "log")
    assert run.metrics == [{"update": 1, "rollout": 1, "reward": 0.5}]


def test_a_run_that_logged_no_histograms_has_a_page_without_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    folder.metrics.unlink()
    append_jsonl(folder.metrics, *({k: v for k, v in row.items() if "histogram" not in k} for row in rows))
    page = parse(render([read_run(folder)]))
    assert "Ratio" in page.text
    assert "Gradient weights" not in page.text


@pytest.mark.parametrize("missing", ["run.json", "recipe.yaml"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, missing):
    folder = make_run(tmp_path / "run")
    (folder.path / missing).unlink()
    with pytest.raises(UserError, match=r"is not a run folder \(it has no run\.json and recipe\.yaml\)"):
        write_report([folder], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("name", ["page.txt", "page", "run/metrics.jsonl", "html"])
def test_an_output_that_is_no_page_is_refused_and_left_alone(tmp_path, name):
    folder = make_run(tmp_path / "run")
    before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
    with pytest.raises(UserError, match=r"expected a name that ends in \.html"):
        write_report([folder], tmp_path / name)
    assert ((tmp_path / name).read_bytes() if (tmp_path / name).exists() else None) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: run.metrics.write_text("{\n{}\n"),
        lambda run: run.metrics.write_text("3\n"),
        lambda run: run.metrics.write_text("{}\n"),
        lambda run: append_jsonl(run.metrics, {**metrics_row(13), "weight_histogram": [1, 2]}),
        lambda run: append_jsonl(run.evaluations, {"rollout": 3, "completions": 2, "correct": [1, "1"]}),
        lambda run: run.samples.write_bytes(b"\xff\n"),
        lambda run: run.info.write_text(""),
        lambda run: run.summary.write_text("[]"),
        lambda run: run.recipe.write_text("model: 3\n"),
    ],
    ids=[
        "not JSON",
        "no object",
        "no rollout",
        "short histogram",
        "counts",
        "no UTF-8",
        "empty",
        "a list",
        "no recipe",
    ],
)
def test_a_damaged_run_is_refused_in_one_line_that_names_it(tmp_path, damage):
    folder = make_run(tmp_path / "run")
    damage(folder)
    with pytest.raises(UserError) as error:
        write_report([folder], tmp_path / "page.html")
    assert str(folder.path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Callable[..., tuple[Page, list[str]]]:
    """Write the report of run folders and open it: the page after its scripts ran, and what the console says."""
    if BROWSER is None:
        pytest.skip("no Chromium on PATH to open a report in")
    profile = tmp_path_factory.mktemp("profile")

    def open_report(*folders: RunFolder) -> tuple[Page, list[str]]:
        target = folders[0].path.parent / "page.html"
        write_report(folders, target)
        document, console = opened_in_browser(target, profile)
        return parse(document), console

    return open_report


def classes(page: Page) -> Counter[str]:
    return Counter(name for value in page.attributes("class") for name in value.split())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, opened) -> dict[int, tuple[Page, list[str]]]:
    """By the number of their runs, pages of harmless text."""
    folder = tmp_path_factory.mktemp("drawn")
    return {count: opened(*(make_run(folder / f"{count}" / f"run {n}") for n in range(count))) for count in (1, 3)}


@pytest.mark.parametrize("runs", [1, 3])
def test_a_browser_draws_the_five_figures_and_the_samples(drawn, runs):
    page, console = drawn[runs]
    assert console == []
    assert classes(page)["js-plotly-plot"] == 5
    assert classes(page)["main-svg"] >= 5
    # 2 lines of learning, 3 of divergence, 2 of the ratio, 2 x 4 of effects; and one of δ = 0.2, which all runs have
    assert classes(page)["scatter"] == 15 * runs + 1
    assert page.cells.count("17+25-8+34=") == 2 * runs


@pytest.mark.parametrize(("change", "figures"), [(without_metrics, 1), (just_started, 0), (after_one_update, 5)])
def test_a_browser_draws_the_figures_of_a_young_run(tmp_path, opened, change, figures):
    folder = make_run(tmp_path / "run")
    change(folder)
    page, console = opened(folder)
    assert console == []
    assert classes(page)["js-plotly-plot"] == figures


def test_a_legend_shows_the_name_of_a_run_as_it_is(tmp_path, opened):
    names = ["<b>bold<b>", "a<br>b", "&lt;i&gt;", "x<sub>2<sub>"]
    page, _ = opened(*(make_run(tmp_path / name) for name in names))
    for name in names:
        assert f"{name}: training reward" in page.contents["text"]


def test_a_browser_makes_no_element_of_hostile_text_and_runs_none_of_it(tmp_path, opened, drawn):
    expected, _ = drawn[3]
    folders = [make_run(tmp_path / "hostile" / as_name(payload), payload) for payload in PAYLOADS]
    page, console = opened(*folders)
    assert console == []
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in expected.elements}
    names = {name for _, given in expected.elements for name, _ in given}
    assert {name for _, given in page.elements for name, _ in given} <= names
    assert "href" not in names
    assert classes(page)["js-plotly-plot"] == 5
    assert page.contents["title"][0].endswith(" - drpo report")


def test_evaluations_of_the_trained_model_are_listed(tmp_path):
    folder = make_run(tmp_path / "run", text="transformers")
    cells = parse(render([read_run(folder)])).cells
    row = ["run", "aime24", "30", "16", "0.500 [0.250, 0.750]", "0.875 [0.750, 1.000]", "0.500 [0.250, 0.750]"]
    start = cells.index("aime24") - 1
    assert cells[start : start + 10] == [*row, "0.125", "0.0625", "transformers transformers, transformers"]
    (folder.evaluated / "aime24" / "evaluation.json").write_text('{"average": 1}')
    with pytest.raises(UserError, match=r"aime24/evaluation.json: expected average"):
        read_run(folder)


def test_the_distance_is_listed_by_its_origin_where_it_was_measured(tmp_path: Path) -> None:
    folder, plain = make_run(tmp_path / "run"), make_run(tmp_path / "plain")
    folder.metrics.unlink()
    for update in range(1, ROLLOUTS * UPDATES_PER_ROLLOUT + 1):
        parts = {"engine/divergence/mean": 1e-7, "engine/divergence/p99": 2e-7, "engine/divergence/max": update * 1e-6}
        append_jsonl(folder.metrics, {**metrics_row(update), **parts})
    cells = parse(render([read_run(folder), read_run(plain)])).cells
    start = cells.index("engine")
    # The last update of the last of three rollouts is the twelfth.
    assert cells[start - 1 : start + 5] == ["run", "engine", "1e-07", "1e-07", "2e-07", "1.2e-05"]
    assert not {"age", "updates"} & set(cells)
    assert "Distance by origin" not in parse(render([read_run(plain)])).text
