"""Whether this machine has what the package was tested with."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

from drpo.doctor.findings import Finding

_NEEDED, _EXTRAS = ("", "trl"), ("lora", "low-precision", "verl")
"""Extras of this package for users: those that a run of a recipe needs, and others."""


def check_packages() -> Iterator[Finding]:
    """Versions of what is installed: another TRL than the declared one may run and train on something else."""
    wrong = False
    for requirement in map(Requirement, requires("drpo") or []):
        is_needed = _is_of(requirement, _NEEDED)
        if not is_needed and not _is_of(requirement, _EXTRAS):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:  # its import will say so
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong = True
            yield Finding(
                "stop" if is_needed else "warning",
                f"packages: {requirement.name} is {installed}; expected {requirement.specifier}",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
    if not wrong:
        shown = ", ".join(f"{name} {version(name)}" for name in ("drpo", "torch", "transformers", "trl"))
        yield Finding("ok", f"packages: Python {sys.version.split()[0]}, {shown}")


def _is_of(requirement: Requirement, extras: Iterable[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def check_hardware() -> Iterator[Finding]:
    """Whether what trains is what this machine has."""
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else str(accelerator)
        yield Finding("ok", f"hardware: {torch.accelerator.device_count()} x {name}")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "warning",
            f"hardware: this machine has a GPU that torch {torch.__version__} does not see, and trains on the CPU",
            "pip install torch, a build for the CUDA version that nvidia-smi shows",
        )
    else:
        yield Finding("ok", f"hardware: CPU, {os.cpu_count()} cores")
