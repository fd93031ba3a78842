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
    """Whether a Ray worker has a loss, and what fails there; a local Ray is started unless one runs."""
    import ray

    own = not ray.is_initialized()
    # Ray keeps a token in the home folder for clusters that have one; this one is gone in a moment.
    has_mode = "RAY_AUTH_MODE" in os.environ
    if own:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
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
            if not has_mode:
                del os.environ["RAY_AUTH_MODE"]
