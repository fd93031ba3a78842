"""What samples come to: the statistics of one model, and of two on the same problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drpo.data.problems import Problem
from drpo.errors import UserError
from drpo.evaluation.folder import read_result
from drpo.evaluation.settings import PROMPTING
from drpo.evaluation.statistics import estimate, majority, paired, pass_at_k
from drpo.rewards.math import STATUSES


def summarise(k: int, problems: Sequence[Problem], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of all samples, k of each problem in turn, and a row a problem."""
    table: list[dict[str, Any]] = []
    for index, problem in enumerate(problems):
        mine = rows[index * k : (index + 1) * k]
        right = [row["status"] == "correct" for row in mine]
        table.append(
            {
                "source": problem.source,
                "prompt": problem.prompt,
                "answer": problem.answer,
                "correct": sum(right),
                "samples": k,
                # However it is spelt, a right answer is the reference.
                "majority": majority(
                    [problem.answer if ok else row["stated"] for row, ok in zip(mine, right, strict=True)], right
                ),
                "truncated": sum(row["truncated"] for row in mine),
                "no_answer": sum(row["status"] == "no_answer" for row in mine),
            }
        )
    by_source: dict[str, list[float]] = {}
    for row in table:
        by_source.setdefault(row["source"], []).append(row["correct"] / k)
    return {
        "average": estimate([row["correct"] / k for row in table]),
        "average_by_source": {source: estimate(rates) for source, rates in by_source.items()},
        "pass_at": {str(n): estimate([pass_at_k(k, row["correct"], n) for row in table]) for n in range(1, k + 1)},
        "majority": estimate([row["majority"] for row in table]),
        "statuses": {s: sum(row["status"] == s for row in rows) for s in STATUSES},
        "truncated": sum(row["truncated"] for row in rows) / len(rows),
        "no_answer": sum(row["status"] == "no_answer" for row in rows) / len(rows),
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
        "problems_table": table,
    }


def compare(first: Path, second: Path) -> dict[str, Any]:
    """How much better the second evaluation is than the first on the same problems.

    Raises:
        UserError: evaluations of other problems.
    """
    results = [read_result(path) for path in (first, second)]
    graded = [result.get("reward") for result in results]
    if graded[0] != graded[1]:
        raise UserError(f"{first} and {second}: graded by {graded[0]} and by {graded[1]}; expected the same reward")
    tables = [result["problems_table"] for result in results]
    same = [[(row["prompt"], row["answer"]) for row in table] for table in tables]
    if same[0] != same[1]:
        place = next((i for i, (a, b) in enumerate(zip(*same, strict=False), 1) if a != b), min(map(len, same)) + 1)
        raise UserError(f"{first} and {second}: problem {place} differs; expected evaluations of the same problems")
    prompting = {name: [result.get(name) for result in results] for name in PROMPTING}
    rates = [[row["correct"] / row["samples"] for row in table] for table in tables]
    return {
        "first": results[0]["average"],
        "second": results[1]["average"],
        "difference": paired(rates[0], rates[1]),
        "problems": len(rates[0]),
        "asked_otherwise": {name: pair for name, pair in prompting.items() if pair[0] != pair[1]},
        "better": sum(b > a for a, b in zip(*rates, strict=True)),
        "worse": sum(b < a for a, b in zip(*rates, strict=True)),
    }
