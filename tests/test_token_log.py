"""What a run records of its completions, and what its report shows of them."""

from __future__ import annotations

import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from drpo.files import read_jsonl
from drpo.report import write_report
from drpo.report.tokens import changed_most, effect_of, marked_completion
from drpo.run.folder import RunFolder
from drpo.run.recipe import load_recipe
from drpo.run.train import train

SETTINGS = ["rollouts=1", "prompts_per_rollout=4", "num_generations=4", "heldout_problems=2", "record_rollouts=true"]


class Marks(HTMLParser):
    """Collects the text of each marked token by its effect."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str]] = []
        self._effect: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self._effect = attributes["class"] if tag == "mark" and "title" in attributes else None

    def handle_data(self, data: str) -> None:
        if self._effect:
            self.tokens.append((self._effect, data))
            self._effect = None


def test_a_completion_reaches_the_run_folder_and_its_changed_tokens_the_report(tmp_path: Path) -> None:
    # With a δ this small the third and fourth update find tokens at and beyond the edge.
    recipe = load_recipe(None, [*SETTINGS, "objective.delta=0.001", "learning_rate=0.001"])
    folder = RunFolder(tmp_path / "run")
    train(recipe, folder)
    rows = read_jsonl(folder.rollouts)
    for row in rows:
        assert row["prompt"].endswith("=")
        assert "".join(row["text"]) == row["completion"]
        assert row["reward"] in (0.0, 1.0)
        # w = 1 − sign(A(r − 1))·|π − μ| / δ = 1 − sign(A)·(π − μ) / δ
        mu, pi = ([math.exp(p) for p in row[name]] for name in ("behavior_logp", "logp"))
        sign = (row["advantage"] > 0) - (row["advantage"] < 0)
        expected = [1 - sign * (p - q) / 0.001 for p, q in zip(pi, mu, strict=True)]
        assert row["weight"] == pytest.approx(expected, abs=2e-3, rel=1e-3)
    write_report([folder], folder.report)
    marks = Marks()
    marks.feed(folder.report.read_text(encoding="utf-8"))
    shown = [
        (effect_of(w), text)
        for row in changed_most(rows)
        for w, text in zip(row["weight"], row["text"], strict=True)
        if effect_of(w)
    ]
    assert marks.tokens == shown != []


def test_the_farthest_weights_come_first_and_unsteered_sequences_never() -> None:
    rows = [
        {"advantage": 1.0, "weight": [1.0, 0.5]},
        {"advantage": 0.0, "weight": [-9.0]},
        {"advantage": -1.0, "weight": [1.0, -2.0]},
        {"advantage": 1.0, "weight": [1.0]},
    ]
    assert changed_most(rows) == [rows[2], rows[0]]


@pytest.mark.parametrize(
    ("weight", "effect"), [(1.0005, None), (0.5, "attenuated"), (0.0, "zeroed"), (-0.1, "reversed"), (1.2, "amplified")]
)
def test_an_effect_has_the_name_that_metrics_give_it(weight: float, effect: str | None) -> None:
    assert effect_of(weight) == effect


def test_nothing_of_a_completion_is_markup() -> None:
    payload = "<img src=x onerror=alert(1)>\"'</mark></pre><script>"
    row = {"rollout": 1, "reward": 1.0, "advantage": 1.0, "prompt": payload, "text": [payload, payload]}
    html = marked_completion({**row, "weight": [1.0, 0.0], "logp": [-1.0, -1.0], "behavior_logp": [-1.0, -2.0]})
    assert set(re.findall(r"<(\w+)", html)) == {"p", "pre", "mark"}
    assert unescape(html).count(payload) == 3
