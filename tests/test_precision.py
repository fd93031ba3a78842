"""``train_precision: auto``: bf16 where it is measured to pay, and the same again when the run goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from drpo.cli.main import app
from drpo.errors import UserError
from drpo.integrations.verl.overrides import overrides
from drpo.precision import time_in_bf16
from drpo.run import build
from drpo.run.checks import describe_load
from drpo.run.recipe import load_recipe
from support.rollouts import load_model

SMALL = ("rollouts=2", "checkpoint_every=1", "heldout_problems=4", "prompts_per_rollout=8", "train_precision=auto")


def test_a_pass_is_timed_and_leaves_no_gradient() -> None:
    model, _ = load_model()
    assert 0 < time_in_bf16(model) < 100
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hardware_without_bf16_is_not_timed_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model()
    forward, passes = type(model).forward, []

    def slow_in_bf16(self: Any, *inputs: Any, **options: Any) -> Any:
        passes.append(20 if torch.is_autocast_enabled("cpu") else 1)
        return forward(self, *inputs, **options)

    monkeypatch.setattr(type(model), "forward", slow_in_bf16)
    # On this clock a pass takes 1 second in fp32 and 20 in bf16.
    monkeypatch.setattr(time, "perf_counter", lambda: float(sum(passes)))
    assert time_in_bf16(model) == 20
    assert passes == [1, 1, 20]


@pytest.mark.parametrize(("share", "expected"), [(0.5, "bf16"), (0.95, "fp32"), (2.0, "fp32")])
def test_is_bf16_where_that_takes_less_time_by_a_tenth(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, share: float, expected: str
) -> None:
    monkeypatch.setattr(build, "time_in_bf16", lambda model: share)
    assert build.settle_precision(load_recipe(None, SMALL)).train_precision == expected
    assert f"takes {share:.2f} times as long in bf16 as in fp32: training in {expected}." in caplog.text


def test_a_run_goes_on_in_the_precision_that_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "time_in_bf16", lambda model: 0.5)
    options = [word for setting in SMALL for word in ("--set", setting)]
    train = ["train", *options, "--output", str(tmp_path / "run")]
    assert CliRunner().invoke(app, train).exit_code == 0
    assert load_recipe(tmp_path / "run" / "recipe.yaml").train_precision == "bf16"
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr(build, "time_in_bf16", lambda model: 2.0)
    resumed = CliRunner().invoke(app, [*train, "--resume"])
    assert resumed.exit_code == 0, resumed.output


def test_verl_has_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_precision: auto"):
        overrides(load_recipe(None, SMALL), tmp_path, train_rows=100, prompt_length=10, plain=True)


@pytest.mark.parametrize(("load", "threads", "is_said"), [(0.5, 2, False), (3.0, 2, True), (3.0, 1, False)])
def test_a_busy_machine_is_said_where_threads_wait(
    monkeypatch: pytest.MonkeyPatch, load: float, threads: int, is_said: bool
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert ("OMP_NUM_THREADS=1" in describe_load()) == is_said
