"""Whether the settings that the doctor reads are of the kind that verl computes with; every other check presupposes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from drpo.doctor.findings import Finding

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
_ABSENT = object()


@dataclass(frozen=True)
class Kind:
    """What a setting may be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_files(value: Any) -> bool:
    from omegaconf import ListConfig

    files = list(value) if isinstance(value, (list, ListConfig)) else [value]
    return bool(files) and all(isinstance(file, str) and file for file in files)


MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))
WHOLE = Kind(
    "a whole number, at least 1", lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1
)
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a number > 0", lambda value: _is_number(value) and value > 0)
RATE = Kind("a number, at least 0", lambda value: _is_number(value) and value >= 0)
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
FILES = Kind("a file or a list of files", _is_files)

NEEDED = {
    "data": MAPPING,
    "algorithm": MAPPING,
    "trainer": MAPPING,
    ROLLOUT: MAPPING,
    f"{ACTOR}.policy_loss": MAPPING,
    f"{ACTOR}.optim": MAPPING,
    "data.train_files": FILES,
    "data.train_batch_size": WHOLE,
    "data.max_prompt_length": WHOLE,
    "data.max_response_length": WHOLE,
    f"{ACTOR}.ppo_mini_batch_size": WHOLE,
    f"{ACTOR}.ppo_epochs": WHOLE,
    f"{ACTOR}.optim.lr": RATE,
    f"{ROLLOUT}.n": WHOLE,
    f"{ROLLOUT}.temperature": POSITIVE,
    "trainer.n_gpus_per_node": WHOLE,
    "trainer.nnodes": WHOLE,
}
"""Without these verl does not start."""

WHERE_GIVEN = {
    f"{ACTOR}.policy_loss.hyperparameters": MAPPING,
    "algorithm.rollout_correction": MAPPING,
    "algorithm.rollout_correction.bypass_mode": BOOLEAN,
    "trainer.use_v1": BOOLEAN,
    f"{ROLLOUT}.calculate_log_probs": BOOLEAN,
    f"{ROLLOUT}.do_sample": BOOLEAN,
    f"{ACTOR}.clip_ratio_c": NUMBER,
    f"{ACTOR}.clip_ratio_high": NUMBER,
}


def wrong_values(config: Any) -> Iterator[Finding]:
    """Settings that are missing or of another kind; of those within one that is wrong nothing is said."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    wrong: list[str] = []
    for key, kind in {**NEEDED, **WHERE_GIVEN}.items():
        if any(key.startswith(f"{outer}.") for outer in wrong):
            continue
        try:
            value = OmegaConf.select(config, key, default=_ABSENT)
        except OmegaConfBaseException as error:
            wrong.append(key)
            yield Finding("stop", f"{key}: {str(error).splitlines()[0]}", f"{key}: {kind.expected}")
            continue
        if value is _ABSENT and key in WHERE_GIVEN:
            continue
        if value is _ABSENT or not kind.holds(value):
            wrong.append(key)
            said = "is missing" if value is _ABSENT else f"is {'null' if value is None else value}"
            yield Finding("stop", f"{key} {said}; expected {kind.expected}", f"{key}: {kind.expected}")
    if wrong:
        return
    try:
        # As verl's trainer begins.
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        yield Finding("stop", str(error).splitlines()[0], "a value in place of what refers to nothing")
