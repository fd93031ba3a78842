"""What there is to check and to measure on a GPU, in one command of at most eight minutes; builds and downloads nothing.

    python scripts/gpu.py                              # tables in docs/results/gpu
    python scripts/gpu.py --smollm2 FOLDER             # with SmolLM2-135M, of which FOLDER is a copy
    python scripts/gpu.py --device cpu --small         # that it runs, on two cores in five minutes

A part that fails or takes too long is named, and the next one begins; the exit code is then 1. A machine that has PyTorch,
Transformers and Triton needs besides what scripts/gpu-requirements.txt lists, and no installation of this project.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "gpu"

PARTS = {"kernels": 120, "fused_loss": 150, "low_precision": 60, "training_phase": 150, "smollm2": 60}
"""In their order, and the seconds that each may take on a GPU."""

SMALL_SECONDS = 300
"""The same, of any part with ``--small``."""

ROUNDS = 3

SHOWN = 60
"""Lines of the output of a part that failed; all of it is beside the tables."""

PROVENANCE = ("command", "commit", "date", "machine", "versions", "rounds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all by default, else of {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds")
    parser.add_argument("--smollm2", metavar="FOLDER", help="of the model, for the part of that name")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--commit", help="of this tree, where it came without its history")
    parser.add_argument("--here", metavar="PART", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        _measure(options.here, options)
        return 0
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {min(unknown)!r}; expected some of {', '.join(PARTS)}")
    parts = options.parts or [name for name in PARTS if name != "smollm2" or options.smollm2]
    outcomes = {}
    for name in parts:
        began = time.perf_counter()
        outcome = _run(name, options)
        outcomes[name] = f"{outcome} in {time.perf_counter() - began:.0f} s"
        print(f"--- {name}: {outcomes[name]}", flush=True)
        _show(options.output / f"{name}.csv")
    print(*(f"{name}: {outcome}" for name, outcome in outcomes.items()), sep="\n")
    return int(any("passed" not in outcome for outcome in outcomes.values()))


def _run(name: str, options: argparse.Namespace) -> str:
    """Run a part in a process of its own, whose memory goes with it."""
    from benchmarks.tables import COMMIT

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), *sys.path[1:]])}
    environment |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if options.commit:
        environment[COMMIT] = options.commit
    if name == "kernels":
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py"]
        # Triton's interpreter takes minutes.
        command += ["-k", "real_size"] if options.small else []
    else:
        command = [sys.executable, __file__, *sys.argv[1:], "--here", name]
    seconds = SMALL_SECONDS if options.small else PARTS[name]
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / f"{name}.log"
    with log.open("w") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=seconds, check=False, **streams
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds} s, all that it may take,"
    if code:
        print(*log.read_text(errors="replace").splitlines()[-SHOWN:], sep="\n")
    else:
        log.unlink()
    return "passed" if not code else f"failed with exit code {code}"


def _measure(name: str, options: argparse.Namespace) -> None:
    """Write the table of a part, anew after each of its cases: what a time limit stops is kept so far."""
    from benchmarks import tables, training_phase

    command = f"python scripts/gpu.py {name}" + (" --small" if options.small else "")
    module = training_phase if name == "smollm2" else import_module(f"benchmarks.{name}")
    if name == "smollm2":
        command += f" --smollm2 {Path(options.smollm2).name}"
        cases = training_phase.on_smollm2(options.smollm2)[: 1 if options.small else None]
    else:
        cases = module.cases(small=options.small)
    rows = []
    for case in cases:
        rows += module.compare([case], 1 if options.small else ROUNDS, command)
        tables.write(options.output / f"{name}.csv", rows)


def _show(table: Path) -> None:
    from benchmarks import tables

    if not table.is_file():
        return
    rows = tables.read(table)
    columns = [column for column in rows[0] if column not in PROVENANCE]
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print(*(f"{row[column][:28]:>{max(9, len(column))}}" for column in columns))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    sys.exit(main())
