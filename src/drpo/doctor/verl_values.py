"""Whether the settings that the doctor reads are of the kind that verl computes with; every other check presupposes it; and whether verl has what they name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from drpo.doctor.findings import Finding
from drpo.registry import unknown_name

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
LOSS = f"{ACTOR}.policy_loss"
CORRECTION = "algorithm.rollout_correction"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_KINDS = {
    "a mapping": lambda value: isinstance(value, Mapping),
    "a whole number, at least 1": lambda value: type(value) is int and value >= 1,
    "a number, at least 0": lambda value: _is_number(value) and value >= 0,
    "a number > 0": lambda value: _is_number(value) and value > 0,
    "true or false": lambda value: isinstance(value, bool),
}

_NEEDED = {
    "a mapping": ("data", "algorithm", "trainer", ROLLOUT, LOSS, f"{ACTOR}.optim"),
    "a whole number, at least 1": (
        *("data.train_batch_size", "data.max_prompt_length", "data.max_response_length"),
        *("trainer.n_gpus_per_node", "trainer.nnodes"),
        *(f"{ACTOR}.ppo_mini_batch_size", f"{ACTOR}.ppo_epochs", f"{ROLLOUT}.n"),
    ),
    "a number, at least 0": (f"{ACTOR}.optim.lr",),
    "a number > 0": (f"{ROLLOUT}.temperature",),
}
"""Settings without which verl does not start, by what each may be."""

_OPTIONAL = {
    "a mapping": (f"{LOSS}.hyperparameters", CORRECTION),
    "true or false": (
        *(f"{CORRECTION}.bypass_mode", f"{ROLLOUT}.calculate_log_probs"),
        *(f"{ACTOR}.use_dynamic_bsz", f"{ACTOR}.use_kl_loss"),
    ),
    "a whole number, at least 1": (f"{ACTOR}.ppo_max_token_len_per_gpu", f"{ACTOR}.ulysses_sequence_parallel_size"),
    "a number > 0": (f"{ACTOR}.clip_ratio_c",),
}


def get(config: Any, key: str) -> Any:
    """A setting by its dotted name; None where it is not there."""
    from omegaconf import OmegaConf

    return OmegaConf.select(config, key, throw_on_missing=False)


def check_values(config: Any) -> Iterator[Finding]:
    """Settings that are missing or of another kind; of those within one that is wrong nothing is said."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    absent, wrong = object(), []
    for kinds, is_needed in ((_NEEDED, True), (_OPTIONAL, False)):
        for expected, key in ((expected, key) for expected, keys in kinds.items() for key in keys):
            if key.startswith(tuple(f"{outer}." for outer in wrong)):
                continue
            try:
                value = OmegaConf.select(config, key, default=absent)
            except OmegaConfBaseException as error:
                mistake = f": {str(error).splitlines()[0]}"
            else:
                if _KINDS[expected](value) or (value is absent and not is_needed):
                    continue
                mistake = " is missing" if value is absent else f" is {'null' if value is None else value}"
            wrong.append(key)
            yield Finding("stop", f"{key}{mistake}; expected {expected}")
    if wrong:
        return
    try:
        # As verl's trainer begins.
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        yield Finding("stop", str(error).splitlines()[0], "a value in place of what refers to nothing")


STRATEGIES = ("fsdp", "fsdp2", "fsdp_turbo", "megatron", "automodel", "torchtitan", "veomni")
"""verl's training engines; it registers those alone whose packages are installed."""


def check_names(config: Any) -> Iterator[Finding]:
    """What verl looks up by a name only once it runs."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
    from verl.utils.tracking import Tracking
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    known: dict[str, Iterable[str]] = {
        "algorithm.adv_estimator": ADV_ESTIMATOR_REGISTRY,
        f"{ACTOR}.strategy": STRATEGIES,
        # That of drpo.integrations.verl.cpu is registered in its workers alone.
        f"{ROLLOUT}.name": (*RolloutReplicaRegistry._registry, "transformers"),
        "trainer.logger": Tracking.supported_backend,
    }
    for key, names in known.items():
        value = get(config, key)
        for name in [value] if isinstance(value, str) or value is None else value:
            if str(name) not in names:
                yield Finding("stop", f"{key}: {unknown_name(key.rpartition('.')[2], str(name), names)}")
    if "/" in (experiment := str(get(config, "trainer.experiment_name"))):
        yield Finding(
            "stop",
            f"trainer.experiment_name={experiment} has a slash: checkpoints are nested, and the logger file has no such folder",
            f"trainer.experiment_name={experiment.replace('/', '-')}",
        )
