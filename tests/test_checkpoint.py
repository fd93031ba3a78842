"""Checkpoints: whole or absent, exact wherever they are taken, and of one run."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from drpo.errors import TrainingInterruptedError, TrainingStoppedError
from drpo.rewards import exact_answer
from drpo.trainer.checkpoint import (
    MANIFEST,
    CheckpointError,
    check_same_run,
    checkpoints_in,
    delete_oldest,
    newest_checkpoint,
    verify,
)
from drpo.trainer.state_file import load_state, save_state
from drpo.trainer.trainer import DRPOTrainer
from support.rollouts import load_model, make_trainer

# A rollout is 4 updates: a checkpoint after 3, 6 or 9 has a half-used one.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "updates_per_rollout": 4,
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 3,
    "lr_scheduler_type": "linear",
    # With dropout, sampler and trainer differ from the first update on.
    "audit_threshold": 100.0,
}

DECIDING = ("model.safetensors", "optimizer.safetensors", "rank_0.safetensors")
"""Files of a last checkpoint that are the same, byte for byte, however often a run was interrupted."""


def with_dropout() -> Any:
    model, _ = load_model()
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return model


def make(folder: Path, problems: Dataset, **settings: Any) -> DRPOTrainer:
    return make_trainer(folder, problems, **{"model": with_dropout(), "disable_dropout": False, **SETTINGS, **settings})


@pytest.fixture(scope="module")
def whole(problems: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make(folder, problems).train()
    assert [path.name for path in checkpoints_in(folder)] == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-9",
        "checkpoint-10",
    ]
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A run that was killed after its ninth update."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-10")
    return folder


def assert_same_end(folder: Path, expected: Path) -> None:
    for name in DECIDING:
        assert (folder / "checkpoint-10" / name).read_bytes() == (expected / "checkpoint-10" / name).read_bytes(), name


class TestResuming:
    @pytest.mark.parametrize("update", [3, 6, 9])
    def test_within_a_rollout_ends_with_the_same_bytes(
        self, whole: Path, tmp_path: Path, problems: Dataset, update: int
    ) -> None:
        make(tmp_path, problems).train(resume_from_checkpoint=str(whole / f"checkpoint-{update}"))
        assert_same_end(tmp_path, whole)

    @pytest.mark.parametrize(
        "settings",
        [
            {"rollout_lag": 2},
            {"rollout_precision": "int8"},
            {"objective": "ppo"},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            {"num_train_epochs": 2, "max_steps": 10, "optim": "adafactor"},
        ],
        ids=lambda settings: "-".join(map(str, settings.values())),
    )
    def test_within_a_rollout_is_exact_with(self, tmp_path: Path, problems: Dataset, settings: dict[str, Any]) -> None:
        make(tmp_path / "whole", problems, **settings).train()
        make(tmp_path / "resumed", problems, **settings).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6")
        )
        assert_same_end(tmp_path / "resumed", tmp_path / "whole")

    def test_with_evaluations_before_the_first_update_and_right_after_it_is_exact(
        self, tmp_path: Path, problems: Dataset
    ) -> None:
        evaluations = {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "eval_on_start": True,
            "eval_dataset": problems.select([0]),
        }
        make(tmp_path / "whole", problems, **evaluations).train()
        make(tmp_path / "resumed", problems, **evaluations).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
        )
        assert_same_end(tmp_path / "resumed", tmp_path / "whole")

    def test_of_adapters_within_a_rollout_is_exact(self, tmp_path: Path, problems: Dataset) -> None:
        peft = pytest.importorskip("peft")

        def with_adapters(folder: Path) -> DRPOTrainer:
            torch.manual_seed(0)
            adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
            return make(folder, problems, peft_config=adapters)

        with_adapters(tmp_path / "whole").train()
        resumed = with_adapters(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
        for name in ("adapter_model.safetensors", *DECIDING[1:]):
            files = [tmp_path / folder / "checkpoint-10" / name for folder in ("whole", "resumed")]
            assert files[0].read_bytes() == files[1].read_bytes(), name

    @pytest.mark.parametrize("field", ["eos_token_id", "architectures", "dtype"])
    def test_takes_no_notice_of_what_training_completes_in_a_model_s_configuration(
        self, tmp_path: Path, problems: Dataset, field: str
    ) -> None:
        def incomplete() -> DRPOTrainer:
            model = with_dropout()
            setattr(model.config, field, None)
            return make(tmp_path, problems, model=model, max_steps=3)

        incomplete().train()
        incomplete().train(resume_from_checkpoint=True)

    def test_from_the_last_checkpoint_makes_no_update(self, whole: Path, tmp_path: Path, problems: Dataset) -> None:
        trainer = make(tmp_path, problems)
        trainer.train(resume_from_checkpoint=str(whole / "checkpoint-10"))
        assert trainer.state.global_step == 10
        saved = load_file(whole / "checkpoint-10" / "model.safetensors")
        assert all(torch.equal(trainer.model.state_dict()[name], weight) for name, weight in saved.items())

    def test_makes_the_updates_that_were_left_and_no_rollout_twice(
        self, whole: Path, tmp_path: Path, problems: Dataset
    ) -> None:
        sampled: list[int] = []

        def counting(prompts: list[str], **more: Any) -> list[float]:
            sampled.append(len(prompts))
            return exact_answer(prompts=prompts, **more)

        counting.__name__ = exact_answer.__name__
        make(tmp_path, problems, reward_funcs=counting).train(resume_from_checkpoint=str(whole / "checkpoint-6"))
        # Updates 7 and 8 are made on samples in the checkpoint; the rollout of 9 to 12 is new.
        assert sampled == [16]

    def test_goes_on_counting_skipped_updates(self, tmp_path: Path, problems: Dataset) -> None:
        trainer = make(tmp_path, problems, max_steps=3)
        trainer._guard.load_state_dict({"skipped": 7, "in_a_row": 0, "first_cause": "update 1: the loss is nan"})
        trainer.train()
        resumed = make(tmp_path, problems, max_steps=4)
        resumed.train(resume_from_checkpoint=True)
        assert resumed._guard.skipped == 7
        assert resumed.state.log_history[-2]["updates/skipped"] == 7


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "rank_0.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    MANIFEST,
)


class TestDamage:
    def test_is_looked_for_in_every_file(self, whole: Path) -> None:
        written = {path.name for path in (whole / "checkpoint-9").iterdir()}
        assert written <= set(FILES)
        assert len(written) >= 8

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("damage", [remove, empty, truncate, flip_a_bit])
    def test_is_named_and_the_checkpoint_before_is_taken(
        self, run: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
    ) -> None:
        file = run / "checkpoint-9" / name
        if not file.exists():
            pytest.skip("this model's checkpoints have no such file")
        damage(file)
        with caplog.at_level(logging.WARNING):
            assert newest_checkpoint(run) == run / "checkpoint-6"
        assert "Going on from checkpoint-6, since a newer one is damaged: " in caplog.text
        assert str(file) in caplog.text

    def test_is_survived_by_the_run_which_ends_with_the_same_bytes(
        self, whole: Path, run: Path, problems: Dataset, caplog: pytest.LogCaptureFixture
    ) -> None:
        flip_a_bit(run / "checkpoint-9" / "optimizer.safetensors")
        (run / "checkpoint-20").mkdir()
        with caplog.at_level(logging.WARNING):
            make(run, problems).train(resume_from_checkpoint=True)
        assert "optimizer.safetensors: has not the bytes that were written" in caplog.text
        assert f"{run / 'checkpoint-20' / MANIFEST}: is missing" in caplog.text
        assert_same_end(run, whole)
        assert verify(run / "checkpoint-9")["fingerprint"] == verify(whole / "checkpoint-9")["fingerprint"]

    def test_of_a_checkpoint_asked_for_by_name_is_refused(self, run: Path, problems: Dataset) -> None:
        truncate(run / "checkpoint-9" / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"model\.safetensors: has \d+ bytes; expected \d+"):
            make(run, problems).train(resume_from_checkpoint=str(run / "checkpoint-9"))

    def test_of_all_checkpoints_is_an_error_that_names_each(self, run: Path) -> None:
        for checkpoint in checkpoints_in(run):
            empty(checkpoint / MANIFEST)
        with pytest.raises(CheckpointError, match=r"no checkpoint that is whole: .*checkpoint-9/.*; .*checkpoint-3/"):
            newest_checkpoint(run)

    def test_of_the_same_size_goes_unnoticed_without_checksums(self, tmp_path: Path, problems: Dataset) -> None:
        make(tmp_path, problems, checkpoint_checksums=False, max_steps=6).train()
        flip_a_bit(tmp_path / "checkpoint-6" / "model.safetensors")
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
        truncate(tmp_path / "checkpoint-6" / "model.safetensors")
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"

    def test_nothing_pickled_is_read(self, run: Path, problems: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
        make(run, problems).train(resume_from_checkpoint=True)


class FillsTheDisk(TrainerCallback):
    """Has a function fail once an update is made."""

    def __init__(self, update: int, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.update, self.function, self.monkeypatch = update, function, monkeypatch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.update:
            self.monkeypatch.setattr(self.function, _fail)


def _fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestWriting:
    @pytest.mark.parametrize(
        "function",
        [
            "transformers.modeling_utils.safe_save_file",
            "drpo.trainer.checkpointed.save_state",
            "transformers.TrainerState.save_to_json",
            "os.fsync",
            "pathlib.Path.write_text",
            "os.rename",
        ],
    )
    def test_that_fails_leaves_the_checkpoints_before_and_no_debris(
        self, tmp_path: Path, problems: Dataset, monkeypatch: pytest.MonkeyPatch, function: str
    ) -> None:
        trainer = make(tmp_path, problems, callbacks=[FillsTheDisk(6, function, monkeypatch)])
        expected = r"checkpoint-6 cannot be written \(.*No space left on device\); the last one is .*checkpoint-3"
        with pytest.raises(TrainingStoppedError, match=expected):
            trainer.train()
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-3"]
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"

    def test_of_weights_that_are_not_finite_is_refused(self, tmp_path: Path, problems: Dataset) -> None:
        class Breaks(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                if state.global_step == 6:
                    with torch.no_grad():
                        model.lm_head.weight[0, 0] = torch.nan

        with pytest.raises(TrainingStoppedError, match="after update 6 the weights are not finite"):
            make(tmp_path, problems, callbacks=[Breaks()]).train()
        assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-3"]

    def test_what_a_killed_writer_left_is_removed_and_never_taken(self, run: Path, problems: Dataset) -> None:
        shutil.copytree(run / "checkpoint-9", run / ".unfinished" / "checkpoint-12")
        assert newest_checkpoint(run) == run / "checkpoint-9"
        make(run, problems).train(resume_from_checkpoint=True)
        assert not (run / ".unfinished").exists()

    @pytest.mark.parametrize("limit", [1, 2])
    def test_keeps_so_many_and_always_the_last_good_one(self, run: Path, problems: Dataset, limit: int) -> None:
        # A damaged one of a higher number is no reason to delete a good one.
        shutil.copytree(run / "checkpoint-3", run / "checkpoint-90")
        make(run, problems, save_total_limit=limit).train(resume_from_checkpoint=str(run / "checkpoint-9"))
        assert len(checkpoints_in(run)) == limit
        verify(run / "checkpoint-10")

    def test_of_an_optimizer_with_a_state_of_its_own_kind_is_refused(self, tmp_path: Path, problems: Dataset) -> None:
        pytest.importorskip("torchao")
        with pytest.raises(
            TrainingStoppedError, match=r"state\['optimizer'\].* is a OptimState8bit, which a checkpoint"
        ):
            make(tmp_path, problems, optim="adamw_torch_8bit").train()
        assert checkpoints_in(tmp_path) == []

    def test_of_a_run_is_newer_than_one_of_a_run_before_in_its_folder(self, run: Path, problems: Dataset) -> None:
        with pytest.raises(TrainingInterruptedError):
            make(run, problems, save_steps=2, callbacks=[Signals(signal.SIGTERM, 5)]).train()
        assert [path.name for path in checkpoints_in(run)] == [f"checkpoint-{update}" for update in (2, 3, 4, 5, 6, 9)]
        assert newest_checkpoint(run) == run / "checkpoint-5"
        make(run, problems, max_steps=6).train(resume_from_checkpoint=True)
        assert newest_checkpoint(run) == run / "checkpoint-6"

    def test_that_is_deleted_is_never_there_in_part(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: (folder / "checkpoint-3" / MANIFEST).unlink())
        delete_oldest(run, keep=2, but=set())
        assert [path.name for path in checkpoints_in(run)] == ["checkpoint-6", "checkpoint-9"]

    def test_takes_no_state_that_would_have_to_be_pickled(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a Path|state\['a'\]\[1\] is a PosixPath"):
            save_state(tmp_path / "state", {"a": [1, tmp_path]})

    def test_of_nested_state_brings_it_back(self, tmp_path: Path) -> None:
        shared = torch.arange(4.0)
        state = {
            0: {"step": torch.tensor(3), "betas": (0.9, 0.999)},
            "views": [shared[:2], shared[1:], shared],
            "none": None,
            "texts": ["\ud800", "$tensor"],
            "numbers": [0.1 + 0.2, float("inf"), 10**30, True],
            "empty": [(), {}, []],
        }
        save_state(tmp_path / "state", state)
        loaded = load_state(tmp_path / "state")
        assert all(torch.equal(a, b) for a, b in zip(loaded.pop("views"), state.pop("views"), strict=True))
        assert torch.equal(loaded[0].pop("step"), state[0].pop("step"))
        assert loaded == state
        assert type(loaded["numbers"][3]) is bool


class TestBest:
    """The best checkpoint, which the end of training goes back to: here the first, by the least tokens seen."""

    @staticmethod
    def make(folder: Path, problems: Dataset, **settings: Any) -> DRPOTrainer:
        best = {
            "eval_strategy": "steps",
            "eval_steps": 3,
            "eval_dataset": problems.select([0]),
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_num_tokens",
            "greater_is_better": False,
            "max_steps": 9,
        }
        return make(folder, problems, **{**best, **settings})

    @pytest.fixture
    def begun(self, problems: Dataset, tmp_path: Path) -> Path:
        folder = tmp_path / "begun"
        with pytest.raises(TrainingInterruptedError):
            self.make(folder, problems, callbacks=[Signals(signal.SIGTERM, 6)]).train()
        return folder

    @pytest.mark.parametrize("limit", [1, None])
    def test_is_found_where_the_run_was_moved_to(self, begun: Path, problems: Dataset, limit: int | None) -> None:
        moved = begun.rename(begun.with_name("moved"))
        trainer = self.make(moved, problems, save_total_limit=limit)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.best_model_checkpoint == str(moved / "checkpoint-3")
        best = load_file(moved / "checkpoint-3" / "model.safetensors")
        assert all(torch.equal(trainer.model.state_dict()[name], weight) for name, weight in best.items())

    def test_is_saved_where_an_evaluation_finds_it_between_two_saves(self, problems: Dataset, tmp_path: Path) -> None:
        # The number of tokens only grows: the first evaluation is the best.
        trainer = self.make(tmp_path / "run", problems, eval_steps=2, save_steps=4, max_steps=6)
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")

    def test_that_is_damaged_is_named(self, begun: Path, problems: Dataset) -> None:
        damaged = begun / "checkpoint-3" / "model.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-100] ^= 1
        damaged.write_bytes(content)
        with pytest.raises(TrainingStoppedError, match=r"best checkpoint is damaged.*model\.safetensors: has not the"):
            self.make(begun, problems).train(resume_from_checkpoint=True)


class TestAnotherRun:
    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"seed": 7}, "seed is 7, but the run of the checkpoint has 42"),
            ({"per_device_train_batch_size": 8}, "generation_batch_size is 32"),
            ({"learning_rate": 1e-3}, "learning_rate is 0.001"),
            ({"objective": "ppo"}, "objective is 'ppo'"),
            ({"objective_kwargs": {"delta": 0.3}}, "objective_kwargs is"),
            ({"temperature": 0.5}, "temperature is 0.5"),
            ({"rollout_lag": 1}, "rollout_lag is 1"),
        ],
        ids=str,
    )
    def test_of_other_options_is_not_resumed(
        self, run: Path, problems: Dataset, settings: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(CheckpointError, match=named):
            make(run, problems, **settings).train(resume_from_checkpoint=True)

    def test_on_other_data_is_not_resumed(self, run: Path, problems: Dataset) -> None:
        for other in (problems.select(range(31)), problems.map(lambda row: {"answer": row["answer"] + "0"})):
            with pytest.raises(CheckpointError, match=r"train_dataset is '3[12] rows, SHA-256"):
                make(run, other).train(resume_from_checkpoint=True)

    def test_on_the_same_data_stored_otherwise_is_resumed(self, whole: Path, run: Path, problems: Dataset) -> None:
        make(run, problems.select(range(31, -1, -1)).select(range(31, -1, -1))).train(resume_from_checkpoint=True)
        assert_same_end(run, whole)

    def test_with_another_reward_is_not_resumed(self, run: Path, problems: Dataset) -> None:
        def another(completions: list[str], **_: Any) -> list[float]:
            return [0.0] * len(completions)

        with pytest.raises(CheckpointError, match=r"reward_funcs is \['another'\]"):
            make(run, problems, reward_funcs=another).train(resume_from_checkpoint=True)

    def test_of_another_model_is_not_resumed(self, run: Path, problems: Dataset) -> None:
        model = with_dropout()
        model.config.rms_norm_eps = 1e-3
        with pytest.raises(CheckpointError, match=r"model\.rms_norm_eps is 0\.001"):
            make(run, problems, model=model).train(resume_from_checkpoint=True)

    def test_with_adapters_on_other_frozen_weights_is_not_resumed(self, tmp_path: Path, problems: Dataset) -> None:
        peft = pytest.importorskip("peft")
        adapters = peft.LoraConfig(r=4, target_modules=["q_proj"])
        make(tmp_path, problems, peft_config=adapters, max_steps=3).train()
        model = with_dropout()
        with torch.no_grad():
            model.model.embed_tokens.weight[5, 5] += 1e-6
        with pytest.raises(CheckpointError, match=r"model\.parameters is"):
            make(tmp_path, problems, peft_config=adapters, model=model).train(resume_from_checkpoint=True)

    @pytest.mark.parametrize("changed", [{"lora_alpha": 64}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=str)
    def test_with_other_adapters_of_the_same_shapes_is_not_resumed(
        self, tmp_path: Path, problems: Dataset, changed: dict[str, Any]
    ) -> None:
        peft = pytest.importorskip("peft")
        adapters = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
        make(tmp_path, problems, peft_config=peft.LoraConfig(**adapters), max_steps=3).train()
        with pytest.raises(CheckpointError, match=rf"peft\.default\.{next(iter(changed))} is"):
            make(tmp_path, problems, peft_config=peft.LoraConfig(**adapters, **changed)).train(
                resume_from_checkpoint=True
            )

    def test_with_another_chat_template_is_not_resumed(self, run: Path, problems: Dataset) -> None:
        trainer = make(run, problems)
        trainer.processing_class.chat_template = "{{ messages[0].content }}="
        with pytest.raises(CheckpointError, match="tokenizer is"):
            trainer.train(resume_from_checkpoint=True)

    def test_an_option_that_only_another_version_has_is_warned_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        then = {"versions.trl": "1.16", "seed": 1, "gone": 0}
        with caplog.at_level(logging.WARNING):
            check_same_run(tmp_path, then, {"versions.trl": "1.17", "seed": 1, "new": 0})
        assert [text in caplog.text for text in ("versions.trl is", "gone is None", "new is 0")] == [True] * 3
        with pytest.raises(CheckpointError, match="seed is 2"):
            check_same_run(tmp_path, then, {"versions.trl": "1.17", "seed": 2, "new": 0})
        with pytest.raises(CheckpointError, match="gone is None"):
            check_same_run(tmp_path, then, {"versions.trl": "1.16", "seed": 1})

    def test_on_another_number_of_processes_is_not_resumed(
        self, run: Path, problems: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = make(run, problems)
        fingerprint = trainer._make_fingerprint()
        monkeypatch.setattr(trainer, "_make_fingerprint", lambda: {**fingerprint, "processes": 2})
        with pytest.raises(CheckpointError, match="processes is 2, but the run of the checkpoint has 1"):
            trainer.train(resume_from_checkpoint=True)

    def test_other_versions_are_warned_of(
        self, run: Path, problems: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("drpo.trainer.fingerprint.versions", lambda: {"torch": "1.0"})
        with caplog.at_level(logging.WARNING):
            make(run, problems).train(resume_from_checkpoint=True)
        assert "versions.torch is '1.0', but the run of the checkpoint has" in caplog.text

    @pytest.mark.parametrize(
        "settings", [{"logging_steps": 5}, {"tokens_per_micro_batch": 64}, {"save_steps": 4}], ids=str
    )
    def test_what_changes_no_update_may_change(self, run: Path, problems: Dataset, settings: dict[str, Any]) -> None:
        make(run, problems, **settings).train(resume_from_checkpoint=True)

    def test_of_weights_alone_is_not_resumed(self, tmp_path: Path, problems: Dataset) -> None:
        make(tmp_path, problems, save_only_model=True, max_steps=3).train()
        with pytest.raises(CheckpointError, match="holds weights alone"):
            make(tmp_path, problems).train(resume_from_checkpoint=True)

    def test_without_a_checkpoint_is_an_error(self, tmp_path: Path, problems: Dataset) -> None:
        with pytest.raises(CheckpointError, match="holds no checkpoint to resume from"):
            make(tmp_path, problems).train(resume_from_checkpoint=True)


class Signals(TrainerCallback):
    def __init__(self, number: int, update: int) -> None:
        self.number, self.update = number, update

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.update:
            os.kill(os.getpid(), self.number)


@pytest.mark.usefixtures("heard")
class TestSignals:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_end_training_with_a_checkpoint_from_which_it_goes_on_exactly(
        self, whole: Path, tmp_path: Path, problems: Dataset, number: int, code: int
    ) -> None:
        handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        with pytest.raises(TrainingInterruptedError) as stopped:
            make(tmp_path, problems, callbacks=[Signals(number, 5)]).train()
        assert stopped.value.code == code
        assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-3", "checkpoint-5"]
        assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
        make(tmp_path, problems).train(resume_from_checkpoint=True)
        assert_same_end(tmp_path, whole)

    def test_end_training_without_a_checkpoint_where_none_is_wanted(self, tmp_path: Path, problems: Dataset) -> None:
        with pytest.raises(TrainingInterruptedError):
            make(tmp_path, problems, save_strategy="no", callbacks=[Signals(signal.SIGTERM, 2)]).train()
        assert checkpoints_in(tmp_path) == []

    def test_that_are_ignored_stay_so(self, tmp_path: Path, problems: Dataset) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        make(tmp_path, problems, max_steps=4, callbacks=[Signals(signal.SIGINT, 2)]).train()
        assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-3", "checkpoint-4"]

    def test_that_come_twice_end_training_at_once(self, tmp_path: Path, problems: Dataset) -> None:
        twice = [Signals(signal.SIGINT, 2), Signals(signal.SIGINT, 2)]
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, problems, callbacks=twice).train()
        assert checkpoints_in(tmp_path) == []


def test_a_manifest_says_what_was_written(whole: Path) -> None:
    manifest = json.loads((whole / "checkpoint-9" / MANIFEST).read_text())
    sizes = {name: file["size"] for name, file in manifest["files"].items()}
    assert sizes == {
        path.name: path.stat().st_size for path in (whole / "checkpoint-9").iterdir() if path.name != MANIFEST
    }
