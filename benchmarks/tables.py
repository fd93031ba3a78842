"""Tables of results: CSV, each row with what it takes to get it again."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path("docs/results")
IMAGES = Path("docs/images")

COMMIT = "DRPO_BENCHMARK_COMMIT"
"""The environment variable with the commit of a tree that came without its history."""


def provenance(command: str, packages: Sequence[str] = ("torch",)) -> dict[str, str]:
    """Columns that say where a row comes from."""
    return {
        "command": command,
        "commit": os.environ.get(COMMIT) or commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": " ".join(f"{package}={_version(package)}" for package in packages),
    }


def commit() -> str:
    """Of the checkout, and whether it has changed since."""
    changed = _git("status", "--porcelain", "src", "benchmarks", "tests", "constraints.txt")
    return _git("describe", "--always") + ("-dirty" if changed else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def machine() -> str:
    """The device that measures: the GPU if there is one."""
    return (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    )


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the same columns, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
