"""Whether a loss is there where it is needed: in verl's workers, which are Ray's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from drpo.doctor.findings import Finding

MODULE = "drpo.integrations.verl"


def in_a_worker(mode: str, library: Any) -> Iterator[Finding]:
    """Whether the loss is there in a Ray worker, which imports verl and the model's external_lib, as verl's do."""
    found, said = ask_worker(mode, library)
    if found:
        yield Finding("ok", f"a Ray worker has loss {mode} ({' and '.join(routes(library)) or 'by chance'})")
    else:
        yield Finding(
            "stop",
            f"a Ray worker has no loss {mode}" + (f": {said}" if said else ""),
            f"actor_rollout_ref.model.external_lib={MODULE}, and this library installed on every node",
        )


def routes(library: Any) -> list[str]:
    allowed = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").lower()
    installed = any(point.value == MODULE for point in entry_points(group="verl.plugins"))
    routes = ["entry point"] if installed and allowed in ("auto", "drpo") else []
    if MODULE in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
        routes.append("VERL_USE_EXTERNAL_MODULES")
    if library and MODULE in ([library] if isinstance(library, str) else library):
        routes.append("external_lib")
    return routes


def ask_worker(mode: str, library: Any) -> tuple[bool, str]:
    """Whether a Ray worker has a loss, and what it says if something fails; a local Ray is started unless one runs."""
    import ray

    own = not ray.is_initialized()
    if own:
        ray.init(num_cpus=1, include_dashboard=False, configure_logging=False, log_to_driver=False)

    def look() -> tuple[bool, str]:
        try:
            from verl.utils.import_utils import import_external_libs

            import_external_libs(library)
            from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
        except Exception as error:
            return False, f"{type(error).__name__}: {error}"
        return mode in POLICY_LOSS_REGISTRY, ""

    try:
        return ray.get(ray.remote(look).options(num_cpus=1).remote())
    finally:
        if own:
            ray.shutdown()
