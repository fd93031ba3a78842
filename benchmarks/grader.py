"""What the sandbox costs: throughput and latency of MathGrader against math-verify called in this process.

Three kinds of completions: a sentence and the answer, for plain integers and for the reference answers of
tests/data/gold_answers.jsonl (one of each shape of MATH500's), and 4,000 characters of working before the latter. In
half of them the answer is another reference's. The methods take turns on the same batches of 64, so that what else
the machine does meets all of them alike. "sandbox" is MathGrader with nothing decided from the text alone. Latency is
that of one completion at a time.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from benchmarks import tables
from drpo.rewards import MathGrader

GOLD = Path(__file__).parents[1] / "tests" / "data" / "gold_answers.jsonl"
KINDS = ("short, integers", "short, expressions", "long, expressions")
BATCH, BATCHES = 64, 24
LATENCIES = 400
WORKERS = 2
PACKAGES = ("math-verify", "sympy", "latex2sympy2_extended")
WORKING = "We have $x^2 + 3x = 10$, so $x = 2$ or $x = -5$; the sum is -3.\n"


class Sandboxed(MathGrader):
    """Asks a child about every completion, those that plain text would tell too."""

    def _decide(self, text: str, reference: str) -> Any:
        return reference, text, False


def in_process(completions: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """math-verify with its own limits (an alarm for each call), as it is used without a sandbox."""
    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return [
        verify(parse(f"\\boxed{{{answer}}}"), parse(completion, config))
        for completion, answer in zip(completions, answers, strict=True)
    ]


def batches(kind: str) -> list[tuple[list[str], list[str]]]:
    rng = random.Random(0)
    gold = [json.loads(line)["answer"] for line in GOLD.read_text(encoding="utf-8").splitlines()]
    if kind == "short, integers":
        gold = [str(rng.randint(0, 999)) for _ in gold]
    made = []
    for _ in range(BATCHES):
        answers = rng.choices(gold, k=BATCH)
        given = [answer if rng.random() < 0.5 else rng.choice(gold) for answer in answers]
        before = WORKING * (4000 // len(WORKING)) if kind.startswith("long") else ""
        made.append(([f"{before}The answer is $\\boxed{{{answer}}}$." for answer in given], answers))
    return made


def quantile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def measure(kind: str, workers: int) -> list[dict[str, Any]]:
    sandboxed, grader = Sandboxed(workers=workers), MathGrader(workers=workers)
    methods: dict[str, Callable[[Sequence[str], Sequence[str]], Sequence[Any]]] = {
        "math-verify in process": in_process,
        "sandbox": lambda c, a: [grade.status == "correct" for grade in sandboxed.grade(c, a)],
        "MathGrader": lambda c, a: [grade.status == "correct" for grade in grader.grade(c, a)],
    }
    given = batches(kind)
    spent = dict.fromkeys(methods, 0.0)
    latencies: dict[str, list[float]] = {name: [] for name in methods}
    for method in methods.values():
        method(*given[0])
    for completions, answers in given:
        verdicts = []
        for name, method in methods.items():
            started = time.perf_counter()
            verdicts.append(method(completions, answers))
            spent[name] += time.perf_counter() - started
        assert verdicts[0] == verdicts[1] == verdicts[2]
    singles = [(c, a) for completions, answers in given for c, a in zip(completions, answers, strict=True)]
    for completion, answer in singles[:LATENCIES]:
        for name, method in methods.items():
            started = time.perf_counter()
            method([completion], [answer])
            latencies[name].append(time.perf_counter() - started)
    return [
        {
            "completions": kind,
            "method": name,
            "per_second": f"{BATCH * BATCHES / spent[name]:.0f}",
            "p50_ms": f"{1000 * quantile(latencies[name], 50):.2f}",
            "p99_ms": f"{1000 * quantile(latencies[name], 99):.2f}",
        }
        for name in methods
    ]


def run(command: str) -> list[dict[str, Any]]:
    logging.disable()
    provenance = {"workers": WORKERS, **tables.provenance(command, PACKAGES)}
    return [row | provenance for kind in KINDS for row in measure(kind, WORKERS)]
