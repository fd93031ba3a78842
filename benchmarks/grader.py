"""What the sandbox costs: throughput and latency of MathGrader against math-verify called in this process.

Three kinds of completions: a sentence and the answer, for plain integers and for the reference answers of
tests/data/gold_answers.jsonl (one of each shape of MATH500's), and 4,000 characters of working before the latter. In
half of them the answer is another reference's. The methods take turns on the same batches of 64, so that what else the machine does meets all
of them alike. "sandbox" is MathGrader with nothing decided from the text alone, one completion at a time in latency.

python benchmarks/grader.py --output docs/results/grader.csv
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import logging
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from drpo.rewards import MathGrader

GOLD = Path(__file__).parents[1] / "tests" / "data" / "gold_answers.jsonl"
KINDS = ("short, integers", "short, expressions", "long, expressions")
BATCH, BATCHES = 64, 24
LATENCIES = 400
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    logging.disable()
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    provenance = {
        "workers": options.workers,
        "command": f"python benchmarks/grader.py --output {options.output} --workers {options.workers}",
        "commit": described.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores used",
        "versions": " ".join(f"{name}={version(name)}" for name in ("math-verify", "sympy", "latex2sympy2_extended")),
    }
    rows = [row | provenance for kind in KINDS for row in measure(kind, options.workers)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(options.output)


if __name__ == "__main__":
    main()
