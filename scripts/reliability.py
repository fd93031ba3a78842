"""What this library survives, tried anew: runs the tests of each row of docs/reliability.md and writes its table.

    python scripts/reliability.py          # all rows; about half an hour on two cores
    python scripts/reliability.py R3 R5    # these; the other rows stay as they are

Exit code 1 if a test fails.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from drpo.files import versions
from drpo.registry import unknown_name

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"

ROWS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "R1": (
        "SIGKILL at 45 random moments: 20 of a run with dropout, 5 each with LoRA, lag 4, FP8, INT8, two ranks; SIGTERM at 5",
        "resumed, it ends with the same bytes: weights, optimizer, schedule, random numbers",
        ("tests/test_killed.py",),
    ),
    "R2": (
        "a checkpoint within a rollout, in any epoch, under other objectives and optimizers",
        "the same bytes, and no rollout sampled twice",
        ("tests/test_checkpoint.py::TestResuming", "tests/test_trainer.py -k resumed"),
    ),
    "R3": (
        "each file of a checkpoint missing, emptied, truncated, with a bit flipped",
        "named; the checkpoint before is taken",
        ("tests/test_checkpoint.py::TestDamage",),
    ),
    "R4": (
        "a disk that is full, at each step of a save",
        "the checkpoints before, no debris, one line",
        ("tests/test_checkpoint.py::TestWriting",),
    ),
    "R5": (
        "other options, data, rewards, model, frozen weights, number of processes",
        "refused, naming the field",
        ("tests/test_checkpoint.py::TestAnotherRun",),
    ),
    "signals": (
        "SIGTERM and SIGINT",
        "a checkpoint, exit code 143 or 130",
        ("tests/test_checkpoint.py::TestSignals", "tests/test_train.py -k signal"),
    ),
    "logs": (
        "a line cut short or damaged, a kill while a file is replaced or a folder overwritten",
        "dropped or named; the folder can be used",
        ("tests/test_run.py",),
    ),
    "N1": (
        "random token batches against an independent fp64 reference",
        "finite; 0 where masked; within 1e-5",
        ("tests/test_fuzz.py",),
    ),
    "N2": ("gradcheck in fp64, every objective", "passes", ("tests/test_objectives.py -k gradcheck",)),
    "N3": (
        "the same sequences split, padded, permuted, on two ranks",
        "gradients equal to 1e-6",
        ("tests/test_ranks.py", "tests/test_rollout_trainer.py", "tests/test_micro_batches.py"),
    ),
    "N4": (
        "log-probs, gradients and rewards that are not finite",
        "skipped, counted and kept, or named; weights untouched",
        ("tests/test_guard.py",),
    ),
    "N5": (
        "groups of equal, single, missing, huge rewards",
        "zeros, or the value worked by hand",
        ("tests/test_advantage.py",),
    ),
    "G1": ("127 adversarial completions", "answered in time", ("tests/test_grader.py -k Adversarial",)),
    "G2": ("graded answers from public reports", "as often wrong as documented", ("tests/test_public_cases.py",)),
    "G3": (
        "rewards that raise, hang, exit, return nonsense",
        "one line with function and row",
        ("tests/test_rewards_that_fail.py",),
    ),
    "D1": (
        "malformed recipes",
        "one line with the field, exit code 2",
        ("tests/test_bad_recipes.py", "tests/test_recipe.py"),
    ),
    "D2": ("malformed rows of data", "file and row, exit code 2", ("tests/test_bad_data.py", "tests/test_data.py")),
    "S1": (
        "60 HTML payloads",
        "text, never markup",
        ("tests/test_report.py -k element", "tests/test_inspect.py -k markup"),
    ),
    "S2": ("pickles in place of state", "never read", ("tests/test_checkpoint.py -k pickled",)),
    "S3": (
        "paths that lead outside",
        "nothing is written there",
        ("tests/test_paths.py", "tests/test_run.py -k replaced"),
    ),
    "S4": ("canary secrets", "in no byte written", ("tests/test_secrets.py",)),
    "S5": (
        "no network",
        "no connection tried",
        ("tests/test_offline.py", "tests/test_report.py -k network"),
    ),
    "X1": (
        "one of two ranks fails, has no tokens, other metrics",
        "all end within 30 s, naming the rank",
        ("tests/test_rewards_that_fail.py -k ranks", "tests/test_ranks.py"),
    ),
}
"""For each row what is injected, what holds, and the tests that show it, as pytest takes them."""


def run(row: str) -> tuple[int, int]:
    """How many of a row's tests passed, and how many there are but for skipped ones."""
    passed = total = 0
    for selection in ROWS[row][2]:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "junit.xml"
            command = [
                sys.executable,
                "-m",
                "pytest",
                *selection.split(),
                "-m",
                "long or not long",
                f"--junitxml={result}",
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            if not result.is_file():
                sys.exit(finished.stdout + finished.stderr)
            (suite,) = ElementTree.parse(result).getroot().iter("testsuite")
        count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
        total += count["tests"] - count["skipped"]
        passed += count["tests"] - count["skipped"] - count["failures"] - count["errors"]
        if count["failures"] or count["errors"]:
            print(finished.stdout)
    return passed, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to try; all by default")
    chosen = parser.parse_args().rows or list(ROWS)
    for row in chosen:
        if row not in ROWS:
            parser.error(unknown_name("row", row, ROWS))
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    where = f"{commit.stdout.strip()}, torch {versions()['torch']}, {platform.machine()}, {os.cpu_count()} cores"
    is_whole = True
    for row in chosen:
        passed, total = run(row)
        is_whole &= passed == total > 0
        injected, holds, _ = ROWS[row]
        today = datetime.date.today().isoformat()
        lines[row] = f"| {row} | {injected} | {holds} | {passed} of {total} | {today}, {where} |"
        print(lines[row], flush=True)
        head = "| | Injected | Holds | Tests passed | Tried |\n|---|---|---|---|---|\n"
        body = "".join(f"{lines[name]}\n" for name in ROWS if name in lines)
        DOCUMENT.write_text(f"{before}{BEGIN}{head}{body}{END}{after}", encoding="utf-8")
    sys.exit(0 if is_whole else 1)


if __name__ == "__main__":
    main()
