"""python -m benchmarks --list; python -m benchmarks NAME...; python -m benchmarks all."""

from __future__ import annotations

import argparse
import ast
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import tables

NAMES = (
    "fused_loss",
    "training_phase",
    "training_lengths",
    "attention",
    "generation",
    "time_to_accuracy",
    "real_model",
    "grader",
    "topk_variance",
    "verl_loss",
    "checkpoint",
    "low_precision",
    "engine_gap",
    "router_gap",
    "off_policy",
    "mistakes",
)
"""Modules with ``run(command) -> rows`` and perhaps ``plot(rows) -> figure``."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run, or 'all'")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--results", type=Path, default=tables.RESULTS, help="folder of the tables")
    parser.add_argument("--images", type=Path, default=tables.IMAGES, help="folder of the plots")
    options = parser.parse_args()
    if options.list or not options.names:
        for name in NAMES:
            # Not imported: some need the extra "bench".
            source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
            print(f"{name:20}{str(ast.get_docstring(ast.parse(source))).splitlines()[0]}")
        return
    unknown = set(options.names) - {*NAMES, "all"}
    if unknown:
        parser.error(f"unknown benchmark {min(unknown)!r}; expected {', '.join(NAMES)} or all")
    for name in NAMES if "all" in options.names else options.names:
        _run(name, import_module(f"benchmarks.{name}"), options.results, options.images)


def _run(name: str, module: Any, results: Path, images: Path) -> None:
    path = results / f"{name}.csv"
    tables.write(path, module.run(f"python -m benchmarks {name}"))
    print(path)
    if hasattr(module, "plot"):
        image = images / f"{name}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        module.plot(tables.read(path)).savefig(image, dpi=150)
        print(image)


if __name__ == "__main__":
    main()
