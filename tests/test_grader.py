"""The grader: what it says is right, and that no completion, thread or dead child keeps it from saying so."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from drpo.rewards import MathGrader, sandbox, worker
from drpo.rewards.math import STATUSES, _same_plain_integer

DATA = Path(__file__).parent / "data"
CASES = [json.loads(line) for line in (DATA / "math_cases.jsonl").read_text(encoding="utf-8").splitlines()]
GOLD = [json.loads(line)["answer"] for line in (DATA / "gold_answers.jsonl").read_text(encoding="utf-8").splitlines()]

HANG = r"\boxed{9^{9^{9^9}}}"
RIGHT = "$42$"
"""For the answer 42; not in a box, so that a child has to grade it."""

ADVERSARIAL = {
    "tower": HANG,
    "tower of tens": r"\boxed{10^{10^{10}}}",
    "factorial": r"\boxed{(10^{10})!}",
    "gcd": r"\boxed{\gcd(10^{5000},10^{6000})}",
    "factorials": r"\boxed{3" + "!" * 900 + "}",
    "binomial": r"\boxed{\binom{10^9}{5\cdot10^8}}",
    "integral": r"\boxed{\int_0^\infty e^{-x^{x^x}}\sin(\tan x^{17})dx}",
    "braces": "{" * 100_000,
    "parentheses": "(" * 10_000,
    "roots": r"\sqrt{2+" * 300,
    "commas": "1," * 200_000,
    "dollars": "$1$ " * 250_000,
    "nines": "9" * 1_000_000,
    "boxes": r"\boxed{1} " * 100_000,
    "brackets": r"\[" * 50_000,
    "expansion": r"\boxed{(1+x)^{100000}}",
    "full width": "\\boxed{４２}",
    "arabic": "\\boxed{٤٢}",
    "control characters": "\\boxed{\0\x1b[2J\x7f42}",
    "lone surrogate": "\ud800 \\boxed{42}",
    "code": r"\boxed{__import__('os').system('touch pwned')}",
    "empty": "",
    "python tower": "Answer: 9**9**9**9",
    "open boxes": r"\boxed{" * 3000,
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 400 + "2" + "}" * 401,
    "sum": r"\boxed{\sum_{k=1}^{10^9} \frac{1}{k^2}}",
    "product": r"\boxed{\prod_{k=1}^{10^7} k}",
}


def reference(name: str) -> str:
    return "x+1" if name == "expansion" else "42"


def generated(size: int, seed: int = 0) -> list[str]:
    """Expressions of a few random symbols, nested and repeated until they are out of proportion."""
    rng = random.Random(seed)

    def expression(depth: int) -> str:
        if depth == 0:
            return rng.choice(["9", "x", "10^{9}", str(rng.randint(2, 10**6)), "9" * rng.randint(10, 2000)])
        a, b = expression(depth - 1), expression(rng.randrange(depth))
        forms = (
            f"{a}^{{{b}}}", f"({a})!", f"\\binom{{{a}}}{{{b}}}", f"\\frac{{{a}}}{{{b}}}", f"\\sqrt[{b}]{{{a}}}",
            f"\\int_0^{{{b}}} {a} dx", f"\\sum_{{k=1}}^{{{b}}} {a}", f"\\gcd({a},{b})", f"\\{{{a},{b}\\}}", f"({a}+{b})^{{99}}",
            f"\\log_{{{a}}}{{{b}}}", f"{a}={b}", f"[{a},{b})", f"\\begin{{pmatrix}}{a}&{b}\\end{{pmatrix}}",
        )  # fmt: skip
        return rng.choice(forms)

    pieces = ["{", "}", "$", "\\[", "\\(", "\\boxed{", "1,", "answer ", "\\left(", "\\frac", "^", "\ud800", "\0", "９"]
    noise = ["".join(rng.choices(pieces, k=rng.randint(10, 60))) * rng.randint(1, 3000) for _ in range(size // 8)]
    return noise + [f"\\boxed{{{expression(rng.randint(1, 4))}}}" for _ in range(size - len(noise))]


@pytest.fixture(scope="module")
def graders():
    """A lenient and a strict one, for all tests: each process takes a second of a core to start."""
    graders = {strict: MathGrader(strict=strict, workers=2) for strict in (False, True)}
    yield graders
    for grader in graders.values():
        grader.close()


@pytest.fixture
def grader(graders):
    return graders[False]


@pytest.fixture
def impatient():
    """A second is not enough for hanging completions, and plenty for others."""
    grader = MathGrader(workers=2, time_limit=1.0)
    yield grader
    grader.close()


def statuses(grader: MathGrader, *completions: str, answer: str = "42") -> list[str]:
    return [grade.status for grade in grader.grade(completions, [answer] * len(completions))]


class TestVerdicts:
    @pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
    def test_are_those_pinned(self, graders, strict):
        grades = graders[strict].grade([case["completion"] for case in CASES], [case["reference"] for case in CASES])
        pinned = "strict" if strict else "lenient"
        assert len(CASES) >= 60
        assert [(case["completion"], grade.status) for case, grade in zip(CASES, grades, strict=True)] == [
            (case["completion"], case[pinned]) for case in CASES
        ]

    def test_of_strict_mode_are_never_right_by_leniency(self):
        assert [case for case in CASES if case["label"] == "wrong" and case["strict"] == "correct"] == []
        assert len([case for case in CASES if case["label"] == "wrong" and case["lenient"] == "correct"]) >= 10

    def test_that_deviate_from_the_labels_are_documented(self):
        page = (Path(__file__).parents[1] / "docs" / "math.md").read_text(encoding="utf-8")
        for case in CASES:
            if {(case[mode] == "correct") for mode in ("lenient", "strict")} != {case["label"] == "right"}:
                shown = case["completion"].replace("|", "\\|")
                row = f"| `{shown}` | `{case['reference']}` | {case['label']} | {case['lenient']} | {case['strict']} |"
                assert row in page, row

    @pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
    def test_of_gold_answers_against_themselves_are_correct(self, graders, strict):
        grades = graders[strict].grade([f"So \\boxed{{{answer}}}." for answer in GOLD], GOLD)
        assert [answer for answer, grade in zip(GOLD, grades, strict=True) if grade.status != "correct"] == []

    def test_told_from_the_text_alone_are_math_verify_s(self):
        rng = random.Random(0)
        around = ["so", " ", "\n\n", "$", "$$", "\\[", "\\]", "\\(", "\\)", "=", "x", "{", "}", "3", "answer", "is", ":",
                  "final answer is 7.", "final answer is $8$. I hope", "\\boxed{5}", "\\boxed{", ",", " and ", "%", "\\%", "\\frac{1}{2}", "**", "\\text{", "i\\hat{x}", "."]  # fmt: skip
        told = 0
        for _ in range(1500):
            box = f"\\boxed{{{rng.choice(['', '-'])}{rng.randint(0, 12)}}}"
            before, after = ("".join(rng.choices(around, k=rng.randint(0, 6))) for _ in range(2))
            text, answer = before + box + after, str(rng.randint(-12, 12))
            if (status := _same_plain_integer(text, answer)) is not None:
                told += 1
                assert (text, answer, worker.grade(answer, text, False)[0]) == (text, answer, status)
        assert told >= 600

    def test_take_the_end_of_a_long_completion(self, grader):
        assert statuses(grader, "\\boxed{41}" + "." * 10_000 + RIGHT, RIGHT + "." * 10_000) == ["correct", "no_answer"]

    def test_take_conversations_and_whole_gsm8k_solutions(self, grader):
        said = [{"role": "assistant", "content": RIGHT}]
        assert [g.status for g in grader.grade([said, said], ["6*7=<<6*7=42>>42\n#### 42", "#### 41"])] == [
            "correct",
            "wrong",
        ]


class TestScores:
    def test_are_given_to_right_and_wrong_alone_and_the_rest_is_a_setting(self):
        completions = ["\\boxed{42}", "\\boxed{41}", "", HANG, "9" * 6000]
        expected = ["correct", "wrong", "no_answer", "timeout", "error"]
        for settings, scores in (
            ({}, [1.0, 0.0, 0.0, 0.0, None]),
            ({"no_answer": -1.0, "timeout": None, "error": 0.25}, [1.0, 0.0, -1.0, None, 0.25]),
        ):
            grader = MathGrader(workers=1, time_limit=1.0, max_chars=8192, **settings)
            assert statuses(grader, *completions) == expected
            assert grader.counts == dict.fromkeys(expected, 1)
            assert grader(completions=completions[:3], answer=["42"] * 3) == scores[:3]
            assert [grader._grade(status).score for status in STATUSES] == scores
            grader.close()

    def test_come_with_the_shares_of_the_statuses_for_trl_s_log(self, grader):
        logged = {}
        grader(completions=[RIGHT, "$41$", "no", "no"], solution=["42"] * 4, log_metric=logged.__setitem__)
        assert logged == {
            "math/correct": 0.25, "math/wrong": 0.25, "math/no_answer": 0.5, "math/timeout": 0.0, "math/error": 0.0,
        }  # fmt: skip

    def test_without_a_verdict_are_logged(self, impatient, caplog):
        with caplog.at_level(logging.WARNING):
            impatient(completions=[HANG, RIGHT], answer=["42", "42"])
        assert [record.getMessage() for record in caplog.records] == [
            "math: of 2 completions 1 timeout (no verdict within 1 s)"
        ]

    @pytest.mark.parametrize(
        ("answers", "expected"),
        [(["42"], "shorter"), (["42", ""], "answer 1 is ''"), (["42", None], "answer 1 is None; expected text")],
    )
    def test_need_an_answer_for_each_completion(self, grader, answers, expected):
        with pytest.raises(ValueError, match=expected):
            grader.grade([RIGHT, RIGHT], answers)
        with pytest.raises(ValueError, match="expected a column 'answer' or 'solution'"):
            grader(completions=[RIGHT])

    @pytest.mark.parametrize("setting", [{"time_limit": 0}, {"memory_mb": 1}, {"max_chars": 0}, {"workers": 0}])
    def test_need_settings_in_range(self, setting):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}: got"):
            MathGrader(**setting)


class TestTexts:
    @pytest.mark.parametrize("number", [r"\boxed{-42}", r"so \boxed{142}", "The answer is -42."])
    @pytest.mark.parametrize("after", [" " * 4093, "\n" * 4093, " x" * 2047])
    def test_that_are_cut_are_not_cut_within_a_number(self, grader, number, after):
        for missing in range(6):
            assert statuses(grader, number + after[missing:])[0] in ("wrong", "no_answer")

    def test_without_content_have_no_answer(self, grader):
        message = {"role": "assistant"}
        for empty in (None, [], [message], [{**message, "content": None}], [{**message, "content": []}]):
            assert statuses(grader, empty) == ["no_answer"]
        parts = [{"type": "text", "text": "\\boxed{"}, {"type": "text", "text": "42}"}]
        assert statuses(grader, [{**message, "content": parts}]) == ["correct"]

    @pytest.mark.parametrize("setting", ["no_answer", "timeout", "error"])
    @pytest.mark.parametrize("score", [float("nan"), float("inf"), "0"])
    def test_get_no_score_that_is_none(self, setting, score):
        with pytest.raises(ValueError, match=f"{setting}: got {score!r}; expected a finite number"):
            MathGrader(**{setting: score})


class TestAdversarial:
    @pytest.mark.parametrize("threads", [0, 4], ids=["one call", "four threads"])
    def test_completions_are_answered_in_time_and_the_next_one_is_right(self, threads, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        # Enough for what does not hang; what does hang waits four at a time.
        grader = MathGrader(workers=4, time_limit=0.3)
        grader.grade([RIGHT] * 16, ["42"] * 16)

        def answer(request: tuple[str, str]) -> tuple[str, float, str]:
            started = time.monotonic()
            status = grader.grade([request[0]], [request[1]])[0].status
            return status, time.monotonic() - started, statuses(grader, RIGHT)[0]

        requests = [(text, reference(name)) for name, text in ADVERSARIAL.items()]
        requests += [(text, "42") for text in generated(100)]
        if threads:
            with ThreadPoolExecutor(threads) as pool:
                answered = list(pool.map(answer, requests))
        else:
            started = time.monotonic()
            completions, references = zip(
                *(pair for request in requests for pair in (request, (RIGHT, "42"))), strict=True
            )
            grades = [grade.status for grade in grader.grade(completions, references)]
            seconds = (time.monotonic() - started) / len(requests)
            answered = [(status, seconds, after) for status, after in zip(grades[::2], grades[1::2], strict=True)]
        # Whether any of them is an error depends on what the parser makes of them, and on the time it has.
        assert {"correct", "wrong", "timeout"} <= {status for status, _, _ in answered} <= set(STATUSES)
        assert max(seconds for _, seconds, _ in answered) < 5
        assert {after for _, _, after in answered} == {"correct"}
        assert answered[list(ADVERSARIAL).index("lone surrogate")][0] == "correct"
        assert list(tmp_path.iterdir()) == []
        deadline = time.monotonic() + 30
        for pid in grader.pids:
            # One that has just taken a killed one's place limits itself in a moment.
            while f"Max address space         {512 << 20} " not in Path(f"/proc/{pid}/limits").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.1)
        grader.close()

    def test_memory_beyond_the_limit_is_not_had(self):
        grader = MathGrader(workers=1, memory_mb=128)
        # 10^(4 * 10^8) takes 166 MB.
        assert statuses(grader, "Answer: 10**400000000", RIGHT)[1] == "correct"
        assert grader.counts["correct"] == 1
        grader.close()

    def test_a_full_pool_of_hanging_completions_starves_nobody(self, impatient):
        with ThreadPoolExecutor(2) as threads:
            hanging = threads.submit(statuses, impatient, *[HANG] * 4)
            time.sleep(0.1)
            started = time.monotonic()
            assert statuses(impatient, RIGHT) == ["correct"]
            assert time.monotonic() - started < 15
            assert hanging.result() == ["timeout"] * 4
        assert impatient.restarts == {"timeout": 4}


class TestChildren:
    def test_that_are_killed_while_idle_are_replaced(self, grader):
        before = grader.restarts["died"]
        assert statuses(grader, *[RIGHT] * 4) == ["correct"] * 4
        for pid in grader.pids:
            os.kill(pid, signal.SIGKILL)
        assert statuses(grader, *[RIGHT] * 4) == ["correct"] * 4
        assert grader.restarts["died"] > before

    def test_that_are_killed_at_work_cost_nobody_a_verdict(self):
        grader = MathGrader(workers=2, time_limit=1.0)
        assert statuses(grader, *[RIGHT] * 4) == ["correct"] * 4
        with ThreadPoolExecutor(1) as threads:
            work = threads.submit(statuses, grader, HANG, *["$41$", RIGHT] * 40)
            time.sleep(0.3)
            for pid in grader.pids:
                os.kill(pid, signal.SIGKILL)
            assert work.result() == ["timeout"] + ["wrong", "correct"] * 40
        assert grader.restarts["died"] >= 1
        assert grader.counts["error"] == 0
        grader.close()

    def test_stay_when_what_they_forked_overruns_or_is_killed(self):
        grader = MathGrader(workers=1, time_limit=2.0)
        assert statuses(grader, RIGHT, HANG, RIGHT) == ["correct", "timeout", "correct"]
        [pid] = grader.pids
        [forked] = _children(pid)
        os.kill(forked, signal.SIGKILL)
        assert statuses(grader, RIGHT) == ["correct"]
        with ThreadPoolExecutor(1) as threads:
            work = threads.submit(statuses, grader, HANG)
            time.sleep(0.3)
            [at_work] = _children(pid)
            os.kill(at_work, signal.SIGKILL)
            assert work.result() == ["timeout"]
        assert grader.pids == [pid]
        assert grader.restarts == {"timeout": 2, "died": 2}
        assert forked != at_work
        grader.close()

    def test_are_killed_with_what_they_forked_however_long_it_may_take(self):
        child = sandbox.Child(512)
        assert child.wait_until_ready()
        with ThreadPoolExecutor(1) as threads:
            work = threads.submit(child.ask, ["42", HANG, False], 60.0)
            time.sleep(0.5)
            [forked] = _children(child.process.pid)
            os.kill(child.process.pid, signal.SIGSTOP)
            child.kill()
            assert work.result()[0] == "died"
        deadline = time.monotonic() + 10
        while _runs(str(forked)):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_that_die_under_a_completion_twice_make_it_an_error(self, monkeypatch, tmp_path):
        script = Path(worker.__file__).read_text(encoding="utf-8")
        fatal = '    if "die" in request[1]:\n        sys.exit()\n    try:\n        return grade'
        (tmp_path / "worker.py").write_text(script.replace("    try:\n        return grade", fatal), encoding="utf-8")
        monkeypatch.setattr(sandbox, "_SCRIPT", tmp_path / "worker.py")
        grader = MathGrader(workers=1)
        assert statuses(grader, "die", RIGHT) == ["error", "correct"]
        assert grader.grade(["die"], ["42"])[0].detail == "its grading process died twice"
        grader.close()

    def test_that_are_stopped_are_killed(self, impatient):
        assert statuses(impatient, *[RIGHT] * 8) == ["correct"] * 8
        for pid in impatient.pids:
            os.kill(pid, signal.SIGSTOP)
        assert set(statuses(impatient, RIGHT, RIGHT)) == {"timeout"}
        assert statuses(impatient, RIGHT, RIGHT) == ["correct", "correct"]

    def test_that_cannot_grade_stop_everything(self, monkeypatch, tmp_path):
        (tmp_path / "math_verify.py").write_text("raise ImportError('no such luck')\n", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        grader = MathGrader(workers=2)
        with pytest.raises(RuntimeError, match="a grading process cannot grade: ImportError"):
            grader.grade([RIGHT], ["42"])
        assert grader.pids == []

    def test_that_cannot_start_stop_everything(self, monkeypatch):
        monkeypatch.setattr(sandbox, "_SCRIPT", Path("missing.py"))
        with pytest.raises(RuntimeError, match="grading processes die as they start"):
            MathGrader(workers=1).grade([RIGHT], ["42"])

    def test_that_swell_are_replaced(self, monkeypatch, tmp_path):
        script = Path(worker.__file__).read_text(encoding="utf-8")
        (tmp_path / "worker.py").write_text(script.replace("256 << 20", "1 << 20"), encoding="utf-8")
        monkeypatch.setattr(sandbox, "_SCRIPT", tmp_path / "worker.py")
        grader = MathGrader(workers=1)
        assert statuses(grader, RIGHT, RIGHT) == ["correct", "correct"]
        assert grader.restarts == {"memory": 2}
        grader.close()

    def test_are_not_taken_for_swollen_where_their_parent_is(self):
        ballast = b"x" * (400 << 20)
        grader = MathGrader(workers=1)
        assert statuses(grader, *[RIGHT] * 4) == ["correct"] * 4
        assert grader.restarts == {}
        assert len(ballast) == 400 << 20
        grader.close()

    def test_that_are_killed_as_they_start_are_replaced(self):
        grader = MathGrader(workers=1)
        with ThreadPoolExecutor(1) as threads:
            work = threads.submit(statuses, grader, RIGHT)
            killed: list[int] = []
            while len(killed) < 3:
                assert not work.done()
                for pid in set(grader.pids) - set(killed):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                time.sleep(0.01)
            assert work.result() == ["correct"]
        assert grader.restarts == {"died": 3}
        grader.close()

    def test_end_with_the_grader_and_are_started_anew_if_it_goes_on(self, impatient):
        statuses(impatient, RIGHT)
        [pid] = impatient.pids
        impatient.close()
        assert not Path(f"/proc/{pid}").exists()
        assert statuses(impatient, RIGHT) == ["correct"]

    def test_do_not_outlive_a_killed_parent(self):
        code = (
            "from drpo.rewards import MathGrader; g = MathGrader(workers=2, time_limit=1.0); g.grade(['$1$'] * 9, ['1'] * 9)\n"
            f"print(*g.pids, flush=True); g.grade([{HANG!r}] * 9, ['1'] * 9)"
        )
        parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        pids = parent.stdout.readline().split()
        time.sleep(0.3)
        parent.kill()
        parent.communicate()
        assert pids
        # Where nobody reaps orphans they stay behind as zombies.
        deadline = time.monotonic() + 10
        while any(_runs(pid) for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_are_not_shared_with_a_forked_process(self, grader):
        statuses(grader, *[RIGHT] * 4)
        before = (grader.pids, grader.restarts)
        pid = os.fork()
        if pid == 0:
            # Whatever happens, the rest of the tests is not for this process.
            signal.alarm(30)
            try:
                os._exit(0 if statuses(grader, RIGHT, "$41$") == ["correct", "wrong"] else 1)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert statuses(grader, RIGHT) == ["correct"]
        assert (grader.pids, grader.restarts) == before

    def test_stay_behind_when_the_grader_is_pickled(self, grader):
        statuses(grader, RIGHT)
        copy = pickle.loads(pickle.dumps(grader))
        assert (copy.workers, copy.pids) == (2, [])


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestVerl:
    @pytest.fixture(scope="class")
    @staticmethod
    def manager():
        omegaconf = pytest.importorskip("omegaconf")
        reward = pytest.importorskip("verl.trainer.ppo.reward")

        class Characters:
            def decode(self, ids, **_):
                return "".join(map(chr, ids.tolist()))

        custom = {
            "path": "pkg://drpo.integrations.verl.grader",
            "name": "compute_score",
            "reward_kwargs": {"time_limit": 1.0},
        }
        manager = {"source": "register", "name": "naive"}
        config = omegaconf.OmegaConf.create({"reward": {"custom_reward_function": custom, "reward_manager": manager}})
        return lambda: reward.load_reward_manager(config, Characters())

    def test_s_reward_manager_takes_the_grader(self, manager):
        import asyncio

        import torch
        from verl import DataProto

        def item(text: str):
            ids = torch.tensor([list(map(ord, text))])
            row = {"data_source": ["dapo"], "reward_model": [{"ground_truth": "42"}], "extra_info": [{}]}
            return DataProto.from_single_dict(
                {"responses": ids, "attention_mask": torch.ones_like(ids)}
                | {name: __import__("numpy").array(values, dtype=object) for name, values in row.items()}
            )

        async def score() -> list[dict]:
            managed = manager()
            return await asyncio.gather(*(managed.run_single(item(text)) for text in (RIGHT, "$41$", "no", HANG)))

        scored = asyncio.run(score())
        assert [one["reward_score"] for one in scored] == [1.0, 0.0, 0.0, 0.0]
        flags = [[status for status in STATUSES if one["reward_extra_info"][status]] for one in scored]
        assert flags == [["correct"], ["wrong"], ["no_answer"], ["timeout"]]
        assert [one["reward_extra_info"]["acc"] for one in scored] == [1.0, 0.0, 0.0, 0.0]


@pytest.fixture
def trained(tmp_path):
    """Train the built-in model with a reward function; the trainer afterwards."""

    def train(kind: str, reward: Any, steps: int) -> Any:
        import trl
        from datasets import Dataset

        import drpo
        from drpo.data.problems import builtin_problems
        from support.rollouts import config, load_model

        model, tokenizer = load_model()
        settings = {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_steps": steps,
            "max_completion_length": 20,
        }
        if kind == "DRPOTrainer":
            args, trainer_class = config(tmp_path, **settings, updates_per_rollout=1), drpo.DRPOTrainer
        else:
            plain = {"bf16": False, "report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
            args, trainer_class = trl.GRPOConfig(str(tmp_path), **plain, **settings), trl.GRPOTrainer
        problems = [vars(problem) for problem in builtin_problems("train", 8 * steps, seed=0)]
        trainer = trainer_class(
            model=model, reward_funcs=reward, args=args, train_dataset=Dataset.from_list(problems), processing_class=tokenizer
        )  # fmt: skip
        trainer.train()
        return trainer

    return train


class TestTrainers:
    @pytest.mark.parametrize("kind", ["DRPOTrainer", "GRPOTrainer"])
    def test_take_the_grader_and_log_its_counts(self, kind, trained):
        grader = MathGrader(workers=1)
        trainer = trained(kind, grader, steps=1)
        logged = next(row for row in trainer.state.log_history if "rewards/math/mean" in row)
        assert sum(grader.counts.values()) == 8
        assert sum(logged[f"math/{status}"] for status in STATUSES) == pytest.approx(1)
        grader.close()

    def test_go_on_while_children_are_killed_and_completions_hang(self, trained, impatient):
        def kill_all() -> None:
            for pid in impatient.pids:
                os.kill(pid, signal.SIGKILL)

        def reward(completions, log_metric=None, **_):
            kill_all()
            while impatient.pids:
                time.sleep(0.01)
            at_work = threading.Timer(0.3, kill_all)
            at_work.start()
            try:
                return impatient([HANG] * 2 + [RIGHT] * 6, ["42"] * 8, log_metric=log_metric)
            finally:
                at_work.join()

        trainer = trained("DRPOTrainer", reward, steps=2)
        rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
        assert rewards == [0.75, 0.75]
        assert impatient.counts == {"timeout": 4, "correct": 12}
        assert impatient.restarts["died"] >= 2
        assert impatient.restarts["timeout"] >= 2
        logged = [row["math/timeout"] for row in trainer.state.log_history if "math/timeout" in row]
        assert logged == [0.25, 0.25]


def test_importing_the_rewards_starts_and_loads_nothing_heavy():
    code = "import sys, drpo.rewards; print([m for m in ('torch', 'sympy', 'math_verify', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
