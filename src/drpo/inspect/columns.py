"""Which column of a rollout file is what: by the names of this library, of verl or of TRL, or as the user says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from drpo.registry import unknown_name

FIELDS = {
    "logp": "log π of each token, under the policy being trained",
    "behavior_logp": "log μ of each token, as the sampler recorded it",
    "old_logp": "log π_old of each token, the trainer's own when the rollout began",
    "advantage": "one number, or one a token",
    "reward": "one number, or one a token, which are summed",
    "group": "what the completions of one prompt have in common",
    "mask": "true or 1 at the tokens that count",
    "length": "how many tokens count, the first ones",
    "tokens": "token ids; without a mask or a length, as many tokens count as there are",
    "text": "the text of each token",
    "step": "the update that a row was trained on in",
    "age": "rollouts between the policy that sampled a row and the one it trained",
}
"""What a column can be. Log-probs are lists with one number a token, in nats."""


@dataclass(frozen=True)
class Format:
    """The names that a host gives to these columns, the first of several that a file has.

    Args:
        title: of the host.
        names: column names of each field, in order of preference.
        text_dump: columns of the host's own dump of completions, which has no log-probs.
        dumped_by: the setting that writes it.
        instead: what the host has that can be written in its place, and where.
        recorded_by: what makes the host record log μ.
    """

    title: str
    names: Mapping[str, tuple[str, ...]]
    text_dump: frozenset[str] = frozenset()
    dumped_by: str = ""
    instead: str = ""
    recorded_by: str = ""

    def recognised(self, columns: Iterable[str]) -> dict[str, str]:
        """The column of each field that is there."""
        present = set(columns)
        found = {field: next((n for n in names if n in present), None) for field, names in self.names.items()}
        return {field: name for field, name in found.items() if name is not None}


FORMATS = (
    Format("drpo", {**{field: (field,) for field in FIELDS}, "step": ("update", "step")}),
    Format(
        "verl",
        {
            "logp": ("log_probs", "old_log_probs"),
            "behavior_logp": ("rollout_log_probs",),
            "old_logp": ("old_log_probs",),
            "advantage": ("advantages",),
            "reward": ("token_level_scores", "token_level_rewards", "score"),
            "group": ("uid",),
            "mask": ("response_mask",),
            "tokens": ("responses",),
            "step": ("global_steps", "step"),
        },
        text_dump=frozenset({"input", "output", "score"}),
        dumped_by="trainer.rollout_data_dir",
        instead="rollout_log_probs, old_log_probs, response_mask and advantages, which a trainer's _log_rollout_data can take from its batch",
        recorded_by="actor_rollout_ref.rollout.calculate_log_probs=true",
    ),
    Format(
        "TRL",
        {
            "logp": ("per_token_logps", "old_per_token_logps"),
            "behavior_logp": ("sampling_per_token_logps",),
            "old_logp": ("old_per_token_logps",),
            "advantage": ("advantages", "advantage"),
            "reward": ("rewards", "reward"),
            "group": ("prompt",),
            "mask": ("completion_mask",),
            "tokens": ("completion_ids",),
            "step": ("step",),
        },
        text_dump=frozenset({"step", "prompt", "completion", "advantage"}),
        dumped_by="log_completions",
        instead="sampling_per_token_logps, old_per_token_logps, completion_mask and advantages, which a trainer's compute_loss gets as inputs",
        recorded_by="use_vllm=True, or in DRPOTrainer always",
    ),
)


@dataclass(frozen=True)
class Columns:
    """The column of each field that is read, and the format that they were recognised by."""

    format: str
    names: Mapping[str, str]


_INSTEAD = {"advantage": ("reward", "group"), "mask": ("length",)}
"""Fields that are not read where another is there."""


def find_columns(columns: Iterable[str], chosen: Mapping[str, str]) -> Columns:
    """What the columns of a file are.

    Args:
        columns: those that the file has.
        chosen: a column for a field, by the user; it wins over what is recognised.

    Raises:
        ValueError: a field or a column that is not there, or one that is needed and was not found.
    """
    present = list(columns)
    for field, name in chosen.items():
        if field not in FIELDS:
            raise ValueError(unknown_name("field", field, FIELDS))
        if name not in present:
            raise ValueError(unknown_name("column", name, present))
    # The host that explains most of what is there; this library's own names where none explains more.
    host = max(FORMATS, key=lambda host: len(host.recognised(present)))
    names = {**host.recognised(present), **chosen}
    for field in ("logp", "behavior_logp"):
        if field not in names:
            raise ValueError(_missing(field, present, host))
    if names["logp"] == names["behavior_logp"]:
        raise ValueError(f"logp and behavior_logp are both {names['logp']}; expected a column of each policy")
    if not {"advantage", "reward"} & set(names):
        raise ValueError(
            f"has neither advantages nor rewards; expected a column called {_choices('advantage')}, or one named with --column"
        )
    unread = {field for given, others in _INSTEAD.items() if given in names for field in others}
    return Columns(host.title, {field: name for field, name in names.items() if field not in unread})


def _missing(field: str, present: list[str], recognised: Format) -> str:
    for host in FORMATS:
        if host.text_dump and host.text_dump <= set(present):
            return (
                f"is {host.title}'s dump of completions ({host.dumped_by}), which has no log-probs; expected a row a sequence "
                f"with {host.instead} (log μ is recorded with {host.recorded_by})"
            )
    listed = ", ".join(present) or "none"
    recorded = ""
    if field == "behavior_logp" and recognised.recorded_by:
        recorded = f"; {recognised.title} records {_choices(field, [recognised])} with {recognised.recorded_by}"
    return (
        f"has no column for {field} ({FIELDS[field]}); expected {_choices(field)}, or --column {field}=NAME{recorded}. "
        f"Columns: {listed}."
    )


def _choices(field: str, hosts: Iterable[Format] = FORMATS) -> str:
    names = dict.fromkeys(name for host in hosts for name in host.names.get(field, ()))
    return " or ".join(names)
