"""Whether a loss is there where it is needed: in verl's workers, which are Ray's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from drpo.doctor.findings import Finding


def check_worker(mode: str, library: Any) -> Iterator[Finding]:
    """Look for the loss in a Ray worker, which imports verl and the model's external_lib, as verl's do."""
    is_there, failure = ask_worker(mode, library)
    if is_there:
        yield Finding("ok", f"a Ray worker has loss {mode}")
    else:
        yield Finding(
            "stop",
            f"a Ray worker has no loss {mode}" + (f": {failure}" if failure else ""),
            "actor_rollout_ref.model.external_lib=drpo.integrations.verl, and this library installed on every node",
        )


def ask_worker(mode: str, library: Any) -> tuple[bool, str]:
    """Whether a Ray worker has a loss, and what fails there; a Ray of its own is started unless this process is in one."""
    import ray

    own = not ray.is_initialized()
    # Ray keeps a token in the home folder for its clusters; this one is gone in a moment, and nobody else's.
    has_mode = "RAY_AUTH_MODE" in os.environ

    def look() -> tuple[bool, str]:
        try:
            from verl.utils.import_utils import import_external_libs

            import_external_libs(library)
            from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
        except Exception as error:
            return False, f"{type(error).__name__}: {error}"
        return mode in POLICY_LOSS_REGISTRY, ""

    try:
        if own:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            ray.init("local", num_cpus=1, include_dashboard=False, configure_logging=False, log_to_driver=False)
        return ray.get(ray.remote(look).options(num_cpus=1).remote())
    finally:
        if own:
            ray.shutdown()
            if not has_mode:
                os.environ.pop("RAY_AUTH_MODE", None)
