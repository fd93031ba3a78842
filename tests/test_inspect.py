"""drpo inspect: rollouts of any framework give the numbers that their run logged, and mistakes in them are one line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drpo.errors import UserError
from drpo.files import append_jsonl, read_jsonl
from drpo.inspect.analyze import Inspection, analyse
from drpo.inspect.figures import distances, outside
from drpo.inspect.page import render
from drpo.inspect.read import read_rollouts
from drpo.inspect.region import DELTAS
from drpo.objectives import OBJECTIVES, make_objective
from support.browser import BROWSER, opened
from test_cli import drpo, here, refusal  # noqa: F401
from test_report import parse
from test_train import sets


def log(*probs: float) -> list[float]:
    return [math.log(p) for p in probs]


# |π − μ| 0.2, 0.1 and, moving back, 0.1; then 0.4
ROWS: list[dict[str, Any]] = [
    {"logp": log(0.6, 0.3, 0.2), "behavior_logp": log(0.4, 0.2, 0.3), "advantage": 2.0},
    {"logp": log(0.4), "behavior_logp": log(0.8), "advantage": -1.0},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def inspected(path: Path, share: float = 0.25, **chosen: str) -> Inspection:
    objectives = {name: make_objective(name) for name in OBJECTIVES} | {"drpo": make_objective("drpo", delta=0.2)}
    return analyse(path.name, read_rollouts(path, chosen, "mean"), objectives, share, "drpo")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rollouts_are_measured_as_worked_by_hand(tmp_path: Path, ending: str) -> None:
    found = inspected(write(tmp_path / f"rollouts.{ending}", ROWS), share=0.5)
    assert (found.format, found.sequences, found.tokens, found.steered, found.away) == ("drpo", 2, 4, 1.0, 0.75)
    assert found.measured["divergence/mean"] == pytest.approx((0.2 + 0.1 + 0.1 + 0.4) / 4, rel=1e-5)
    assert found.measured["divergence/mean_negative"] == pytest.approx(0.4, rel=1e-5)
    # 1 − 0.2/0.2, 1 − 0.1/0.2, 1 + 0.1/0.2 and 1 − 0.4/0.2
    shares = {"unchanged": 0.0, "zeroed": 0.25, "attenuated": 0.25, "amplified": 0.25, "reversed": 0.25}
    assert found.what_if["drpo"].effects == shares
    assert found.what_if["drpo"].scalars["weight/mean"] == pytest.approx((0 + 0.5 + 1.5 - 1) / 4, abs=1e-5)
    # Two of the four tokens have moved away by 0.2 or more, one by 0.4, three at all.
    assert found.delta[0.5] == pytest.approx(0.2, rel=1e-5)
    assert inspected(tmp_path / f"rollouts.{ending}", share=0.25).delta[0.25] == pytest.approx(0.4, rel=1e-5)
    assert inspected(tmp_path / f"rollouts.{ending}", share=0.9).delta[0.9] is None


def test_every_objective_is_there_or_it_says_why_not(tmp_path: Path) -> None:
    rows = [{**row, "old_logp": row["behavior_logp"]} for row in ROWS]
    with_old, without = inspected(write(tmp_path / "a.jsonl", rows)), inspected(write(tmp_path / "b.jsonl", ROWS))
    for found in (with_old, without):
        assert {*found.what_if, *found.not_computed} == set(OBJECTIVES)
        assert len(found.what_if) + len(found.not_computed) == len(OBJECTIVES)
    assert "likeliest tokens" in without.not_computed["drpo_topk"]
    assert "no column for old_logp" in without.not_computed["icepop"]
    assert "icepop" in with_old.what_if
    assert (without.what_if["ppo"].ratio, with_old.what_if["ppo"].ratio) == ("π/μ", "π/π_old")
    assert without.what_if["ppo"].note
    assert not with_old.what_if["ppo"].note


def test_an_objective_anchored_on_the_old_policy_takes_its_ratio_against_it(tmp_path: Path) -> None:
    # π/μ = 2 would be clipped, π/π_old = 1.1 is not.
    row = {"logp": log(0.22), "behavior_logp": log(0.11), "old_logp": log(0.2), "advantage": 1.0}
    found = inspected(write(tmp_path / "rollouts.jsonl", [row]))
    assert found.what_if["ppo"].effects["unchanged"] == 1
    assert found.measured["ratio/mean"] == pytest.approx(2, rel=1e-5)


# A completion of one phrase between tags whose probability rose by 0.15, and of words that moved by 0.02.
TAGGED = {
    "logp": log(0.65, 0.42, 0.32, 0.55),
    "behavior_logp": log(0.5, 0.4, 0.3, 0.4),
    "text": ["<answer>", "so", "4", "</answer>"],
}


def test_the_region_says_which_texts_each_delta_hits(tmp_path: Path) -> None:
    rows = [{**TAGGED, "advantage": 1.0}] * 3 + [{**TAGGED, "advantage": -1.0}, {**TAGGED, "advantage": 0.0}]
    rollouts = read_rollouts(write(tmp_path / "rollouts.jsonl", rows), {}, "mean")
    region = analyse("", rollouts, {"ipo": make_objective("ipo", delta=0.1)}, 0.1, "ipo").region
    by_delta = {hits.delta: hits for hits in region.deltas}
    assert set(by_delta) == set(DELTAS)
    # Of the 16 tokens with A ≠ 0, half are tags; with ipo both signs are masked.
    assert by_delta[0.1] == region.hits
    assert (region.hits.all.tokens, region.hits.all.outside) == (16, 0.5)
    assert [(text.label, text.tokens, text.outside) for text in region.hits.texts] == [
        ("<answer>", 4, 1.0),
        ("</answer>", 4, 1.0),
    ]
    assert by_delta[0.2].all.outside == 0
    assert by_delta[0.01].all.outside == 1
    assert [(g.label, g.tokens, g.outside) for g in region.hits.by["probability of the token"]] == [
        ("μ 0.1 to 0.5", 16, 0.5)
    ]
    assert [(g.label, g.tokens) for g in region.hits.by["sign of the advantage"]] == [("A > 0", 12), ("A < 0", 4)]
    positions = [(g.label, g.tokens, g.outside) for g in region.hits.by["position among the tokens that count"]]
    assert positions == [("1 to 4", 16, 0.5)]
    assert [completion.title for completion in region.completions[:1]] == ["Row 1, advantage 1"]


def test_tokens_are_grouped_by_their_position_among_those_that_count(tmp_path: Path) -> None:
    # The fifth and the last of seven tokens that count are outside; one that does not count comes first.
    probabilities = {"logp": log(*[0.5] * 5, 0.9, 0.5, 0.9), "behavior_logp": log(*[0.5] * 8)}
    row = {**probabilities, "mask": [0, *[1] * 7], "advantage": 1.0}
    rollouts = read_rollouts(write(tmp_path / "rollouts.jsonl", [row]), {}, "mean")
    region = analyse("", rollouts, {"dppo_tv": make_objective("dppo_tv")}, 0.1, "dppo_tv").region
    groups = [(g.label, g.tokens, g.outside) for g in region.hits.by["position among the tokens that count"]]
    assert groups == [("1 to 4", 4, 0.0), ("5 to 16", 3, pytest.approx(2 / 3))]


def test_the_texts_outside_are_ranked_by_sign_with_their_share_of_what_is_outside(here: Path, drpo: Any) -> None:  # noqa: F811
    # As at prime-rl: of the tokens with A > 0 outside at 0.1, most are tags, which have moved by 0.15; with A < 0 words are.
    word = {"logp": log(0.65, 0.42), "behavior_logp": log(0.5, 0.4), "text": ["so", "4"], "advantage": 1.0}
    falling = {"logp": log(0.3, 0.42), "behavior_logp": log(0.5, 0.4), "text": ["no", "4"], "advantage": -1.0}
    write(here / "rollouts.jsonl", [*[{**TAGGED, "advantage": 1.0}] * 4, *[word] * 2, *[falling] * 3])
    drpo("inspect", "rollouts.jsonl", "--choose-delta", "--objective", "dppo_tv", "--json", "numbers.json")
    at = {hits["delta"]: hits for hits in json.loads((here / "numbers.json").read_text())["region"]["deltas"]}
    positive, negative = (at[0.1]["texts_by_sign"][sign] for sign in ("A > 0", "A < 0"))
    # 4 and 4 tags and 2 of the 6 "so", 10 in all.
    assert [(t["label"], t["tokens"], round(t["outside"] * t["tokens"])) for t in positive[:3]] == [
        ("<answer>", 4, 4),
        ("</answer>", 4, 4),
        ("so", 6, 2),
    ]
    assert [(t["label"], t["outside"]) for t in negative[:1]] == [("no", 1.0)]
    assert all(not text["outside"] for text in at[0.2]["texts_by_sign"]["A > 0"])
    page = (here / "rollouts.html").read_text(encoding="utf-8")
    assert "&#x27;&lt;answer&gt;&#x27; 40% (4 of 4)" in page


@pytest.mark.parametrize("name", ["mask_drpo_region", "cispo"])
def test_a_token_is_outside_where_its_region_says_so_whatever_its_weight(tmp_path: Path, name: str) -> None:
    # π/μ is 1.3 to 1.375 at the tags, |π − μ| 0.15: their weights stay above 0.
    given = {"region_delta": 0.14} if name == "mask_drpo_region" else {}
    rollouts = read_rollouts(write(tmp_path / "rollouts.jsonl", [{**TAGGED, "advantage": 1.0}]), {}, "mean")
    hits = analyse("", rollouts, {name: make_objective(name, **given)}, 0.1, name).region.hits
    assert hits.all.outside == 0.5
    assert hits.all.shares["zeroed"] == hits.all.shares["reversed"] == 0


def test_the_delta_of_a_region_is_the_one_that_bounds_it(tmp_path: Path) -> None:
    rollouts = read_rollouts(write(tmp_path / "rollouts.jsonl", [{**TAGGED, "advantage": 1.0}]), {}, "mean")
    objective = make_objective("mask_drpo_region", region_delta=0.1, delta=0.12)
    region = analyse("", rollouts, {"mask_drpo_region": objective}, 0.1, "mask_drpo_region").region
    by_delta = {hits.delta: hits.all.outside for hits in region.deltas}
    assert (region.hits.delta, by_delta[0.1], by_delta[0.2]) == (0.1, 0.5, 0.0)


def test_rollouts_without_an_advantage_hit_nothing(here: Path, drpo: Any) -> None:  # noqa: F811
    write(here / "rollouts.jsonl", [{**TAGGED, "advantage": 0.0}])
    printed = drpo("inspect", "rollouts.jsonl", "--choose-delta", "--objective", "ipo")[1]
    row = next(line for line in printed.splitlines() if line.split()[:1] == ["0.1"])
    assert set(row.split()[1:]) == {"–"}


def test_strength_by_delta_is_what_the_regulariser_takes_from_the_policy_gradient(tmp_path: Path) -> None:
    rollouts = read_rollouts(write(tmp_path / "rollouts.jsonl", [{**TAGGED, "advantage": 1.0}]), {}, "mean")
    hits = analyse("", rollouts, {"drpo": make_objective("drpo", delta=0.3)}, 0.1, "drpo").region.hits
    ratios, weights = (1.3, 1.05, 0.32 / 0.3, 1.375), (1 - 0.15 / 0.3, 1 - 0.02 / 0.3, 1 - 0.02 / 0.3, 1 - 0.15 / 0.3)
    expected = sum(r * (1 - w) for r, w in zip(ratios, weights, strict=True)) / sum(ratios)
    assert hits.strength == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ({"text": ["a", "b", "c"]}, {"a", "c"}),
        ({"tokens": [7, 8, 9]}, {"⟨7⟩", "⟨9⟩"}),
        ({"tokens": [7, 8, 9], "text": ["a", "b", "c"]}, {"a", "c"}),
        ({}, set()),
    ],
)
def test_a_token_is_called_by_its_text_or_its_id(tmp_path: Path, columns: dict[str, Any], labels: set[str]) -> None:
    row = {"logp": log(0.9, 0.5, 0.9), "behavior_logp": log(0.5, 0.5, 0.5), "mask": [1, 0, 1], "advantage": 1.0}
    rollouts = read_rollouts(write(tmp_path / "rollouts.jsonl", [{**row, **columns}]), {}, "mean")
    region = analyse("", rollouts, {"drpo": make_objective("drpo", delta=0.2)}, 0.1, "drpo").region
    assert {text.label for text in region.hits.texts} == labels
    assert len(region.completions) == bool(labels)


def test_choose_delta_prints_the_texts_outside_at_each_delta(here: Path, drpo: Any) -> None:  # noqa: F811
    write(here / "rollouts.jsonl", [{**TAGGED, "advantage": 1.0}])
    printed = drpo("inspect", "rollouts.jsonl", "--choose-delta", "--objective", "ipo")[1]
    row = next(line for line in printed.splitlines() if line.split()[:1] == ["0.1"])
    assert row.split()[1] == "0.5"
    assert "'<answer>' 50% (1 of 1)" in " ".join(printed.split())


HOSTS: dict[str, dict[str, Any]] = {
    "verl": {
        "old_log_probs": [*ROWS[0]["logp"], 0.0],
        "rollout_log_probs": [*ROWS[0]["behavior_logp"], 0.0],
        "response_mask": [1, 1, 1, 0],
        "advantages": [2.0, 2.0, 2.0, 0.0],
        "responses": [5, 6, 7, 0],
    },
    "TRL": {
        "per_token_logps": [*ROWS[0]["logp"], 0.0],
        "sampling_per_token_logps": [*ROWS[0]["behavior_logp"], 0.0],
        "completion_mask": [1, 1, 1, 0],
        "completion_ids": [5, 6, 7, 0],
        "advantages": 2.0,
    },
    "drpo": {**ROWS[0], "length": 3},
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_names_of_a_host_are_recognised_and_its_padding_left_out(tmp_path: Path, host: str, ending: str) -> None:
    found = inspected(write(tmp_path / f"dump.{ending}", [HOSTS[host]]))
    assert (found.format, found.tokens) == (host, 3)
    assert found.measured["divergence/mean"] == pytest.approx((0.2 + 0.1 + 0.1) / 3, rel=1e-5)
    assert found.measured["divergence/mean_positive"] == pytest.approx((0.2 + 0.1 + 0.1) / 3, rel=1e-5)


def test_the_numbers_are_those_of_numpy_in_fp64(here: Path, drpo: Any) -> None:  # noqa: F811
    rng = np.random.default_rng(3)
    rows, kept = [], []
    for _ in range(200):
        size = rng.integers(1, 80)
        behavior_logp = np.log(rng.beta(1, 0.5, size)).clip(-15, -1e-4)
        log_probs = [behavior_logp, *((behavior_logp + rng.normal(0, s, size)).clip(max=0) for s in (0.1, 0.4))]
        # The file has what fp32 can say, so that reading it rounds nothing.
        mu, old, pi = (values.astype(np.float32).astype(np.float64) for values in log_probs)
        advantage = rng.choice([-2.0, -0.5, 0.0, 1.0, 3.0], size) if rng.random() < 0.5 else np.full(size, 1.5)
        mask = rng.random(size) < 0.8
        rows.append(
            {"pi": pi.tolist(), "mu": mu.tolist(), "old": old.tolist(), "A": advantage.tolist(), "m": mask.tolist()}
        )
        kept.append(np.stack([pi, mu, old, advantage])[:, mask])
    write(here / "rollouts.jsonl", rows)
    columns = {"logp": "pi", "behavior_logp": "mu", "old_logp": "old", "advantage": "A", "mask": "m"}
    named = [word for field, name in columns.items() for word in ("--column", f"{field}={name}")]
    drpo("inspect", "rollouts.jsonl", *named, "--set", "drpo.delta=0.2", "--share", "0.02", "--json", "found.json")
    found = json.loads((here / "found.json").read_text())

    log_pi, log_mu, log_old, advantage = np.concatenate(kept, axis=1)
    shift, sign, steered = np.exp(log_pi) - np.exp(log_mu), np.sign(advantage), advantage != 0
    ratio, ratio_old = np.exp(log_pi - log_mu), np.exp(log_pi - log_old)
    away = sign * shift > 0
    is_clipped = ((advantage > 0) & (ratio_old > 1.28)) | ((advantage < 0) & (ratio_old < 0.8))
    weights = {
        "drpo": (1 - sign * shift / 0.2, ratio),
        "ppo": (np.where(is_clipped, 0.0, 1.0), ratio_old),
        "dppo_tv": (np.where(away & (np.abs(shift) > 0.15), 0.0, 1.0), ratio),
    }
    close = {"rel": 1e-6, "abs": 1e-6}
    assert (found["tokens"], found["away"]) == (len(shift), pytest.approx(away.mean(), **close))
    assert found["measured"]["divergence/mean"] == pytest.approx(np.abs(shift).mean(), **close)
    assert found["measured"]["divergence/max"] == pytest.approx(np.abs(shift).max(), **close)
    assert found["measured"]["ratio/mean"] == pytest.approx(ratio.mean(), **close)
    for name, (weight, of) in weights.items():
        what, w = found["what_if"][name], weight[steered]
        assert what["effects"]["zeroed"] == pytest.approx((np.abs(w) <= 1e-3).mean(), **close)
        assert what["effects"]["reversed"] == pytest.approx((w < -1e-3).mean(), **close)
        assert what["scalars"]["weight/mean"] == pytest.approx(w.mean(), **close)
        plain = np.abs(advantage[steered]) * of[steered]
        strength = (plain * np.abs(w - 1)).sum() / plain.sum()
        assert what["scalars"]["regulariser/strength"] == pytest.approx(strength, **close)
    assert found["what_if"]["drpo"]["effects"]["reversed"] > 0.01
    assert found["what_if"]["ppo"]["effects"]["zeroed"] > found["what_if"]["dppo_tv"]["effects"]["zeroed"] > 0.01
    farthest = np.sort(np.abs(shift[away]))[::-1]
    for share in (0.001, 0.01, 0.02, 0.05, 0.1):
        assert found["delta"][str(share)] == pytest.approx(farthest[round(share * len(shift)) - 1], **close)


def test_columns_can_be_named(tmp_path: Path) -> None:
    row = {"pi": ROWS[0]["logp"], "mu": ROWS[0]["behavior_logp"], "a": 2.0, "n": 2}
    path = write(tmp_path / "rollouts.jsonl", [row])
    assert inspected(path, logp="pi", behavior_logp="mu", advantage="a", length="n").tokens == 2


def test_rewards_become_advantages_within_their_group_and_step(tmp_path: Path) -> None:
    rows = [
        {"logp": log(0.5), "behavior_logp": log(0.4), "reward": reward, "group": group, "step": step}
        for group, step, reward in (
            ("a", 1, 1.0),
            ("b", 1, 3.0),
            ("a", 1, 0.0),
            ("b", 1, 3.0),
            ("a", 2, 5.0),
            ("a", 2, 6.0),
        )
    ]
    rollouts = read_rollouts(write(tmp_path / "rollouts.jsonl", rows), {}, "mean")
    assert rollouts.advantage.tolist() == [0.5, 0, -0.5, 0, -0.5, 0.5]
    assert (rollouts.advantage_from, rollouts.groups) == ("reward", 3)


@pytest.mark.parametrize("steps", [(1, 1, 2), (1, 2, 3)])
def test_a_group_whose_rows_are_spread_over_steps_is_refused_unless_it_says_what_they_share(
    tmp_path: Path, steps: tuple[int, ...]
) -> None:
    row = {"logp": log(0.5), "behavior_logp": log(0.4), "group": "a", "rollout": 1}
    rewards = (0.0, 1.0, 5.0)
    rows = [{**row, "step": step, "reward": reward} for step, reward in zip(steps, rewards, strict=True)]
    path = write(tmp_path / "rollouts.jsonl", rows)
    counted = "2 in step 1, 1 in step 2" if steps == (1, 1, 2) else "1 in step 1, 1 in step 2"
    with pytest.raises(UserError, match=rf"the rows of group 'a' are spread over steps \({counted}\)"):
        read_rollouts(path, {}, "mean")
    assert read_rollouts(path, {"step": "rollout"}, "mean").advantage.tolist() == [-2, -1, 3]


@pytest.mark.parametrize(("field", "value"), [("age", 1), ("old_logp", log(0.4)), ("mask", [1]), ("step", 2)])
@pytest.mark.parametrize("later", [True, False])
def test_a_column_that_only_some_rows_have_is_refused(tmp_path: Path, field: str, value: Any, later: bool) -> None:
    row = {"logp": log(0.5), "behavior_logp": log(0.4), "advantage": 1.0}
    rows = [row, row, {**row, field: value}, *([{**row, field: value}] if later else [])]
    path = write(tmp_path / "rollouts.jsonl", rows if later else rows[::-1])
    with pytest.raises(UserError) as error:
        inspected(path)
    (line, *others) = error.value.lines
    # A column that begins later is one mistake, however many rows have it.
    said = (
        f"row 3: has {field}, which the first row has not" if later else f"row 2: has no {field}, which the first row"
    )
    assert said in line
    assert len(others) == (0 if later else 1)


def test_a_column_that_is_not_read_may_be_in_some_rows(tmp_path: Path) -> None:
    row = {"logp": log(0.5), "behavior_logp": log(0.4), "advantage": 1.0}
    rows = [row, {**row, "reward": 1.0, "note": "x"}, {**row, "group": "a"}]
    for order in (rows, rows[::-1]):
        assert inspected(write(tmp_path / "rollouts.jsonl", order)).tokens == 3


def test_steps_and_ages_are_measured_apart(tmp_path: Path) -> None:
    rows = [{**row, "step": 3 + index, "age": index} for index, row in enumerate(ROWS)]
    found = inspected(write(tmp_path / "rollouts.jsonl", rows))
    for groups, keys in ((found.by_step, [3, 4]), (found.by_age, [0, 1])):
        assert list(groups) == keys
        assert [groups[key]["divergence/max"] for key in keys] == pytest.approx([0.2, 0.4], rel=1e-5)


@pytest.mark.parametrize(("key", "title"), [("step", "Over steps"), ("age", "Age")])
@pytest.mark.parametrize("count", [1, 2, 600])
def test_each_of_several_steps_or_ages_is_a_point(tmp_path: Path, key: str, title: str, count: int) -> None:
    rows = [{"logp": log(0.5), "behavior_logp": log(0.4), "advantage": 1.0, key: index} for index in range(count)]
    rows[0]["logp"] = log(0.9)
    found = inspected(write(tmp_path / "rollouts.jsonl", rows))
    largest = distances(found.by_step if key == "step" else found.by_age, key).data[2]
    assert list(largest.x) == list(range(count))
    assert list(largest.y) == pytest.approx([0.5, *[0.1] * (count - 1)], rel=1e-5)
    assert (f"<h2>{title}</h2>" in render(found)) == (count > 1)


@pytest.mark.parametrize("objective", ["drpo", "gspo"])
def test_the_rollouts_that_a_run_recorded_give_its_own_log(tmp_path: Path, drpo: Any, objective: str) -> None:  # noqa: F811
    run = tmp_path / "run"
    small = {"rollouts": 2, "prompts_per_rollout": 8, "heldout_problems": 1, "learning_rate": 0.0002}
    drpo("train", "--output", str(run), *sets(**small, objective=objective, record_rollouts="true"))
    found = inspected(run / "rollouts.jsonl")
    # An update that nothing had a gradient in left no tokens.
    logged = [row for row in read_jsonl(run / "metrics.jsonl") if "divergence/mean" in row]
    assert list(found.by_step) == [row["update"] for row in logged]
    assert len(logged) > 5
    for row in logged:
        for name, value in found.by_step[row["update"]].items():
            assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    histograms = zip(*(row["weight_histogram"] for row in logged), strict=True)
    recorded = read_rollouts(run / "rollouts.jsonl", {}, "mean")
    own = analyse("", recorded, {objective: make_objective(objective)}, 0.1, objective)
    assert own.what_if[objective].weight_histogram == [sum(column) for column in histograms]
    assert sum(own.what_if[objective].weight_histogram) > 0


MISTAKES: list[tuple[Any, str]] = [
    ({"logp": log(0.5)}, "has no column for behavior_logp"),
    ({**ROWS[0], "logp": log(0.5)}, "row 1: behavior_logp has 3 log-probs; expected 1, as many as the other policy's"),
    ({**ROWS[1], "logp": [0.7]}, "row 1: logp is 0.7 at token 0; expected a log-probability, at most 0"),
    ({**ROWS[1], "logp": [None]}, "row 1: logp is null at token 0; expected a log-probability, at most 0"),
    ({**ROWS[1], "logp": ["-1"]}, "row 1: logp is '-1' at token 0; expected a number"),
    ({**ROWS[1], "logp": -1.0}, "row 1: logp is -1; expected a list of numbers"),
    ({**ROWS[0], "mask": [1, 1]}, "row 1: mask has 2 values; expected 3 of 0 and 1, one for each log-prob"),
    ({**ROWS[0], "length": 4}, "row 1: length is 4; expected at most 3, as many as there are log-probs"),
    ({**ROWS[0], "advantage": [1.0, 2.0]}, "row 1: advantage has 2 values; expected one, or 3, one for each log-prob"),
    (
        {**ROWS[0], "advantage": math.inf},
        "row 1: advantage is inf; expected a number of at most 1e+18 in size, or a list",
    ),
    ({**ROWS[0], "step": 1.5}, "row 1: step is 1.5; expected a whole number, at least 0"),
    ({**ROWS[0], "step": 10**400}, "row 1: step is 1000"),
    ({**ROWS[0], "step": math.nan}, "row 1: step is nan; expected a whole number, at least 0"),
    ({**ROWS[0], "length": [1, 2]}, "row 1: length is [1, 2]; expected a whole number, at least 0"),
    ({**ROWS[0], "tokens": 2.0}, "row 1: tokens is 2; expected a list of token ids"),
    ({**ROWS[0], "length": 0}, "has no token that counts"),
    ({k: v for k, v in ROWS[0].items() if k != "advantage"}, "has neither advantages nor rewards"),
    ({"logp": [-1.0], "behavior_logp": [-1.0], "reward": 1}, "nothing says which rows share a prompt"),
    (
        {"input": "1+1=", "output": "2", "score": 1.0, "step": 1},
        "is verl's dump of completions (trainer.rollout_data_dir), which has no log-probs; expected a row a sequence with "
        "rollout_log_probs, old_log_probs, response_mask and advantages, which a trainer's _log_rollout_data can take from "
        "its batch (log μ is recorded with actor_rollout_ref.rollout.calculate_log_probs=true)",
    ),
    (
        {"step": 1, "prompt": "1+1=", "completion": "2", "advantage": 0.5},
        "is TRL's dump of completions (log_completions), which has no log-probs",
    ),
    (
        {"old_log_probs": [-1.0], "responses": [1], "response_mask": [1], "advantages": [1.0]},
        "has no column for behavior_logp (log μ of each token, as the sampler recorded it); expected behavior_logp or "
        "rollout_log_probs or sampling_per_token_logps, or --column behavior_logp=NAME; verl records rollout_log_probs with "
        "actor_rollout_ref.rollout.calculate_log_probs=true",
    ),
    ([1, 2], "row 1: is a list; expected an object"),
    *(
        ({**ROWS[0], field: None}, f"row 1: {field} is null; expected {expected}")
        for field, expected in (
            ("logp", "a list of numbers, one a token"),
            ("behavior_logp", "a list of numbers, one a token"),
            ("old_logp", "a list of numbers, one a token"),
            ("advantage", "a number of at most 1e+18 in size, or a list with one for each log-prob"),
            ("mask", "a list of numbers, one a token"),
            ("length", "a whole number, at least 0"),
            ("tokens", "a list of token ids"),
            ("step", "a whole number, at least 0"),
            ("age", "a whole number, at least 0"),
        )
    ),
    ({**ROWS[0], "behavior_logp": [-1.0, None, -1.0]}, "row 1: behavior_logp is null at token 1; expected a log-prob"),
    ({**ROWS[0], "advantage": [1.0, 1.0, None]}, "row 1: advantage is null at token 2; expected a number of at most"),
    ({**ROWS[0], "mask": [1, None, 1]}, "row 1: mask is null at token 1; expected 0 or 1"),
    ({**ROWS[0], "mask": [1, 1, 0.5]}, "row 1: mask is 0.5 at token 2; expected 0 or 1"),
    ({**ROWS[1], "logp": [-1e300]}, "row 1: logp is -1e+300 at token 0; expected a log-probability, at most 0 and at"),
    ({**ROWS[1], "logp": [1e300]}, "row 1: logp is 1e+300 at token 0; expected a log-probability, at most 0"),
    ({**ROWS[1], "logp": [-(10**400)]}, "row 1: logp is -1000"),
    ({**ROWS[1], "logp": [math.nan]}, "row 1: logp is nan at token 0; expected a log-probability"),
    ({**ROWS[1], "logp": [log(0.5)]}, "row 1: logp is [-0.6931471805599453] at token 0; expected a number"),
    ({**ROWS[0], "advantage": 1e300}, "row 1: advantage is 1e+300; expected a number of at most 1e+18 in size"),
    ({**ROWS[0], "advantage": "1.5"}, "row 1: advantage is '1.5'; expected a number of at most 1e+18 in size"),
    ({**ROWS[0], "advantage": 10**400}, "row 1: advantage is 1000"),
    ({**ROWS[0], "advantage": [1.0, -1e300, 1.0]}, "row 1: advantage is -1e+300 at token 1; expected a number of at"),
    ({"logp": [-1.0], "behavior_logp": [-1.0], "reward": 1e300, "group": 1}, "row 1: reward is 1e+300; expected a"),
    ({"logp": [-1.0], "behavior_logp": [-1.0], "reward": 1, "group": None}, "row 1: group is null; expected what the"),
    ({**ROWS[1], "text": "four"}, "row 1: text is 'four'; expected a list with one text or token id for each log-prob"),
    ({**ROWS[0], "text": ["a", "b"]}, "row 1: text has 2 tokens; expected 3, one for each log-prob"),
    ({**ROWS[1], "length": 1, "tokens": [7, 8]}, "row 1: tokens has 2 tokens; expected 1, one for each log-prob"),
]


@pytest.mark.parametrize(("row", "expected"), MISTAKES, ids=[expected for _, expected in MISTAKES])
def test_a_row_that_cannot_be_used_is_one_line(here: Path, refusal: Any, row: Any, expected: str) -> None:  # noqa: F811
    (here / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    line = refusal("inspect", "rollouts.jsonl", "--json", "found.json")
    assert line.startswith("rollouts.jsonl")
    assert expected in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["missing.jsonl"], "missing.jsonl: no such file"),
        (["rollouts.txt"], "rollouts.txt: expected a file that ends in .jsonl or .parquet"),
        (["rollouts.jsonl", "--column", "lopg=x"], "unknown field 'lopg'; did you mean 'logp'?"),
        (["rollouts.jsonl", "--column", "logp=lopg"], "unknown column 'lopg'; did you mean 'logp'?"),
        (["rollouts.jsonl", "--column", "logp=behavior_logp"], "logp and behavior_logp are both behavior_logp"),
        (["rollouts.jsonl", "--column", "logp=a", "--column", "logp=b"], "--column logp=b: logp is a already"),
        (["folder", "--output", "page.html"], "folder: is a folder; expected a .jsonl or .parquet file, such as folder/1.jsonl"),
        (["rollouts.jsonl", "--column", "logp"], "--column logp: expected FIELD=NAME"),
        (["rollouts.jsonl", "--advantage", "median"], "unknown advantage 'median'"),
        (["rollouts.jsonl", "--set", "drpo.delat=1"], "unknown hyperparameter 'delat'"),
        (["rollouts.jsonl", "--objective", "dpro"], "--objective: unknown objective 'dpro'; did you mean 'dro' or 'drpo'?"),
        (["rollouts.jsonl", "--choose-delta", "--objective", "ppo"], "--choose-delta: ppo has no delta; expected --objective"),
        (["rollouts.jsonl", "--objective", "icepop"], "icepop cannot be computed: it weighs tokens by π_old/μ"),
        (["rollouts.jsonl", "--output", "page.pdf"], "--output page.pdf: expected a name that ends in .html"),
        (["rollouts.jsonl", "--json", "page.txt"], "--json page.txt: expected a name that ends in .json"),
        (["rollouts.jsonl", "--json", "folder.json"], "--json folder.json: cannot be written (it is a folder)"),
        (["rollouts.jsonl", "--json", "nowhere/found.json"], "--json nowhere/found.json: cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_in_the_command_is_one_line(
    here: Path,  # noqa: F811
    refusal: Any,  # noqa: F811
    arguments: list[str],
    expected: str,
) -> None:
    write(here / "rollouts.jsonl", ROWS)
    (here / "folder.json").mkdir()
    (here / "folder").mkdir()
    write(here / "folder" / "1.jsonl", ROWS)
    assert expected in refusal("inspect", *arguments)


NULL_WHERE_MASKED: dict[str, Any] = {
    "logp": [*ROWS[0]["logp"], None],
    "behavior_logp": [*ROWS[0]["behavior_logp"], 1e300],
    "old_logp": [*ROWS[0]["behavior_logp"], math.nan],
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("counts", [{"mask": [1, 1, 1, 0]}, {"length": 3}, {"tokens": [7, 8, 9]}], ids=str)
@pytest.mark.parametrize("advantage", [2.0, [2.0, 2.0, 2.0, None]], ids=str)
def test_what_stands_at_a_token_that_does_not_count_is_left_out(
    tmp_path: Path, ending: str, counts: dict[str, Any], advantage: Any
) -> None:
    row = {**NULL_WHERE_MASKED, **counts, "advantage": advantage}
    found = inspected(write(tmp_path / f"masked.{ending}", [row]))
    whole = inspected(write(tmp_path / f"whole.{ending}", [{**ROWS[0], "old_logp": ROWS[0]["behavior_logp"]}]))
    assert found.tokens == 3
    assert (found.measured, found.what_if, found.delta) == (whole.measured, whole.what_if, whole.delta)


def test_a_sequence_of_which_nothing_counts_may_lack_its_advantage(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "length": 3}, {**ROWS[0], "advantage": None, "length": 0}]
    assert inspected(write(tmp_path / "rollouts.jsonl", rows)).sequences == 1


def test_rewards_of_tokens_are_summed_over_all_of_them_and_keep_their_digits(tmp_path: Path) -> None:
    # As verl does: the reward of a sequence stands at its last token, which may be a tool's and masked.
    row = {"logp": log(0.5, 0.5), "behavior_logp": log(0.4, 0.4), "mask": [1, 0], "group": "a"}
    rewards: list[Any] = [[0.0, 1e9 + 1], [1e9, None], None]
    path = write(tmp_path / "rollouts.jsonl", [{**row, "reward": reward} for reward in rewards])
    assert read_rollouts(path, {}, "mean").advantage.tolist() == [0.5, -0.5, 0.0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("advantage", [1e18, 1e-17, 1e-45, 1e-300, -1e18])
def test_numbers_of_any_size_give_finite_measurements(tmp_path: Path, advantage: float) -> None:
    extreme = [0.0, -1e18, -100.0, -1e-300, 1e-3]
    row = {"logp": extreme, "behavior_logp": extreme[::-1], "old_logp": [-1.0] * 5, "advantage": advantage}
    found = inspected(write(tmp_path / "rollouts.jsonl", [row, {**row, "advantage": -advantage}]))
    numbers = [*found.measured.values()]
    for what in found.what_if.values():
        numbers += [*what.scalars.values(), *what.effects.values()]
    assert np.isfinite(numbers).all()
    assert "nan" not in " ".join(parse(render(found)).cells).split()
    # What is too small to divide by is no advantage.
    assert found.steered == (abs(advantage) > 1e-18)


def test_a_length_may_be_a_float_as_pandas_writes_it(tmp_path: Path) -> None:
    assert inspected(write(tmp_path / "rollouts.jsonl", [{**ROWS[0], "length": 2.0}])).tokens == 2


def test_rows_that_are_wrong_are_all_named(tmp_path: Path) -> None:
    append_jsonl(path := tmp_path / "rollouts.jsonl", ROWS[0], {**ROWS[1], "logp": []}, ROWS[1], {"logp": [-1.0]})
    with pytest.raises(UserError) as error:
        inspected(path)
    assert [line.split(": ")[0] for line in error.value.lines] == [f"{path}, row 2", f"{path}, row 4"]


@pytest.mark.parametrize(
    ("logp", "behavior_logp", "expected"),
    [
        ([-0.5, -1.0], [-0.5, -1.0], "π and μ are equal at every token; is logp a copy of behavior_logp"),
        ([-0.5, -1.0], [-40.0, -1.0], "|log π − log μ| is beyond 20 at 1 of the tokens"),
        ([-0.5, -1.0], [-20.0, -1.0], None),
    ],
)
def test_what_makes_the_numbers_doubtful_is_said(
    tmp_path: Path, logp: list[float], behavior_logp: list[float], expected: str | None
) -> None:
    row = {"logp": logp, "behavior_logp": behavior_logp, "advantage": 1.0}
    found = inspected(write(tmp_path / "rollouts.jsonl", [row]))
    assert len(found.remarks) == (expected is not None)
    if expected is not None:
        assert found.remarks[0].startswith(expected)
        assert expected in render(found)


def test_steps_are_ticked_as_whole_numbers_and_each_delta_has_its_place(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "step": step} for step in (1, 2, 5)]
    found = inspected(write(tmp_path / "rollouts.jsonl", rows))
    assert distances(found.by_step, "step").layout.xaxis.dtick == 1
    assert outside(found.region).layout.xaxis.type == "category"
    page = parse(render(found))
    # Counts stand to the right with their heading, as the numbers below them.
    kinds = [(tag, dict(given).get("class")) for tag, given in page.elements if tag in ("th", "td")]
    assert kinds[:4] == [("th", None), ("th", "number"), ("td", None), ("td", "number")]
    assert page.cells[:2] == ["sequences", "3"]


def test_nothing_in_a_file_becomes_markup(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    row = {name: ROWS[0]["logp"], "mu": ROWS[0]["behavior_logp"], "advantage": 1.0}
    found = inspected(write(tmp_path / f"{name.replace('/', '')}.jsonl", [row]), logp=name, behavior_logp="mu")
    page = parse(render(found))
    assert name in page.cells
    assert not [tag for tag, _ in page.elements if tag == "img"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH to open a page in")
def test_a_browser_draws_the_figures(tmp_path: Path) -> None:
    rows = [{**row, "step": index} for index, row in enumerate(ROWS)]
    page = tmp_path / "page.html"
    page.write_text(render(inspected(write(tmp_path / "rollouts.jsonl", rows))))
    document, console = opened(page, tmp_path / "profile")
    assert console == []
    assert document.count('class="js-plotly-plot"') + document.count(" js-plotly-plot") == 5


@pytest.mark.long
@pytest.mark.parametrize(
    ("ending", "sequences", "steps"), [("jsonl", 1000, 16), ("parquet", 1000, 16), ("jsonl", 10_000, 10_000)]
)
def test_a_million_tokens_take_less_than_half_a_minute_and_two_gigabytes(
    tmp_path: Path, ending: str, sequences: int, steps: int
) -> None:
    rng = np.random.default_rng(0)
    rows = []
    tokens = 1_000_000 // sequences
    for row in range(sequences):
        behavior_logp = np.log(rng.beta(2, 0.5, tokens)).clip(max=-1e-4)
        logp, old_logp = ((behavior_logp + rng.normal(0, s, tokens)).clip(max=0) for s in (0.15, 0.02))
        columns = {"logp": logp, "behavior_logp": behavior_logp, "old_logp": old_logp}
        as_sampled = {name: values.astype(np.float32).tolist() for name, values in columns.items()}
        rows.append({**as_sampled, "advantage": rng.normal(), "step": row * steps // sequences})
        rows[-1]["text"] = [f"word {number}" for number in rng.integers(0, 50_000, tokens)]
    path = write(tmp_path / f"rollouts.{ending}", rows)
    # A process of its own, so that its peak is its own.
    run = f"import resource, sys; from drpo.cli import main as cli; sys.argv = ['drpo', 'inspect', {str(path)!r}, '--choose-delta']; cli.app(standalone_mode=False); print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    result = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, result.stdout.splitlines()[-1].split())
    assert seconds < 30
    assert kilobytes < 2e6
