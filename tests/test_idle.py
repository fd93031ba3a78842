"""Rollouts that nothing can be trained on are said at once, counted, and told of at the end."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from drpo import DRPOConfig, DRPOTrainer
from drpo.cli import main as cli
from drpo.data.problems import MODEL_PATH, builtin_problems
from drpo.files import read_jsonl


def zero(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def by_prompt(prompts: list[str], **_: Any) -> list[float]:
    return [float(len(prompt) % 7) for prompt in prompts]


def one_differs(completions: list[str], **_: Any) -> list[float]:
    return [1.0, *([0.0] * (len(completions) - 1))]


def trained(folder: Path, reward: Any, rows: int = 8, **options: Any) -> DRPOTrainer:
    """A run of three rollouts of two prompts with four completions each, two updates on each rollout."""
    args = DRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=4, updates_per_rollout=2, max_steps=6,
        max_completion_length=3, logging_steps=1, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        **options,
    )  # fmt: skip
    problems = Dataset.from_list([vars(problem) for problem in builtin_problems("train", rows, seed=0)])
    trainer = DRPOTrainer(model=str(MODEL_PATH), reward_funcs=reward, args=args, train_dataset=problems)
    trainer.train()
    return trainer


def counts(trainer: DRPOTrainer, name: str) -> list[float | None]:
    return [row.get(f"untrained/{name}") for row in trainer.state.log_history if "loss" in row]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "nothing to train on" in record.getMessage()]


@pytest.mark.parametrize(("reward", "shown"), [(zero, " (all 0)"), (by_prompt, "")])
def test_equal_rewards_are_said_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reward: Any, shown: str
) -> None:
    trainer = trained(tmp_path, reward)
    assert counts(trainer, "equal_rewards") == [1, 1, 2, 2, 3, 3]
    assert counts(trainer, "all_masked") == [None] * 6
    assert warnings(caplog) == [
        "Rollout 1 has nothing to train on: the rewards of each prompt's completions were all equal, so that none had an "
        f"advantage{shown}."
    ]


def test_completions_without_a_token_that_counts_are_said_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A solution of the built-in task has more than three tokens: all are cut off.
    trainer = trained(tmp_path, one_differs, mask_truncated_completions=True)
    assert counts(trainer, "all_masked") == [1, 1, 2, 2, 3, 3]
    assert counts(trainer, "equal_rewards") == [None] * 6
    assert len(warnings(caplog)) == 1
    assert "Rollout 1 has nothing to train on: no token of a completion counted" in warnings(caplog)[0]


def test_rollouts_with_an_advantage_are_not_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trained(tmp_path, one_differs)
    assert counts(trainer, "equal_rewards") == [None] * 6
    assert warnings(caplog) == []


def test_an_objective_with_a_gradient_without_an_advantage_trains_on_equal_rewards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trained(tmp_path, zero, objective="pg_tv_penalty")
    assert trainer.objective.acts_without_advantage
    assert warnings(caplog) == []


def test_data_that_fills_no_rollout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_dataset has 1 rows, and a rollout takes 2 prompts \(8 completions"):
        trained(tmp_path, zero, rows=1)


def test_a_run_that_trained_on_nothing_says_so_in_its_summary_report_and_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nothing.py").write_text("def zero(completions, **_):\n    return [0] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    logging.getLogger("drpo").setLevel(logging.WARNING)
    small = ["rollouts=2", "prompts_per_rollout=2", "num_generations=4", "updates_per_rollout=2", "heldout_problems=4"]
    options = [part for field in (*small, "reward=nothing:zero") for part in ("--set", field)]
    monkeypatch.setattr(sys, "argv", ["drpo", "train", "--output", str(tmp_path / "run"), *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    sentence = (
        "Nothing to train on in 2 of 2 rollouts: the rewards of each prompt's completions were all equal, so that none had "
        "an advantage."
    )
    assert capsys.readouterr().out.splitlines()[-1] == sentence
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["untrained"] == sentence
    assert sentence.replace("'", "&#x27;") in (tmp_path / "run" / "report.html").read_text()
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["untrained/equal_rewards"] == 2
