"""What verl imports: registers the platform and the rollout backend."""

from __future__ import annotations

from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from drpo.integrations.verl.cpu import platform  # noqa: F401


def _replica() -> type[RolloutReplica]:
    from drpo.integrations.verl.cpu.rollout import Replica

    return Replica


_ROLLOUT_REGISTRY[("transformers", "async")] = "drpo.integrations.verl.cpu.rollout.Adapter"
RolloutReplicaRegistry.register("transformers", _replica)
