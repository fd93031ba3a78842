"""``drpo doctor [RECIPE]``: whether a recipe would run here, and compute what it seems to ask for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from drpo.doctor.environment import check_hardware, check_packages
from drpo.doctor.findings import Finding
from drpo.doctor.grader import check_grader
from drpo.doctor.prompt import check_chat_template, check_end, check_prompts, load_prompting
from drpo.doctor.recipe import check_anchor, check_objective, check_off_policy, check_problems
from drpo.doctor.rollout import SET_ASIDE, check_rollout
from drpo.errors import UserError
from drpo.recipes import find_recipe
from drpo.run.build import load_problems, make_config, quiet_libraries, settle_precision
from drpo.run.recipe import Recipe, load_recipe
from drpo.trainer.config import DRPOConfig

T = TypeVar("T")


def examine_recipe(path: Path | None = None, overrides: Sequence[str] = (), *, rollout: bool = True) -> list[Finding]:
    """Everything that can be said of a recipe and this machine. Nothing is written but to a passing folder.

    Args:
        path: a recipe, or the name of one; the built-in one by default.
        overrides: ``key=value``, as of ``drpo train``.
        rollout: whether to load the weights and make a small rollout.

    Raises:
        UserError: there is no such file.
    """
    quiet_libraries()
    examination = _Examination()
    examination.check(check_packages)
    examination.check(check_hardware)
    if path is not None:
        find_recipe(path)
    recipe = examination.attempt(lambda: load_recipe(path, overrides))
    if recipe is not None:
        with tempfile.TemporaryDirectory() as scratch:
            examination.examine(recipe, scratch, rollout)
    return examination.findings


class _Examination:
    """Makes checks one by one. An error is a finding, and the checks that can go on do."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def attempt(self, make: Callable[[], T]) -> T | None:
        """What ``make`` returns; None where it fails."""
        try:
            return make()
        except UserError as error:
            self.findings.append(Finding.of_error(error))
        except Exception as error:  # what a library raises
            self.findings.append(Finding.of_error(error, f"{type(error).__name__}: "))
        return None

    def check(self, check: Callable[[], Iterable[Finding]]) -> None:
        """Keep what a check finds."""
        self.attempt(lambda: self.findings.extend(check()))

    def examine(self, recipe: Recipe, scratch: str, rollout: bool) -> None:
        """Check a recipe, first what needs no weights."""
        if recipe.train_precision == "auto":
            in_fp32 = recipe.model_copy(update={"train_precision": "fp32"})
            # A model that cannot be loaded is a finding; the other checks go on.
            recipe = (self.attempt(lambda: settle_precision(recipe)) if rollout else None) or in_fp32
        self.check(lambda: check_objective(recipe))
        self.check(lambda: check_off_policy(recipe))
        train = self.attempt(lambda: load_problems(recipe, "train", recipe.rollouts * recipe.prompts_per_rollout))
        heldout = self.attempt(lambda: load_problems(recipe, "heldout", recipe.heldout_problems))
        if train is not None:
            self.check(lambda: check_problems(recipe, train, heldout or []))
        reward = self.attempt(recipe.make_reward)
        config = self.attempt(lambda: _make_config(recipe, scratch))
        if config is None:
            return
        self.check(lambda: check_anchor(recipe, config))
        prompting = self.attempt(lambda: load_prompting(recipe, config))
        if prompting is None:
            return
        self.check(lambda: check_end(prompting))
        self.check(lambda: check_chat_template(prompting))
        if train is None:
            return
        self.check(lambda: check_prompts(train, heldout or [], prompting, config))
        if reward is None:
            return
        self.check(lambda: check_grader(reward, train, prompting.tokenizer))
        if not rollout:
            return
        if any(finding.verdict == "stop" for finding in self.findings):
            self.findings.append(Finding("warning", "rollout: not made", "the stops above, then drpo doctor once more"))
        else:
            self.check(lambda: check_rollout(recipe, reward, train, scratch))


def _make_config(recipe: Recipe, scratch: str) -> DRPOConfig:
    """The options of the run itself, some of which the doctor's own small rollout does without."""
    # What shards changes how every model of the process is loaded from then on.
    trainer = {name: value for name, value in recipe.trainer.items() if name not in SET_ASIDE}
    return make_config(recipe.model_copy(update={"trainer": trainer}), scratch, processes=1)
