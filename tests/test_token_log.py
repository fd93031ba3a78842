"""What a run records of its completions, and what its report shows of them."""

from __future__ import annotations

import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from drpo.files import read_jsonl
from drpo.metrics.effects import KINDS, kinds
from drpo.report import write_report
from drpo.report.tokens import WeighedCompletion, read_trained_tokens
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
        (effect, text)
        for completion in read_trained_tokens(rows).completions
        for weight, text in zip(completion.weight, completion.text, strict=True)
        if (effect := effect_of(weight))
    ]
    assert marks.tokens == shown != []


def effect_of(weight: float) -> str | None:
    kind = int(kinds(torch.tensor(weight)))
    return KINDS[kind] if kind else None


def weighed(advantage: float, texts: str, *weights: float) -> dict[str, Any]:
    """A row of rollouts.jsonl, a letter a token."""
    numbers = {"logp": [-1.0] * len(weights), "behavior_logp": [-1.0] * len(weights)}
    row = {"rollout": 1, "reward": 1.0, "prompt": "", "advantage": advantage}
    return {**row, **numbers, "text": list(texts), "weight": list(weights)}


def test_the_farthest_weights_come_first_and_unsteered_sequences_never() -> None:
    rows = [
        weighed(1.0, "ab", 1.0, 0.5),
        weighed(0.0, "c", -9.0),
        weighed(-1.0, "de", 1.0, -2.0),
        weighed(1.0, "f", 1.0),
    ]
    assert [completion.text for completion in read_trained_tokens(rows).completions] == [["d", "e"], ["a", "b"]]


def test_texts_are_in_the_order_of_how_often_they_are_outside_and_then_of_how_often_they_are_changed() -> None:
    rows = [weighed(1.0, "aabbbcd", 0.5, 0.5, 0.0, -1.0, 1.0, 0.0, 1.0), weighed(0.0, "ddd", 0.0, 0.0, 0.0)]
    texts = read_trained_tokens(rows).texts
    # Of b one is zeroed and one reversed; of c one is zeroed; both a are attenuated; d counts only where nothing changes it.
    assert [(text.label, text.tokens, text.outside) for text in texts] == [
        ("b", 3, pytest.approx(2 / 3)),
        ("c", 1, 1.0),
        ("a", 2, 0.0),
    ]
    assert texts[2].shares["attenuated"] == 1.0


def test_trained_tokens_are_grouped_by_sign_probability_and_position() -> None:
    row = weighed(1.0, "abcde", 1.0, 1.0, 1.0, 0.5, 0.0)
    row["behavior_logp"] = [math.log(probability) for probability in (0.95, 0.95, 0.05, 0.05, 0.05)]
    by = read_trained_tokens([row, {**row, "advantage": -1.0}, {**row, "advantage": 0.0}]).by
    outside = {name: [(group.label, group.tokens, group.outside) for group in groups] for name, groups in by.items()}
    assert outside == {
        "sign of the advantage": [("A > 0", 5, 0.2), ("A < 0", 5, 0.2)],
        "probability of the token": [("μ 0.01 to 0.1", 6, pytest.approx(1 / 3)), ("μ 0.9 to 1", 4, 0.0)],
        "position among the tokens that count": [("1 to 4", 8, 0.0), ("5 to 16", 2, 1.0)],
    }


def test_nothing_of_a_completion_is_markup() -> None:
    payload = "<img src=x onerror=alert(1)>\"'</mark></pre><script>"
    completion = WeighedCompletion(payload, payload, [payload, payload], [1.0, 0.0], [-1.0, -1.0], [-1.0, -2.0])
    html = completion.to_html()
    assert set(re.findall(r"<(\w+)", html)) == {"p", "pre", "mark"}
    assert unescape(html).count(payload) == 4
