"""The lab: its tasks and vocabulary, its statistics, its runs and what survives of them."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo import TokenBatch, make_objective
from drpo.data.arithmetic import MODEL_PATH
from drpo.data.problems import Problem
from drpo.errors import UserError
from drpo.lab import models
from drpo.lab.exact import moments, policies
from drpo.lab.grid import ARMS, CORE, PRESETS, TUNING_RATES, Run, best_rate, grid, only, plan_of, tuned
from drpo.lab.models import make_base_model
from drpo.lab.page import _at_chosen_rate, write_lab_page
from drpo.lab.runner import Lab
from drpo.lab.statistics import estimate, has_collapsed, interquartile_mean, probability_of_improvement
from drpo.lab.tasks import FILLERS, TASKS, Task, TaughtTask
from drpo.rewards import exact_answer

TAUGHT = {name: task for name, task in TASKS.items() if isinstance(task, TaughtTask)}
ARITHMETIC = TAUGHT["arithmetic"]


class TestTasks:
    @pytest.mark.parametrize("task", TAUGHT.values(), ids=TAUGHT)
    def test_a_solution_without_errors_is_right_and_one_with_errors_mostly_is_not(self, task: TaughtTask) -> None:
        rng = random.Random(0)
        exercises = [task.sample(rng) for _ in range(200)]
        answers = [exercise.answer for exercise in exercises]
        right, noisy = (
            sum(exact_answer([task.write(exercise, rng, rate) for exercise in exercises], answers)) / 200
            for rate in (0.0, 0.4)
        )
        assert right == 1.0
        assert noisy < 0.5

    @pytest.mark.parametrize("task", TAUGHT.values(), ids=TAUGHT)
    def test_solutions_fit_their_length(self, task: TaughtTask) -> None:
        tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
        tokenizer.add_tokens(FILLERS)
        rng = random.Random(0)
        lengths = [len(tokenizer(task.write(task.sample(rng), rng, 0.25))["input_ids"]) for _ in range(500)]
        assert max(lengths) < task.longest

    def test_fillers_are_one_token_each_and_follow_zipf_s_law(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
        tokenizer.add_tokens(FILLERS)
        assert len(tokenizer) >= 1000
        task, rng = ARITHMETIC, random.Random(0)
        ids = [tokenizer(task.write(task.sample(rng), rng, 0.0))["input_ids"][0] for _ in range(4000)]
        ranks = np.bincount(np.array(ids) - tokenizer.convert_tokens_to_ids(FILLERS[0]), minlength=len(FILLERS))
        # 1/k over the sum of 1/k up to 1000, which is 7.485.
        assert ranks[0] / 4000 == pytest.approx(1 / 7.485, abs=0.02)
        assert ranks[1] / 4000 == pytest.approx(0.5 / 7.485, abs=0.015)

    @pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
    def test_splits_share_no_question(self, task: Task) -> None:
        train, heldout = (
            {problem.prompt.rpartition("\n")[2] for problem in task.problems(split, 300, 0)}
            for split in ("train", "heldout")
        )
        assert not train & heldout

    def test_a_sum_comes_after_four_examples(self) -> None:
        for problem in TASKS["addition"].problems("train", 50, 0):
            *examples, question = problem.prompt.split("\n")
            first, second = map(int, question.removesuffix("=").split("+"))
            assert problem.answer == str(first + second)
            assert len(examples) == 4
            assert all(eval(left) == int(right) for left, right in (example.split("=") for example in examples))


class TestBaseModel:
    def test_experts_begin_as_the_dense_model(self) -> None:
        dense = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
        ids = torch.arange(3, 23).view(2, 10)
        mixture = models._mixture_of_experts(dense).eval()
        torch.testing.assert_close(mixture(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)

    def test_is_loaded_with_a_vocabulary_of_a_thousand(self, tmp_path: Path) -> None:
        make_base_model(tmp_path, ARITHMETIC, "dense", steps=2, error_rate=0.25)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert model.lm_head.out_features == len(tokenizer) > 1000

    def test_finds_the_problems_that_it_solves_now_and_then(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problems = [Problem("1+1=", "2"), Problem("2+2=", "4"), Problem("3+3=", "6")]
        rewards = [0.0, 0.0, 1.0, 0.0, 1.0, 1.0]
        monkeypatch.setattr(models, "_sample", lambda *_: (None, rewards))
        monkeypatch.setattr(models, "record_log_probs", lambda _: nullcontext())
        assert models.solvable(None, None, ARITHMETIC, problems, samples=2) == [problems[1]]


class TestStatistics:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([1.0, 2.0, 3.0, 4.0], 2.5),
            # Of thirds, the middle half takes 1/12, 1/3 and 1/12: (0 + 3/3 + 9/12) / (1/2).
            ([9.0, 0.0, 3.0], 3.5),
            ([7.0], 7.0),
        ],
    )
    def test_the_interquartile_mean_is_that_of_the_middle_half(self, values: list[float], expected: float) -> None:
        assert interquartile_mean(np.array(values)) == pytest.approx(expected)

    def test_an_interval_holds_its_value_and_shrinks_with_seeds(self) -> None:
        rng = np.random.default_rng(0)
        few, many = (estimate(rng.normal(0.5, 0.1, size)) for size in (5, 100))
        for interval in (few, many):
            assert interval.low <= interval.value <= interval.high
        assert many.high - many.low < few.high - few.low
        assert estimate([0.3]) == (0.3, 0.3, 0.3)

    @pytest.mark.parametrize(("seeds", "coverage"), [(5, 0.90), (3, 0.76)])
    def test_coverage_of_an_interval_of_few_seeds_is_that_of_the_docs(self, seeds: int, coverage: float) -> None:
        samples = np.random.default_rng(0).normal(size=(600, seeds))
        intervals = [estimate(sample) for sample in samples]
        assert np.mean([each.low <= 0 <= each.high for each in intervals]) == pytest.approx(coverage, abs=0.03)

    def test_improvement_counts_pairs_and_half_of_ties(self) -> None:
        # 3 against 1 and 2 wins, 2 against 1 wins, 2 against 2 ties: 3.5 of 4.
        assert probability_of_improvement([1, 2], [2, 3]).value == pytest.approx(3.5 / 4)

    def test_a_run_has_collapsed_below_half_of_its_best(self) -> None:
        assert has_collapsed([0.3, 0.8, 0.39])
        assert not has_collapsed([0.3, 0.8, 0.4])


class TestExact:
    """Over five tokens, where what is drawn can be counted."""

    LOG_PI = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64).log()
    LOG_MU = torch.tensor([0.3, 0.3, 0.2, 0.15, 0.05], dtype=torch.float64).log()
    ADVANTAGE = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0], dtype=torch.float64)

    @pytest.mark.parametrize("name", ["pg", "ppo", "spo", "drpo(0.2)", "dppo_tv(0.15)"])
    def test_moments_are_those_of_a_million_draws(self, name: str) -> None:
        objective = make_objective(ARMS[name].objective, **ARMS[name].hyperparameters)
        exact = moments(objective, self.LOG_PI, self.LOG_MU, self.ADVANTAGE)
        pi, size = self.LOG_PI.exp(), 1_000_000
        drawn = torch.multinomial(self.LOG_MU.exp(), size, replacement=True, generator=torch.Generator().manual_seed(0))
        logits = self.LOG_PI.expand(5, 5).clone().requires_grad_()
        log_pi = logits.log_softmax(dim=1).diagonal().unsqueeze(1)
        tokens = TokenBatch(log_pi, self.LOG_MU.unsqueeze(1), self.ADVANTAGE, torch.ones(5, 1))
        # Row v is the estimate of a token v: minus the gradient of its loss by the logits.
        (estimates,) = torch.autograd.grad(-objective.loss(tokens).sum(), logits)
        policy_gradient = pi * (self.ADVANTAGE - (pi * self.ADVANTAGE).sum())
        sampled = estimates[drawn]
        norm = policy_gradient.norm()
        assert exact.bias == pytest.approx(((sampled.mean(dim=0) - policy_gradient).norm() / norm).item(), abs=0.02)
        assert exact.deviation == pytest.approx((sampled.var(dim=0).sum().sqrt() / norm).item(), rel=0.01)
        assert sum(exact.second_moment_share) == pytest.approx(1)

    def test_the_surrogate_has_no_bias(self) -> None:
        exact = moments(make_objective("pg"), self.LOG_PI, self.LOG_MU, self.ADVANTAGE)
        assert exact.bias < 1e-12
        assert exact.cosine == pytest.approx(1)

    def test_the_vocabulary_has_the_paper_s_share_of_rare_tokens(self) -> None:
        shares = [policies("bf16", seed)[1].exp() for seed in range(20)]
        assert np.mean([mu[mu <= 0.01].sum() for mu in shares]) == pytest.approx(0.078, abs=0.01)


class TestPage:
    def test_reports_an_arm_at_the_rate_of_its_first_seed_by_the_others(self) -> None:
        by_rate = {
            rate: [{"seed": seed, "accuracy": [0.0, accuracy]} for seed, accuracy in enumerate(accuracies)]
            for rate, accuracies in ((1e-4, [0.5, 0.9, 0.9]), (2e-4, [0.6, 0.1]), (3e-4, [0.4]))
        }
        rate, rows = _at_chosen_rate(by_rate)
        assert (rate, [row["accuracy"][1] for row in rows]) == (2e-4, [0.1])
        assert _at_chosen_rate({3e-4: by_rate[3e-4]}) == (3e-4, by_rate[3e-4])


class TestGrid:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_every_run_of_a_preset_is_a_recipe(self, preset: str, tmp_path: Path) -> None:
        runs = plan_of(preset)({})
        assert len(set(runs)) == len(runs)
        for run in {(run.setting, run.arm, run.updates): run for run in runs}.values():
            run.recipe(tmp_path)

    def test_arms_of_a_preset_get_the_same_learning_rates(self) -> None:
        for preset in PRESETS:
            rates: dict[tuple[str, str], set[float]] = {}
            for run in plan_of(preset)({}):
                rates.setdefault((run.setting, run.arm), set()).add(run.learning_rate)
            for setting in {setting for setting, _ in rates}:
                core = {frozenset(rates[setting, arm]) for arm in CORE if (setting, arm) in rates}
                assert len(core) <= 1, (preset, setting)

    def test_a_comparison_goes_on_at_the_rate_that_suited_each_arm_with_seeds_that_did_not_choose_it(self) -> None:
        tuning = tuned("bf16", {})
        assert {run.seed for run in tuning} == {0}
        # pg does best at the lowest rate, drpo(0.2) at the highest, and a run that failed counts as the worst.
        areas = dict.fromkeys(tuning, 0.3)
        areas[Run("bf16", "pg", TUNING_RATES[0])] = 0.4
        areas[Run("bf16", "drpo(0.2)", TUNING_RATES[2])] = 0.4
        del areas[Run("bf16", "ppo", TUNING_RATES[1])]
        chosen = [run for run in tuned("bf16", areas) if run not in tuning]
        rates = {arm: {run.learning_rate for run in chosen if run.arm == arm} for arm in ("pg", "drpo(0.2)", "ppo")}
        assert rates == {"pg": {TUNING_RATES[0]}, "drpo(0.2)": {TUNING_RATES[2]}, "ppo": set()}
        assert {run.seed for run in chosen if run.arm == "pg"} == {1, 2, 3, 4, 5}
        assert {run.seed for run in chosen if run.arm == "cispo"} == {1, 2, 3}
        assert best_rate("bf16", "ppo", areas) is None

    def test_a_plan_can_be_cut_down_to_a_setting(self) -> None:
        assert {run.setting for run in only(["bf16", "sanity"], plan_of("settings"))({})} == {"bf16", "sanity"}
        with pytest.raises(UserError, match="unknown setting 'bf61'; did you mean 'bf16'"):
            only(["bf61"], plan_of("settings"))

    def test_a_seed_of_all_comes_before_the_next(self) -> None:
        runs = grid(("fp32",), CORE, (1e-4, 2e-4), seeds=range(2))
        assert [run.seed for run in runs] == [0] * 14 + [1] * 14
        assert {run.arm for run in runs} <= set(ARMS)


@pytest.mark.long
class TestRuns:
    @pytest.fixture
    def lab(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
        monkeypatch.setattr(ARITHMETIC, "batches", 2)
        return Lab(tmp_path / "lab")

    def test_that_are_there_are_not_made_again_and_a_killed_worker_costs_only_time(self, lab: Lab) -> None:
        runs = grid(("fp32",), ("pg", "drpo(0.2)"), (1e-4,), (4,), seeds=range(1), rollouts=2)
        killer = threading.Thread(target=_kill_a_child, args=(time.time() + 120,), daemon=True)
        killer.start()
        lab.run(lambda _: runs, jobs=1)
        rows = lab.rows()
        assert [row["status"] for row in rows] == ["finished", "finished"]
        assert {row["arm"] for row in rows} == {"pg", "drpo(0.2)"}
        assert all(len(row["reward"]) == 2 and len(row["accuracy"]) == 3 for row in rows)
        assert not any(str(lab.path) in row["recipe"] for row in rows)
        assert lab.missing(runs) == []
        lab.run(lambda _: runs, jobs=1)
        assert lab.rows() == rows
        page = lab.path / "lab.html"
        write_lab_page(lab, page)
        assert "drpo(0.2)" in page.read_text()


def _kill_a_child(deadline: float) -> None:
    """Kill the first process that this one starts, once it is at work."""
    while time.time() < deadline:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        for child in children:
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                time.sleep(3)
                os.kill(int(child), signal.SIGKILL)
                return
        time.sleep(0.2)
