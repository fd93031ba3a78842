"""A reward function that fails: training goes on by a stated rule, or stops with one line that names the function and the row."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from drpo.cli import main as cli
from drpo.errors import RewardError, TrainingStoppedError, UserError
from drpo.rewards import Weighted, checked_scores, exact_answer
from drpo.trainer.trainer import DRPOTrainer
from support import failing_ranks
from support.rollouts import make_trainer

TEXTS = ["first", "second", "third"]


class Number:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __float__(self) -> float:
        return self.value if isinstance(self.value, float) else 1 / 0


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


class Stop(BaseException):
    pass


class BrokenList(list):
    def __len__(self) -> int:
        raise OSError("no length")


async def coroutine(scores: Any) -> Any:
    return scores


GO_ON: dict[str, tuple[Any, list[float | None]]] = {
    "whole numbers": ([1, 0, 2], [1, 0, 2]),
    "a tuple": ((1.0, 0.5, 0.0), [1, 0.5, 0]),
    "bools": ([True, False, True], [1, 0, 1]),
    "an array of bools": (np.array([True, False, True]), [1, 0, 1]),
    "numpy's numbers": ([np.float32(0.5), np.int64(2), np.bool_(True)], [0.5, 2, 1]),
    "a tensor": (torch.tensor([1.0, 0.5, 0.0]), [1, 0.5, 0]),
    "a bf16 tensor with a gradient": (torch.ones(3, dtype=torch.bfloat16, requires_grad=True), [1, 1, 1]),
    "tensors of no dimension": ([torch.tensor(1.0), torch.tensor(0), torch.tensor(True)], [1, 0, 1]),
    "decimals and fractions": ([Decimal("0.5"), Fraction(1, 4), Decimal(-1)], [0.5, 0.25, -1]),
    "what is a number by __float__": ([Number(0.5), 0.0, 1.0], [0.5, 0, 1]),
    "None among numbers": ([None, 1.0, None], [None, 1, None]),
    # Another function may score them.
    "None alone": ([None, None, None], [None, None, None]),
    "a coroutine": (lambda: coroutine([1.0, 0.0, 1.0]), [1, 0, 1]),
    "the largest": ([1e9, -1e9, 0.0], [1e9, -1e9, 0]),
}
"""What a function returns, and the scores taken from it."""

STOP: dict[str, tuple[Any, str]] = {
    "None": (None, "returned a NoneType; expected a list of 3, one a completion"),
    "a number": (1.0, "returned a float; expected a list of 3"),
    "text": ("abc", "returned a str; expected a list of 3"),
    "a mapping": ({0: 1.0, 1: 0.0, 2: 1.0}, "returned a dict"),
    "a set": ({1.0, 2.0, 3.0}, "returned a set"),
    "a generator": (lambda: (score for score in (1.0, 0.0, 1.0)), "returned a generator"),
    "a coroutine's text": (lambda: coroutine("abc"), "returned a str"),
    "too few": ([1.0], "returned 1 scores; expected a list of 3"),
    "too many": ([1.0] * 4, "returned 4 scores; expected a list of 3"),
    "none": ([], "returned 0 scores"),
    "a scalar tensor": (torch.tensor(1.0), "returned a float"),
    "too short a tensor": (torch.ones(2), "returned 2 scores"),
    "a column": (torch.ones(3, 1), "returned [1.0] for completion 0, 'first'; expected a number of magnitude 1e+09"),
    "nested lists": ([[1.0], [0.0], [1.0]], "returned [1.0] for completion 0, 'first'"),
    "tensors of one element": ([torch.ones(1)] * 3, "returned [1.0] for completion 0"),
    "number words": ([1.0, "1.0", 0.0], "returned '1.0' for completion 1, 'second'"),
    "bytes": ([b"1", 1.0, 1.0], "returned b'1' for completion 0"),
    "NaN": ([0.0, 1.0, math.nan], "returned nan for completion 2, 'third'"),
    "numpy's NaN": (np.array([np.nan, 0, 0], dtype=np.float32), "returned nan for completion 0"),
    "infinity": ([0.0, math.inf, 0.0], "returned inf for completion 1"),
    "minus infinity": ([0.0, -math.inf, 0.0], "returned -inf for completion 1"),
    "beyond fp32": ([1e300, 0.0, 0.0], "returned 1e+300 for completion 0"),
    "an infinite decimal": ([Decimal("-Infinity"), 0.0, 0.0], "returned Decimal('-Infinity') for completion 0"),
    "a signaling NaN": ([Decimal("sNaN"), 0.0, 0.0], "returned Decimal('sNaN') for completion 0"),
    "a huge integer": ([10**400, 0, 0], "returned 1000"),
    "an integer without text": ([10**5000, 0, 0], "returned a int for completion 0"),
    "complex": ([1j, 0.0, 0.0], "returned 1j for completion 0"),
    "numpy's complex": (np.ones(3, dtype=np.complex64), "returned (1+0j) for completion 0"),
    "an object": ([object(), 0.0, 0.0], "returned <object "),
    "an object whose number fails": ([Number(None), 0.0, 0.0], "for completion 0, 'first'; expected a number"),
    "a class": (Number, "returned a type"),
    "a list without a length": (BrokenList([1.0] * 3), "OSError: no length"),
    "an error": (ZeroDivisionError("division\nby zero"), "ZeroDivisionError: division by zero, in its call for compl"),
    "an error without text": (ValueError(), "ValueError, in its call for completions 0 to 2"),
    "an error whose text fails": (UnprintableError(), "UnprintableError, in its call for completions 0 to 2"),
    "an error of ten megabytes": (ValueError("x" * 10**7), "xxx, in its call for completions 0 to 2"),
    "an error in many lines": (ValueError("\n" * 100 + "end"), "ValueError: end, in its call"),
    "an assertion": (AssertionError("wrong"), "AssertionError: wrong"),
    "StopIteration": (StopIteration(), "StopIteration"),
    "RecursionError": (RecursionError("too deep"), "RecursionError: too deep"),
    "MemoryError": (MemoryError(), "MemoryError, in its call"),
    "a TimeoutError of its own": (TimeoutError("the judge"), "TimeoutError: the judge"),
    "CancelledError": (asyncio.CancelledError(), "CancelledError, in its call"),
    "sys.exit(0)": (SystemExit(0), "SystemExit: 0, in its call for completions 0 to 2"),
    "sys.exit()": (SystemExit(), "SystemExit, in its call for completions 0 to 2"),
    "GeneratorExit": (GeneratorExit(), "GeneratorExit, in its call for completions 0 to 2"),
    "a BaseException": (Stop("here"), "Stop: here, in its call for completions 0 to 2"),
    "a UserError": (UserError("no judge there"), "no judge there, in its call for completions 0 to 2"),
}
"""What a function returns or raises, and what is said of it."""


def reward_of(outcome: Any) -> Any:
    def own(completions: list[str], **_: Any) -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome() if inspect.isfunction(outcome) else outcome

    return own


def asynchronous(reward: Any) -> Any:
    @functools.wraps(reward)
    async def own(**columns: Any) -> Any:
        scores = reward(**columns)
        return await scores if inspect.iscoroutine(scores) else scores

    return own


def call(reward: Any, **columns: Any) -> Any:
    """As TRL does: what is asynchronous runs in a thread of its own."""
    scores = reward(completions=TEXTS, **columns)
    if not inspect.iscoroutine(scores):
        return scores
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, scores).result()


KINDS = pytest.mark.parametrize("kind", [lambda reward: reward, asynchronous], ids=["plain", "asynchronous"])


@KINDS
@pytest.mark.parametrize("name", GO_ON)
def test_numbers_of_any_kind_are_scores(name: str, kind: Any) -> None:
    outcome, expected = GO_ON[name]
    scores = call(checked_scores(kind(reward_of(outcome))))
    assert scores == expected
    assert {type(score) for score in scores} <= {float, type(None)}


@KINDS
@pytest.mark.parametrize("name", STOP)
def test_anything_else_is_one_line_with_function_and_row(name: str, kind: Any) -> None:
    outcome, expected = STOP[name]
    if name == "StopIteration" and kind is asynchronous:
        expected = "RuntimeError: coroutine raised StopIteration"
    with pytest.raises(RewardError) as error:
        call(checked_scores(kind(reward_of(outcome))))
    line = str(error.value)
    assert line.startswith("reward own: ")
    assert expected in line
    assert "\n" not in line
    assert len(line) < 1000
    assert isinstance(error.value, (TrainingStoppedError, UserError))


def test_a_reward_may_change_the_lists_that_it_gets() -> None:
    answers, completions = ["1", "2"], ["a", "b"]

    def own(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        completions.clear()
        answer.reverse()
        return [1.0, 0.0]

    assert checked_scores(own)(completions=completions, answer=answers) == [1.0, 0.0]
    assert (completions, answers) == (["a", "b"], ["1", "2"])


def test_a_part_of_a_sum_is_named_by_itself() -> None:
    own = reward_of([1.0, math.nan, 0.0])
    with pytest.raises(RewardError, match=r"^reward own: returned nan for completion 1, 'second'; expected"):
        checked_scores(Weighted([(own, 1.0), (exact_answer, 0.5)]))(completions=TEXTS, answer=TEXTS)


class Judge:
    async def __call__(self, completions: list[str], **_: Any) -> list[str]:
        return ["good"] * len(completions)


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (functools.partial(reward_of(["1"] * 3), extra=1), "own"),
        (Judge(), "Judge"),
        (lambda **_: ["1"] * 3, "<lambda>"),
    ],
)
def test_a_reward_has_the_name_that_trl_gives_it(reward: Any, name: str) -> None:
    with pytest.raises(RewardError, match=f"^reward {name}: returned '"):
        call(checked_scores(reward))


class TestATimeLimit:
    """Of a second; the process of one that nothing can stop ends 10 s later."""

    LINE = r"^reward own: took longer than reward_timeout, 0\.2 s, in its call for completions 0 to 2$"

    @pytest.fixture(autouse=True)
    def alarms_of_others_go_on(self) -> Any:
        def handler(*_: Any) -> None: ...

        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 1000)
        yield
        assert signal.getsignal(signal.SIGALRM) is handler
        assert 900 < signal.setitimer(signal.ITIMER_REAL, 0)[0] <= 1000
        signal.signal(signal.SIGALRM, before)

    @staticmethod
    def sleeps() -> None:
        time.sleep(60)

    @staticmethod
    def computes() -> None:
        while True:
            pass

    @staticmethod
    def matches() -> None:
        import re

        re.fullmatch(r"(a+)+", "a" * 40 + "b")

    @staticmethod
    def waits_for_a_lock() -> None:
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()

    @staticmethod
    def reads_a_socket() -> None:
        one, other = socket.socketpair()
        with one, other:
            one.recv(1)

    @staticmethod
    def catches_what_a_row_raises() -> None:
        while True:
            try:
                time.sleep(60)
            except Exception:
                continue

    @staticmethod
    def waits_for_threads() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(time.sleep, 4).result()

    @pytest.mark.parametrize(
        "hangs",
        [
            sleeps,
            computes,
            matches,
            waits_for_a_lock,
            reads_a_socket,
            catches_what_a_row_raises,
            waits_for_threads,
        ],
        ids=lambda function: function.__name__,
    )
    def test_ends_a_call_in_the_main_thread(self, hangs: Any) -> None:
        def own(completions: list[str], **_: Any) -> None:
            hangs()

        started = time.monotonic()
        with pytest.raises(RewardError, match=self.LINE):
            checked_scores(own, 0.2)(completions=TEXTS)
        assert time.monotonic() - started < 3

    def test_ends_a_call_that_is_awaited(self) -> None:
        async def own(completions: list[str], **_: Any) -> None:
            await asyncio.sleep(60)

        with pytest.raises(RewardError, match=self.LINE):
            call(checked_scores(own, 0.2))

    def test_lets_others_take_their_time(self) -> None:
        def own(completions: list[str], **_: Any) -> list[float]:
            time.sleep(0.3)
            return [1.0] * len(completions)

        assert checked_scores(own, 30)(completions=TEXTS) == [1.0] * 3
        assert checked_scores(own)(completions=TEXTS) == [1.0] * 3
        time.sleep(0.1)

    @pytest.mark.usefixtures("heard")
    def test_leaves_ctrl_c_to_the_person(self) -> None:
        def own(completions: list[str], **_: Any) -> None:
            signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            checked_scores(own, 30)(completions=TEXTS)


ENDS = """
import asyncio, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from drpo.rewards import checked_scores, limit

limit.GRACE = 1.0

def catches_all(completions, **_):
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

async def blocks_its_loop(completions, **_):
    time.sleep(60)

def leaves_threads(completions, **_):
    executor.map(time.sleep, [60])
    raise ValueError("no judge")

executor = ThreadPoolExecutor(1)
reward = checked_scores(globals()[sys.argv[1]], 0.5)
if sys.argv[2] == "main":
    reward(completions=["a", "b"])
else:
    def run():
        scores = reward(completions=["a", "b"])
        asyncio.run(scores) if asyncio.iscoroutine(scores) else scores
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
"""


@pytest.mark.parametrize(
    ("reward", "thread", "message"),
    [
        ("catches_all", "main", "took longer than reward_timeout, 0.5 s"),
        ("catches_all", "other", "took longer than reward_timeout, 0.5 s"),
        ("blocks_its_loop", "other", "took longer than reward_timeout, 0.5 s"),
        ("leaves_threads", "main", "ValueError: no judge"),
    ],
)
def test_a_process_that_nothing_can_stop_ends_after_its_line(reward: str, thread: str, message: str) -> None:
    finished = subprocess.run([sys.executable, "-c", ENDS, reward, thread], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1, finished.stderr
    last = finished.stderr.splitlines()[-1]
    assert last.startswith(f"error: reward {reward}: {message}, in its call for completions 0 to 1")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, problems: Dataset) -> DRPOTrainer:
    names = ["whole", "async"]
    rewards = [reward_of([1.0, 0.0, 1.0]), asynchronous(reward_of([None, 1.0, 0.0]))]
    for name, reward in zip(names, rewards, strict=True):
        reward.__name__ = name
    return make_trainer(tmp_path_factory.mktemp("trainer"), problems, reward_funcs=rewards, reward_timeout=1.0)


class TestATrainer:
    """Calls its functions as TRL's does."""

    @staticmethod
    def rewards(trainer: DRPOTrainer) -> Any:
        inputs = [{"prompt": text, "answer": text} for text in TEXTS]
        return trainer._calculate_rewards(inputs, TEXTS, TEXTS, [[1], [2], [3]])

    def test_scores_by_all_functions(self, trainer: DRPOTrainer) -> None:
        expected = torch.tensor([[1.0, torch.nan], [0.0, 1.0], [1.0, 0.0]])
        torch.testing.assert_close(self.rewards(trainer), expected, equal_nan=True)

    def test_names_the_one_that_fails(self, trainer: DRPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
        def misuses(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
            log_metric("length", "long")
            return [1.0] * len(completions)

        failing = [*trainer.reward_funcs, checked_scores(misuses)]
        monkeypatch.setattr(trainer, "reward_funcs", failing)
        monkeypatch.setattr(trainer, "reward_func_names", ["whole", "async", "misuses"])
        monkeypatch.setattr(trainer, "reward_processing_classes", [None] * 3)
        with pytest.raises(
            RewardError, match=r"^reward misuses: ValueError: could not convert string to float: 'long'"
        ):
            self.rewards(trainer)


@pytest.mark.parametrize("name", ["NaN", "sys.exit(0)", "text"])
def test_training_stops_with_the_line(tmp_path: Path, problems: Dataset, name: str) -> None:
    outcome, expected = STOP[name]
    rows = {"NaN": lambda: [math.nan] * 16}.get(name, outcome)
    trainer = make_trainer(tmp_path, problems, reward_funcs=[exact_answer, reward_of(rows)])
    with pytest.raises(TrainingStoppedError, match=r"^reward own: ") as error:
        trainer.train()
    assert expected.split(" ")[0] in str(error.value)


def test_a_rollout_without_any_reward_stops_training_and_one_with_some_does_not(
    tmp_path: Path, problems: Dataset
) -> None:
    def nothing(completions: list[str], **_: Any) -> list[None]:
        return [None] * len(completions)

    make_trainer(tmp_path, problems, reward_funcs=[nothing, exact_answer]).train()
    trainer = make_trainer(tmp_path, problems, reward_funcs=nothing)
    with pytest.raises(RewardError, match=r"^reward nothing: returned None for all 16 completions of the rollout"):
        trainer.train()


def test_a_recipe_s_reward_that_hangs_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hanging_reward.py").write_text("import time\ndef hangs(completions, **_): time.sleep(600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    settings = ["reward=hanging_reward:hangs", "reward_timeout=0.5", "task.heldout=null", "prompts_per_rollout=4"]
    sets = [argument for assignment in settings for argument in ("--set", assignment)]
    monkeypatch.setattr(sys, "argv", ["drpo", "train", "--output", str(run), *sets])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr().err
    assert end.value.code == 1, printed
    line = "error: reward hangs: took longer than reward_timeout, 0.5 s, in its call for completions 0 to 31"
    assert line in printed.splitlines()
    assert "Traceback" not in printed
    assert not run.exists()


@pytest.mark.parametrize("value", ["0", "-1", ".nan", "soon", "true"])
def test_a_limit_that_is_none_is_refused(value: str) -> None:
    from drpo.run.recipe import load_recipe

    with pytest.raises(UserError, match="reward_timeout"):
        load_recipe(None, [f"reward_timeout={value}"])
    assert load_recipe(None, ["reward_timeout=null"]).reward_timeout is None


@pytest.mark.long
def test_ranks_stop_together_and_name_the_one_that_failed(tmp_path: Path) -> None:
    failures = {
        "raises": "ValueError: no judge, in its call",
        "exits": "SystemExit: 0, in its call",
        "returns too few": "returned 1 scores; expected a list of 16",
        "hangs": "took longer than reward_timeout, 2 s, in its call",
        "hangs in threads": "took longer than reward_timeout, 2 s, in its call",
    }
    finished, _ = failing_ranks.launch(tmp_path, *failures, "none", "other metrics", "no tokens")
    assert finished.returncode == 0, finished.stderr[-3000:]
    own, others = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    for failure, message in failures.items():
        for rank in (0, 1):
            errors = [results[f"{failure} on rank {rank}"] for results in (own, others)]
            assert errors[0]["error"].startswith(f"reward own on rank {rank}: {message}")
            assert errors[0]["error"] == errors[1]["error"]
            assert max(error["seconds"] for error in errors) < 30
    assert own["other metrics on rank 1"]["log"]["of one rank"] == 1.0
    trained = [own[f"{difference} on rank 1"]["log"]["work/dropped_sequences"] for difference in ("none", "no tokens")]
    assert trained[1] >= 0.5 > trained[0]


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("failure", ["raises", "catches all", "exits at once"])
def test_processes_of_all_ranks_end_within_30_s_of_one_that_fails(tmp_path: Path, failure: str, rank: int) -> None:
    finished, seconds = failing_ranks.launch(tmp_path, failure, rank=rank)
    assert finished.returncode != 0
    # os._exit leaves no time for a word.
    assert f"reward own on rank {rank}: " in finished.stderr or failure == "exits at once"
    assert seconds < 30
