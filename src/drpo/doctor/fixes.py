"""What to write instead, from the errors of this library and those of others."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from difflib import get_close_matches

from drpo.doctor.findings import Finding

OPTIONS = {
    "beta": "no trainer.beta",
    "delta": "objective.delta, and no trainer.delta",
    "epsilon": "objective: {name: ppo, clip_low: 0.2}, and no trainer.epsilon",
    "epsilon_high": "objective: {name: ppo, clip_high: 0.28}, and no trainer.epsilon_high",
    "importance_sampling_level": "objective: gspo, and no trainer.importance_sampling_level",
    "loss_type": "objective and aggregation at the top of the recipe, and no trainer.loss_type",
    "num_iterations": "updates_per_rollout at the top of the recipe, and no trainer.num_iterations",
    "scale_rewards": "advantage: mean-std at the top of the recipe, and no trainer.scale_rewards",
    **dict.fromkeys(
        ("rollout_lag", "rollout_precision"), "no rollout_precision and no rollout_lag, or trainer.use_vllm: false"
    ),
}
"""In a recipe, where DRPOConfig's own words are for Python."""

_FILTER = "no trainer.{0}, or trainer.replay_support: true"
_CORRECTION = "correction: token_truncate at the top of the recipe, and no trainer.{0}"

# Where an error message says what to write, and how it is said as a fix; the likeliest first.
_FIXES = (
    (r"generation_kwargs has '(\w+)'", "no trainer.generation_kwargs.{}"),
    (r"trainer: (top_p|top_k|min_p)=", _FILTER),
    (r"trainer: (vllm_importance_sampling_\w+)=", _CORRECTION),
    (r"replay_support=True needs the tokens .* vLLM", "no trainer.replay_support, or trainer.use_vllm: false"),
    (r"replay_support=True scores .* needs π_old", "anchor: sampler, or no trainer.replay_support"),
    (r"replay_support=True scores", "objective: {{name: drpo, delta: 0.2}}, or no trainer.replay_support"),
    (r"has (\d+) rows; prompts_per_rollout", "prompts_per_rollout: {}"),
    (r"(task\.\w+): .*no such file", "{}: a .jsonl file, such as drpo data makes"),
    (r"reward: cannot load '([^':]+):", "a module {} that imports, in the current folder or installed"),
    (r"cannot load .*`?ignore_mismatched_sizes", "the config.json that belongs to the weights, or the other way round"),
    (r"cannot load .*does not recognize this architecture", "a model of an architecture that this Transformers has"),
    (r"cannot load .*contains custom code", "a model whose code is part of Transformers; none is run from its folder"),
    (r"cannot load .*expected (.+? hub)\b", "{}"),
    (r"probability tensor contains", "weights that are finite numbers"),
    (r"row (\d+): is not JSON in UTF-8", "one JSON object in row {}, in UTF-8 and without a byte order mark"),
    (
        r"horizon: expected with",
        "horizon, the tokens to divide by, and aggregation: seq-mean-token-sum-norm, or neither",
    ),
    (r"with token healing", "no token_healing in the model's generation_config.json"),
    (r"(\w+) should be set through the `(\w+)`", "trainer.{1}: {{{0}: 0.1}}"),
    (r"No module named '(\w+)", "pip install {}"),
    (r"No such file or directory: '(.+?)'", "the file {}"),
    (r"did you mean (.+?)\?", "{}"),
    (r"has '(\w+)', which belongs (.+)$", "{} {}"),
    (r"row (\d+): (\w+) is .+; expected (.+)$", "{1} in row {0}: {2}"),
    (r"([\w.]+): got .+?; expected (.+)$", "{}: {}"),
    (r"\bexpected (.+?)(?:, (?:but )?got .+)?$", "{}"),
    (r"(?:[:;,]|Please) (set .+?)\.?$", "{}"),
    (r"Invalid (\w+): ", "another {}"),
    (r"trainer: (\w+)=\S+ (?:would have no effect|contradicts)", "no trainer.{}"),
    (r"(\w+): is missing", "a value for {}"),
    (r"Known: (.{1,120})\.$", "one of {}"),
    (r"unknown \w+ '(.+?)'", "no {}"),
    (r"^(\S+): cannot be read", "text in UTF-8 in {}"),
    (r"trainer: (\w+)=", "another trainer.{}"),
)


def refused(error: Exception, name: str = "") -> Finding:
    """The stop that an error is, with what to write instead."""
    what = " ".join(f"{name}: {error}".split()) if name else str(error)
    return Finding("stop", what, fix_of(error, what))


def fix_of(error: Exception, said: str) -> str | None:
    """What to write instead: as the error has it, or one that it wraps, or as its message says.

    Args:
        error: of this library or another.
        said: its message.
    """
    if fix := _own(error):
        return fix
    if (option := re.search(r"trainer: (\w+)=", said)) and option[1] in OPTIONS:
        return OPTIONS[option[1]]
    if install := re.search(r"(pip3? install) ([^`)]+?)(?:[`);,]|\.?$|\. )", said):
        # A shell would take the > of a version for a file to write.
        return f"{install[1]} {' '.join(map(shlex.quote, shlex.split(install[2])))}"
    if choice := re.search(r"(\S+) is not a valid \w+, please select one of \[(.+?)\]", said):
        return _nearest(choice[1], re.findall(r"'(.+?)'", choice[2]))
    found = (fix.format(*match.groups()) for pattern, fix in _FIXES if (match := re.search(pattern, said)))
    return next(found, None)


def _nearest(name: str, known: Sequence[str]) -> str:
    """By the first part of the names, as adamw of adamw_torch, else by all of it."""
    first = {other.partition("_")[0]: other for other in reversed(known)}
    if close := get_close_matches(name, first, n=1):
        return repr(first[close[0]])
    return repr(get_close_matches(name, known, n=1, cutoff=0)[0])


def _own(error: BaseException | None) -> str | None:
    seen: list[BaseException] = []
    # An error that was raised once more from what it was the cause of is its own cause.
    while error is not None and error not in seen:
        if fix := getattr(error, "fix", None):
            return fix
        seen.append(error)
        error = error.__cause__
    return None
