"""The configuration that verl would start with, composed by Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from drpo.errors import UserError
from drpo.recipes import find_recipe


def compose_file(path: Path, overrides: Sequence[str] = ()) -> Any:
    """The configuration in a file, or of the recipe of that name, with overrides.

    Raises:
        UserError: there is none, or it does not compose.
    """
    path = find_recipe(path, "verl", "--verl")
    if path.suffix != ".yaml":
        raise UserError(f"--verl {path}: expected a name that ends in .yaml")
    folder = initialize_config_dir(config_dir=str(path.parent.absolute()), version_base=None)
    return _compose(folder, path.stem, overrides, " ".join(("--verl", str(path), *overrides)))


def compose_main_ppo(arguments: Sequence[str], given: Sequence[str] = ()) -> Any:
    """The configuration of ``python -m verl.trainer.main_ppo`` with these arguments.

    Args:
        arguments: all of them.
        given: those that the user gave.

    Raises:
        UserError: it does not compose.
    """
    module = initialize_config_module("verl.trainer.config", version_base=None)
    return _compose(module, "ppo_trainer", arguments, " ".join(("--verl", *given)))


def _compose(search: AbstractContextManager[Any], name: str, overrides: Sequence[str], command: str) -> Any:
    try:
        with search:
            return compose(name, list(overrides))
    # Hydra lets through what it meets in a file or an override that is no mapping.
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError, OSError) as error:
        # Hydra's message may say what it did, and its cause what is wrong.
        message = f"{error} {error.__cause__ or ''}"
        raise UserError(f"{command}: does not compose ({' '.join(message.split())})") from error
