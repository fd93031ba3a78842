"""The grader on answers from public reports of graders' mistakes; docs/math.md has its counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drpo.rewards import MathGrader

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "tests" / "data" / "public_cases.jsonl").read_text(encoding="utf-8").splitlines()
CASES = [case for case in map(json.loads, LINES) if "right" in case]


@pytest.mark.parametrize(("strict", "sentence"), [(True, "strict mode accepts"), (False, "the default accepts")])
def test_it_errs_as_often_as_the_docs_say(strict: bool, sentence: str) -> None:
    # A timeout, as on a busy machine, would count as a refusal.
    grader = MathGrader(strict=strict, time_limit=10.0)
    grades = grader.grade([case["completion"] for case in CASES], [case["gold"] for case in CASES])
    verdicts = [(grade.status == "correct", case["right"]) for grade, case in zip(grades, CASES, strict=True)]
    accepted, refused = verdicts.count((True, False)), verdicts.count((False, True))
    page = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    assert f"On {len(CASES)} cases from public reports" in page
    assert f"{sentence} {accepted} " in page
    assert f"refuses {refused} " in page.partition(sentence)[2][:60]
