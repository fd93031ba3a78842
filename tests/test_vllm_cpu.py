"""vLLM's CPU build as the engine of the rollouts: how far it is from the trainer, that training keeps it there, and that a fault shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from drpo.data.problems import builtin_problems
from drpo.files import read_jsonl
from drpo.report import write_report
from drpo.rollout.audit import EXACT_THRESHOLD, AuditError
from drpo.run.folder import RunFolder
from drpo.run.recipe import load_recipe
from drpo.run.train import train
from support.browser import BROWSER, opened
from support.rollouts import MODEL, load_model, make_trainer
from support.vllm_cpu.engine import PYTHON, Engine
from test_report import parse

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not PYTHON.parents[1].joinpath("installed").is_file(),
        reason="vLLM's environment is not installed: make .venv-vllm/installed, which needs a network",
    ),
]

# What two fp32 engines differ by, in |π − μ| and in nats.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(MODEL) as engine:
        yield engine


@pytest.fixture(scope="module")
def bf16() -> Iterator[Engine]:
    with Engine(MODEL, dtype="bfloat16") as engine:
        yield engine


@pytest.fixture(scope="module")
def problems() -> Dataset:
    return Dataset.from_list([vars(problem) for problem in builtin_problems("train", 64, seed=0)])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("moved", [False, True], ids=["as saved", "after a sync"])
def test_the_log_probs_are_those_of_what_was_sampled_from(engine: Engine, temperature: float, moved: bool) -> None:
    model, tokenizer = load_model()
    torch.manual_seed(0)
    if moved:
        # Every parameter: one that the engine does not take shows.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    engine.load(model)
    prompt_ids = tokenizer(["10+34-6+29-38=", "1+2="])["input_ids"] * 16
    asked = {"prompt_ids": prompt_ids, "stop_ids": [tokenizer.eos_token_id], "max_tokens": 8, "seed": 0}
    answer = engine.ask("generate", {**asked, "temperature": temperature})
    assert len({tuple(ids) for ids in answer["completion_ids"]}) > 2
    for prompt, completion, log_probs in zip(prompt_ids, answer["completion_ids"], answer["logprobs"], strict=True):
        assert tokenizer.eos_token_id not in completion[:-1]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(dim=1).gather(1, torch.tensor(completion).unsqueeze(1))
        assert log_probs == pytest.approx(expected.squeeze(1).tolist(), abs=1e-4)
    assert engine.ask("generate", {**asked, "temperature": temperature}) == answer


def test_an_engine_that_cannot_start_says_why() -> None:
    with Engine("/no/such/model") as engine, pytest.raises(RuntimeError, match=r"(?s)vLLM has died:\n.*no/such/model"):
        engine.ask("load", "/no/such/folder")


def logged(output: Path, problems: Dataset, engine: Engine, **settings: Any) -> list[dict[str, float]]:
    """Four rollouts of two updates each."""
    few = {"per_device_train_batch_size": 64, "updates_per_rollout": 2, "max_steps": 8, "learning_rate": 1e-3}
    given = {**few, "split_distance": True, "drop_zero_advantage": False, **settings}
    trainer = make_trainer(output, problems, rollout_func=engine.rollout, **given)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def test_before_any_update_fp32_is_rounding_and_bf16_is_not(
    tmp_path: Path, problems: Dataset, engine: Engine, bf16: Engine
) -> None:
    exact = {"max_steps": 2, "audit_threshold": EXACT_THRESHOLD}
    first, *_ = logged(tmp_path / "fp32", problems, engine, **exact)
    low, *_ = logged(tmp_path / "bf16", problems, bf16, max_steps=2)
    for row in (first, low):
        names = ("divergence/mean", "divergence/p99", "engine/divergence/mean", "audit/logp_difference_mean")
        print({name: f"{row[name]:.2g}" for name in names})
        assert row["engine/divergence/mean"] == pytest.approx(row["divergence/mean"], rel=0.01)
    assert first["divergence/mean"] < first["divergence/p99"] < ROUNDING
    assert 10 * ROUNDING < low["divergence/mean"] < low["divergence/p99"] < 0.05


@pytest.mark.parametrize(
    "sampling", [{"top_p": 0.9}, {"top_k": 3}, {"top_p": 0.8, "top_k": 4, "temperature": 0.7}], ids=str
)
def test_filters_are_replayed_so_that_ratios_are_one_before_an_update(
    tmp_path: Path, problems: Dataset, engine: Engine, sampling: dict[str, Any]
) -> None:
    replay = {"replay_support": True, "audit_threshold": EXACT_THRESHOLD, "max_steps": 2, **sampling}
    first, second = logged(tmp_path, problems, engine, **replay)
    assert first["divergence/p99"] < ROUNDING < second["divergence/mean"]
    assert max(abs(first[name] - 1) for name in ("ratio/max", "ratio/mean")) < 1e-4


def test_with_weights_in_step_only_updates_move_the_policies_apart(
    tmp_path: Path, problems: Dataset, engine: Engine
) -> None:
    for update, row in enumerate(logged(tmp_path, problems, engine, audit_threshold=EXACT_THRESHOLD)):
        assert row["engine/divergence/mean"] < ROUNDING
        assert (row["drift/divergence/mean"] > ROUNDING) == (update % 2 == 1)


def test_weights_that_were_not_sent_are_named_at_the_second_rollout_or_show_as_a_gap_of_the_engine(
    tmp_path: Path, problems: Dataset
) -> None:
    with Engine(MODEL, syncs=False) as stale:
        rows = logged(tmp_path, problems, stale, audit_threshold=EXACT_THRESHOLD, stale_sampler="warn")
        with pytest.raises(AuditError, match="the sampler did not get the new weights"):
            logged(tmp_path, problems, stale, audit_threshold=EXACT_THRESHOLD)
    gaps = [row["engine/divergence/mean"] for row in rows[::2]]
    print(f"{gaps}")
    # The first audit passes: the weights were the same when it was made.
    assert gaps[0] < ROUNDING
    assert min(gaps[1:]) > 1e-3


def test_a_run_learns_from_its_log_probs_and_its_report_has_the_gap(tmp_path: Path, engine: Engine) -> None:
    settings = ("rollouts=40", "learning_rate=1e-4", "trainer.split_distance=true", "heldout_samples=1")
    recipe = load_recipe(None, [*settings, f"audit_threshold={EXACT_THRESHOLD}"])
    folder = RunFolder(tmp_path / "run")
    summary = train(recipe, folder, rollout_func=engine.rollout)
    print(f"held-out accuracy {summary['accuracy_before']} to {summary['accuracy_after']}")
    assert summary["accuracy_before"] <= 0.4
    assert summary["accuracy_after"] >= 0.7
    gaps = [row["engine/divergence/mean"] for row in read_jsonl(folder.metrics) if "engine/divergence/mean" in row]
    assert 0 < max(gaps) < ROUNDING
    write_report([folder], folder.report)
    page = parse(folder.report.read_text(encoding="utf-8"))
    row = page.cells[page.cells.index("engine") :]
    last = {
        r["rollout"]: r["engine/divergence/mean"] for r in read_jsonl(folder.metrics) if "engine/divergence/mean" in r
    }
    assert row[1:3] == [f"{last[1]:.4g}", f"{last[40]:.4g}"]
    if BROWSER is not None:
        document, console = opened(folder.report, tmp_path / "profile")
        assert console == []
        assert "Where the distance comes from" in document
