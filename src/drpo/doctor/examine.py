"""``drpo doctor [RECIPE]``: whether a recipe would run here, and compute what it seems to ask for."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from drpo.doctor import environment, model
from drpo.doctor import recipe as of_recipe
from drpo.doctor.chat_template import check_chat_template
from drpo.doctor.data import check_grader, check_problems, check_prompts, prompt_lengths, stand_ins
from drpo.doctor.findings import Finding
from drpo.doctor.fixes import refused
from drpo.doctor.memory import check_memory
from drpo.doctor.rollout import check_rollout
from drpo.doctor.weights import check_weights
from drpo.errors import UserError
from drpo.run.build import load_problems, make_config, quiet_libraries
from drpo.run.options import refuse_together
from drpo.run.recipe import Recipe, load_recipe
from drpo.trainer.config import DRPOConfig

T = TypeVar("T")

_OF_VERL = ("actor_rollout_ref", "defaults", "hydra")
"""Fields that a configuration of verl begins with."""

Begin = Callable[[str], object]


def examine(
    path: Path | None = None, overrides: Sequence[str] = (), *, rollout: bool = True, begin: Begin = lambda _: None
) -> list[Finding]:
    """Everything that can be said of a recipe and this machine. Nothing is written but to a passing folder.

    Args:
        path: a recipe; the built-in one by default.
        overrides: ``key=value``, as of ``drpo train``.
        rollout: whether to load the weights and make a small rollout.
        begin: is told the name of each step.

    Raises:
        UserError: there is no such file.
    """
    checks = _Checks(begin)
    with _quiet():
        checks.run("packages", environment.check_packages)
        checks.run("extras", environment.check_extras)
        checks.run("hardware", environment.check_hardware)
        checks.run("plug-ins", environment.check_plug_ins)
        try:
            recipe = load_recipe(path, overrides)
        except UserError as error:
            if path is not None and not os.path.isfile(path):
                raise
            found = refused(error)
            if any(f"unknown field {name!r}" in found.what for name in _OF_VERL):
                found = replace(found, fix=f"drpo doctor --verl {path}, if it is verl's")
            return [*checks.findings, found]
        with tempfile.TemporaryDirectory() as scratch:
            _examine(recipe, scratch, rollout, checks)
    return checks.findings


def _examine(recipe: Recipe, scratch: str, rollout: bool, checks: _Checks) -> None:
    config = checks.attempt("trainer", lambda: _config(recipe, scratch))
    has_needs = checks.run("needs", lambda: environment.check_needs(recipe, config))
    checks.run("objective", lambda: of_recipe.check_objective(recipe))
    checks.run("anchor", lambda: of_recipe.check_anchor(recipe, config))
    checks.run("audit", lambda: of_recipe.check_threshold(recipe))
    reward = checks.attempt("reward", recipe.make_reward)

    train = checks.attempt("task", lambda: load_problems(recipe, "train", recipe.rollouts * recipe.prompts_per_rollout))
    heldout = checks.attempt("task", lambda: load_problems(recipe, "heldout", recipe.heldout_problems))
    if train is not None:
        checks.run("task", lambda: check_problems(recipe, train, heldout or []))
    problems = train or stand_ins()

    # Adapters that cannot be made are among the needs.
    blank = (
        checks.attempt("model", lambda: model.load_blank(recipe, config)) if has_needs or recipe.lora is None else None
    )
    is_templated = is_graded = fits = False
    if blank is not None:
        fits = checks.run("tokenizer", lambda: model.check_tokenizer(blank))
        is_templated = checks.run("chat template", lambda: check_chat_template(blank))
        checks.run("dropout", lambda: model.check_dropout(blank))
        if reward is not None:
            is_graded = checks.run("grader", lambda: check_grader(reward, problems, blank.tokenizer))
        if is_templated:
            checks.run("prompt", lambda: check_prompts(problems, blank))
    if config is not None:
        checks.run("updates", lambda: of_recipe.check_updates(recipe, config))
    if blank is not None and config is not None:
        checks.run("sampling", lambda: model.check_sampling(blank, config))
        if not config.use_vllm:
            fits &= checks.run("sampling", lambda: model.check_generation(blank))
        checks.run("lora", lambda: model.check_adapters(blank, recipe))
        fits &= checks.run("weights", lambda: check_weights(blank, recipe, config))
        lengths = checks.attempt("prompt", lambda: prompt_lengths(problems, blank)) if is_templated else None
        if lengths:
            fits &= checks.run("length", lambda: model.check_positions(blank, config, lengths))
        fits &= checks.run("memory", lambda: check_memory(blank.policy, config, max(lengths or [0])))
    if not rollout:
        return
    if reward is not None and config is not None and has_needs and is_templated and is_graded and fits:
        checks.run("rollout", lambda: check_rollout(recipe, reward, problems, scratch))
    else:
        checks.findings.append(Finding("warning", "rollout: not made", "the stops above, then drpo doctor once more"))


def _config(recipe: Recipe, scratch: str) -> DRPOConfig:
    refuse_together(recipe, recipe.trainer)
    # DeepSpeed's settings change how every model of the process is loaded from then on.
    trainer = {name: value for name, value in recipe.trainer.items() if name != "deepspeed"}
    return make_config(recipe.model_copy(update={"trainer": trainer}), scratch, processes=1)


class _Checks:
    """Runs checks one by one; one that fails is a finding, and the next one's turn."""

    def __init__(self, begin: Begin) -> None:
        self.findings: list[Finding] = []
        self._begin = begin

    def attempt(self, name: str, make: Callable[[], T]) -> T | None:
        """What ``make`` returns; None where it fails."""
        self._begin(name)
        try:
            return make()
        except UserError as error:
            self.findings.append(refused(error))
        except (Exception, SystemExit) as error:  # a fault that nobody thought of is a finding too
            self.findings.append(refused(RuntimeError(f"{type(error).__name__}: {str(error)[:500]}"), name))
        return None

    def run(self, name: str, check: Callable[[], Iterable[Finding]]) -> bool:
        """Keep what a check finds; whether nothing of it is a stop."""
        found = self.attempt(name, lambda: list(check()))
        self.findings += found or []
        return found is not None and all(finding.verdict != "stop" for finding in found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Findings are all there is to say, and no library's notices."""
    quiet_libraries()
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
