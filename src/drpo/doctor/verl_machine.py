"""What a configuration of verl names that is on this machine: its files, its reward function, its model's chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drpo.doctor.findings import Finding
from drpo.doctor.verl_values import get
from drpo.pretrained import is_repo_id


def check_reward(config: Any) -> Iterator[Finding]:
    """The reward function, loaded as verl's workers load it, where it is on this machine."""
    from verl.trainer.ppo.reward import get_custom_reward_fn

    key = "reward.custom_reward_function"
    path, name = (str(get(config, f"{key}.{part}") or "") for part in ("path", "name"))
    if not path:
        yield Finding(
            "warning",
            f"{key}.path is not set: verl scores the data sources that it knows, and fails at others",
            f"{key}.path=pkg://drpo.integrations.verl.grader, for mathematics",
        )
    elif path.startswith("pkg://") or Path(path).expanduser().exists():
        try:
            get_custom_reward_fn(config)
        except Exception as error:  # whatever the module does as it loads
            yield Finding("stop", f"{key}: cannot load {name} from {path} ({error})", f"a function that {path} has")


def check_paths(config: Any) -> Iterator[Finding]:
    """What is on this machine: the verl job may run on another one, so nothing stops here."""
    for key in ("actor_rollout_ref.model.path", "reward.custom_reward_function.path"):
        path = str(get(config, key) or "")
        if not path or "://" in path or Path(path).expanduser().exists():
            continue
        if "model" in key and is_repo_id(path):
            continue
        yield Finding("warning", f"{key}={path}: no such file on this machine", "a path that every node has")


def check_chat_template(config: Any) -> Iterator[Finding]:
    """Whether prompts can be written, where the model is on this machine."""
    from transformers import AutoTokenizer

    from drpo.integrations.verl.problems import PLAIN_TEMPLATE

    path, template = (get(config, f"actor_rollout_ref.model.{name}") for name in ("path", "custom_chat_template"))
    folder = Path(str(path or "")).expanduser()
    if template or not (folder / "tokenizer_config.json").is_file():
        return
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        yield Finding(
            "stop",
            f"actor_rollout_ref.model.path={path}: its tokenizer has no chat template, by which verl writes every prompt",
            f"actor_rollout_ref.model.custom_chat_template={PLAIN_TEMPLATE} for prompts as they stand",
        )
