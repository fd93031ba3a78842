"""Whether what is installed is what the package asks for, and what a recipe asks for beyond it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from packaging.requirements import Requirement
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from drpo.doctor.findings import Finding
from drpo.doctor.fixes import refused
from drpo.doctor.memory import available, gib
from drpo.doctor.verl_worker import MODULE, routes
from drpo.doctor.vllm import check_vllm
from drpo.precision import BY_TORCHAO
from drpo.registry import unknown_name
from drpo.run.recipe import Recipe
from drpo.trainer.config import DRPOConfig

EXTRAS = {"lora": "peft", "low-precision": "torchao", "verl": "verl"}
"""Extras of this package for users, and the package that each is there for."""

REPORTERS = ("clearml", "comet_ml", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb")
"""Those of Transformers that are modules of the same name."""


def check_packages() -> Iterator[Finding]:
    """Python and every package that this one declares, in the versions that it declares."""
    wrong = list(_wrong(_declared()))
    yield from wrong
    if not wrong:
        shown = ", ".join(f"{name} {version(name)}" for name in ("drpo", "torch", "transformers", "trl"))
        yield Finding("ok", f"packages: Python {sys.version.split()[0]}, {shown}")


def check_extras() -> Iterator[Finding]:
    """Which extras are there; one whose package is there and not what goes with it is a warning."""
    absent, present = [], []
    for extra, package in EXTRAS.items():
        if _installed(package) is None:
            absent.append(extra)
        elif wrong := list(_wrong(_declared(extra))):
            yield from (Finding("warning", f"{found.what} (extra {extra})", _install(extra)) for found in wrong)
        else:
            present.append(extra)
    listed = ", ".join(present) or "none"
    yield Finding("ok", f"extras: {listed}" + (f"; not installed: {', '.join(absent)}" if absent else ""))


def check_plug_ins() -> Iterator[Finding]:
    """Whether verl, where it is installed, finds this library's losses through its entry point."""
    if find_spec("verl") is None:
        return
    if "entry point" not in routes(None):
        registered = any(point.value == MODULE for point in entry_points(group="verl.plugins"))
        yield Finding(
            "warning",
            "plug-ins: verl does not load the entry point of this library"
            + (f" (VERL_USE_EXTERNAL_PLUGINS={os.environ['VERL_USE_EXTERNAL_PLUGINS']})" if registered else ""),
            "VERL_USE_EXTERNAL_PLUGINS=auto" if registered else _install("verl"),
        )
        return
    try:
        from drpo.integrations.verl import LOSS_MODES
    except Exception as error:  # whatever verl's own imports raise
        yield Finding(
            "warning", f"plug-ins: verl's does not load ({type(error).__name__}: {str(error)[:200]})", _install("verl")
        )
    else:
        yield Finding("ok", f"plug-ins: verl {version('verl')} has {len(LOSS_MODES)} losses of this library")


def check_hardware() -> Iterator[Finding]:
    """What trains, and whether it is what this machine has."""
    if torch.accelerator.is_available():
        name = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else str(torch.accelerator.current_accelerator())
        )
        yield Finding(
            "ok", f"hardware: {torch.accelerator.device_count()} x {name}, {gib(available())} free on the first"
        )
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "warning",
            f"hardware: this machine has a GPU that torch {torch.__version__} does not see",
            "pip install torch, a build for the CUDA version that nvidia-smi shows",
        )
    else:
        yield Finding("ok", f"hardware: CPU, {os.cpu_count()} cores, {gib(available())} free")


def check_needs(recipe: Recipe, config: DRPOConfig | None) -> Iterator[Finding]:
    """What the recipe's options need beyond the package itself."""
    if recipe.lora is not None:
        yield from _missing("lora", "lora")
    for name in ("train_precision", "rollout_precision"):
        if (precision := getattr(recipe, name)) in BY_TORCHAO:
            yield from _missing("low-precision", f"{name}: {precision}")
    for name in ("fsdp", "deepspeed"):
        if recipe.trainer.get(name):
            yield Finding(
                "warning",
                f"trainer.{name}: shards over several processes; the doctor is one, and looks at the run without it",
                "accelerate launch -m drpo train, which starts them",
            )
    if config is None:
        return
    reporters: Any = config.report_to  # a list by now
    for package in reporters:
        if package not in INTEGRATION_TO_CALLBACK:
            yield refused(ValueError(unknown_name("reporter", package, INTEGRATION_TO_CALLBACK)), "trainer.report_to")
        elif package in REPORTERS and find_spec(package) is None:
            yield Finding("stop", f"trainer.report_to: {package} is not installed", f"pip install {package}")
    if config.use_liger_kernel and find_spec("liger_kernel") is None:
        yield Finding("stop", "trainer.use_liger_kernel: liger-kernel is not installed", "pip install liger-kernel")
    if config.torch_compile:
        yield from _compiler(config)
    if config.use_vllm:
        yield from check_vllm(recipe, config)


def _compiler(config: DRPOConfig) -> Iterator[Finding]:
    """Names alone: compiling takes most of a minute, and the doctor's rollout does without."""
    from torch._inductor import list_mode_options

    backend, mode = config.torch_compile_backend, config.torch_compile_mode
    backends, modes = [known.value.lower() for known in DynamoBackend], ["default", *list_mode_options()]
    for name, value, known in (("torch_compile_backend", backend, backends), ("torch_compile_mode", mode, modes)):
        if value is not None and value.lower() not in known:
            yield refused(ValueError(unknown_name(name.rpartition("_")[2], value, known)), f"trainer.{name}")


def _missing(extra: str, needed_by: str) -> Iterator[Finding]:
    for found in _wrong(_declared(extra)):
        yield Finding("stop", f"{needed_by}: {found.what.removeprefix('packages: ')}", _install(extra))


def _declared(extra: str = "") -> list[Requirement]:
    """The requirements of this package, or those that one of its extras adds."""

    def applies(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    declared = [Requirement(line) for line in requires("drpo") or []]
    return [r for r in declared if applies(r, extra) and not (extra and applies(r, ""))]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _wrong(wanted: Iterable[Requirement]) -> Iterator[Finding]:
    for requirement in wanted:
        found, fix = _installed(requirement.name), f"pip install '{str(requirement).partition(';')[0]}'"
        if found is None:
            yield Finding("stop", f"packages: {requirement.name} is not installed", fix)
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Finding("stop", f"packages: {requirement.name} is {found}; expected {requirement.specifier}", fix)


def _install(extra: str) -> str:
    return f"pip install 'drpo[{extra}]'"
