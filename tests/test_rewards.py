"""Exact rewards against hand-labelled completions."""

from __future__ import annotations

import asyncio
import inspect
import math
import sys

import pytest

from drpo.errors import UserError
from drpo.rewards import (
    REWARDS,
    Format,
    MathGrader,
    Overlong,
    Weighted,
    checked_scores,
    exact_answer,
    gsm8k,
    integer,
    load_reward,
    text_of,
)

WATER = """\
Each of the 14 runners drinks 3 bottles, so they drink 14*3=<<14*3=42>>42 bottles.
A crate holds 24 bottles, so two crates hold 24*2=<<24*2=48>>48 bottles.
48-42=<<48-42=6>>6 bottles are left over.
#### 6"""

HOUSE = """\
The deposit is 25% of $240,000, which is 240000*.25=$<<240000*.25=60000>>60,000.
After the deposit they still owe 240000-60000=$<<240000-60000=180000>>180,000.
#### 180,000"""

DEBT = """\
Mara had $15 and spent 3*7=$<<3*7=21>>21.
So her balance is 15-21=$<<15-21=-6>>-6.
#### -6"""


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("42,34,68", "68", 1.0),
        ("68", "68", 1.0),
        ("42,34, 68\n", "68", 1.0),
        ("-3", "-3", 1.0),
        ("42,34,67", "68", 0.0),
        ("68,34", "68", 0.0),
        ("42,34,68,", "68", 0.0),
        ("42,34,068", "68", 0.0),
        ("42,34,68.0", "68", 0.0),
        ("42;34;68", "68", 0.0),
        ("42,34,6 8", "68", 0.0),
        ("42,34,168", "68", 0.0),
        ("", "68", 0.0),
        (said("42,34,68"), "68", 1.0),
        (said("42,34,67"), "68", 0.0),
    ],
)
def test_exact_answer_is_what_follows_the_last_comma(completion, answer, expected):
    assert exact_answer([completion], [answer]) == [expected]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        # after ####
        ("14*3=42, 48-42=6\n#### 6", WATER, 1.0),
        ("#### 6", WATER, 1.0),
        ("####6", WATER, 1.0),
        ("#### 6.0", WATER, 1.0),
        ("#### 6 bottles, of 48", WATER, 1.0),
        ("#### 42", WATER, 0.0),
        ("#### -6", WATER, 0.0),
        ("#### 66", WATER, 0.0),
        # several ####: the last one counts
        ("#### 42\nNo, wait.\n#### 6", WATER, 1.0),
        ("#### 6\nNo, wait.\n#### 42", WATER, 0.0),
        ("#### 6\n####", WATER, 0.0),
        # no ####: the last number counts
        ("There are 48-42=6 bottles left.", WATER, 1.0),
        ("6 of 48", WATER, 0.0),
        # no ####: the number in the last box counts, whatever follows
        ("\\boxed{6} m^2", WATER, 1.0),
        ("\\boxed{2}, no: \\boxed{6\\text{ m}^2}", WATER, 1.0),
        ("\\boxed{2} of 6", WATER, 0.0),
        ("\\boxed{180{,}000}", HOUSE, 1.0),
        ("#### 180{,}000", HOUSE, 1.0),
        ("180{,}000", HOUSE, 1.0),
        ("\\boxed{2}\n#### 6", WATER, 1.0),
        # thousands separators and $
        ("#### 180000", HOUSE, 1.0),
        ("#### $180,000", HOUSE, 1.0),
        ("#### 180,000.00", HOUSE, 1.0),
        ("They owe $180,000.", HOUSE, 1.0),
        ("#### 180", HOUSE, 0.0),
        ("#### 18,000", HOUSE, 0.0),
        # negative
        ("#### -6", DEBT, 1.0),
        ("#### -$6", DEBT, 1.0),
        ("#### $-6", DEBT, 1.0),
        ("#### 6", DEBT, 0.0),
        # decimals
        ("#### 2.5", "#### 2.5", 1.0),
        ("#### 2.50", "#### 2.5", 1.0),
        ("#### 2", "#### 2.5", 0.0),
        ("#### 5", "#### 2.5", 0.0),
        ("#### .5", "#### 0.5", 1.0),
        ("#### .5", "#### 5", 0.0),
        ("It weighs 2.5.", "#### 2.5", 1.0),
        # no number
        ("", WATER, 0.0),
        ("I do not know.", WATER, 0.0),
        ("#### six", WATER, 0.0),
        ("####", WATER, 0.0),
        ("6", "no number here", 0.0),
        ("none", "no number here", 0.0),
        # conversational
        (said("#### 6"), WATER, 1.0),
        (said("#### 7"), WATER, 0.0),
        ([*said("#### 7"), {"role": "user", "content": "Sure?"}, *said("#### 6")], WATER, 1.0),
    ],
)
def test_gsm8k_compares_final_numbers(completion, answer, expected):
    assert gsm8k([completion], [answer]) == [expected]


@pytest.mark.parametrize("answer", [WATER, HOUSE, DEBT])
def test_gsm8k_takes_the_reference_solution_itself(answer):
    assert gsm8k([answer, said(answer)], [answer, answer]) == [1.0, 1.0]


@pytest.mark.parametrize("completion", ["1," * 200_000, "9" * 1_000_000, "#" * 200_000, "-$" * 200_000, "\ud800 6"])
def test_gsm8k_answers_whatever_the_completion(completion):
    assert gsm8k([completion], [WATER]) == [float(completion.endswith(" 6"))]


EXACT = {"exact_answer": exact_answer, "gsm8k": gsm8k, "math": MathGrader(workers=1)}


@pytest.mark.parametrize("reward", EXACT.values(), ids=EXACT)
def test_a_reward_scores_each_completion_against_its_own_answer(reward):
    assert reward(completions=["1", "2", "2"], answer=["1", "2", "1"], prompts=["", "", ""]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("reward", [*EXACT.values(), integer], ids=[*EXACT, "integer"])
def test_a_reward_refuses_another_number_of_answers(reward):
    with pytest.raises(ValueError, match="shorter"):
        reward(completions=["1", "2"], answer=["1"])


def test_the_text_of_a_conversation_is_its_last_message():
    assert text_of("plain") == "plain"
    assert text_of([*said("first"), *said("last")]) == "last"


@pytest.mark.parametrize("name", REWARDS)
def test_a_built_in_reward_is_found_by_name(name):
    options = {"limit": 8, "buffer": 4} if name == "overlong" else {}
    reward, entry = load_reward(name, **options), REWARDS[name]
    assert isinstance(reward, entry) if isinstance(entry, type) else reward is entry


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("Answer: 73", "73", 1.0),
        ("**Answer: 73.**", "73", 1.0),
        ("Answer: $073$", "73", 1.0),
        ("so \\boxed{073}", "73", 1.0),
        ("\\boxed{1,024}", "1024", 1.0),
        ("Answer: 70.0", "70", 1.0),
        ("Answer: -4", "-4", 1.0),
        ("Answer: 72\nAnswer: 73", "73", 1.0),
        ("\\boxed{72} and, to be sure, \\boxed{73}", "73", 1.0),
        ("Answer: 73\nAnswer: 72", "73", 0.0),
        ("\\boxed{72}\nAnswer: 73", "73", 0.0),
        ("Answer: 73 or 74", "73", 0.0),
        ("Answer: 73.5", "73", 0.0),
        ("\\boxed{73", "73", 0.0),
        ("73", "73", 0.0),
        ("", "73", 0.0),
        (said("Answer: 73"), "73", 1.0),
    ],
)
def test_integer_compares_the_stated_answer(completion, answer, expected):
    assert integer([completion], [answer]) == [expected]


def test_integer_refuses_another_reference():
    with pytest.raises(ValueError, match=r"answer 1 is '1/2'; expected an integer"):
        integer(["Answer: 1", "Answer: 1"], ["1", "1/2"])


def test_format_looks_for_a_regular_expression():
    assert Format()(["\\boxed{42}", "\\boxed{}", "42", said("\\boxed{4}")]) == [1.0, 0.0, 0.0, 1.0]
    assert Format("(?s)^<think>.*</think>")(["<think>a\nb</think>4", "<think>4"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"pattern: got '\('; expected a regular expression"):
        Format("(")


def test_overlong_falls_from_0_to_minus_1_over_its_buffer():
    # limit 100, buffer 20: free up to 80; at 90 half way, (80 - 90) / 20; at 100 all the way, (80 - 100) / 20.
    lengths = {0: 0.0, 80: 0.0, 81: -0.05, 90: -0.5, 100: -1.0, 500: -1.0}
    ids = [[7] * length for length in lengths]
    assert Overlong(limit=100, buffer=20)([""] * 6, completion_ids=ids) == pytest.approx(list(lengths.values()))
    with pytest.raises(ValueError, match="expected 0 < buffer <= limit"):
        Overlong(limit=10, buffer=20)


def test_a_weighted_sum_leaves_out_what_one_part_leaves_out():
    def left_out(completions, **_):
        return [None, 1.0, 1.0]

    reward = Weighted([(left_out, 2.0), (gsm8k, 0.5)])
    assert reward(completions=["#### 1", "#### 1", "#### 2"], answer=["1", "1", "1"]) == [None, 2.5, 2.0]
    assert reward.__name__ == "left_out+gsm8k"
    assert reward.correctness is left_out


@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "asynchronous"])
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (ZeroDivisionError("by\nzero"), "ZeroDivisionError: by zero"),
        (SystemExit(3), "SystemExit: 3"),
        ("ab", "returned a str; expected a list of 2"),
        (None, "returned a NoneType"),
        ([1.0], "returned 1 scores; expected a list of 2"),
        ([1.0, "1"], "returned '1' for completion 1, 'second'; expected a number of magnitude 1e+09 at most, or None"),
        ([math.inf, None], "returned inf for completion 0, 'first'"),
        ([None, math.nan], "returned nan for completion 1"),
    ],
    ids=str,
)
def test_a_reward_that_gives_no_scores_fails_in_one_line_with_its_name(scores, expected, asynchronous):
    def own(completions, **_):
        if isinstance(scores, BaseException):
            raise scores
        return scores

    async def own_asynchronous(completions, **_):
        return own(completions)

    function = checked_scores(own_asynchronous if asynchronous else own)
    assert inspect.iscoroutinefunction(function) == asynchronous
    with pytest.raises(UserError) as error:
        asyncio.run(function(completions=["first", "second"])) if asynchronous else function(
            completions=["first", "second"]
        )
    assert str(error.value).startswith(f"reward {function.__name__}: ")
    assert function.__name__ == ("own_asynchronous" if asynchronous else "own")
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_checked_reward_gives_what_the_reward_gives():
    import torch

    assert checked_scores(gsm8k)(completions=["#### 1", "2"], answer=["1", "1"]) == [1.0, 0.0]
    assert checked_scores(lambda **_: torch.tensor([1.0, 0.5]))(completions=["", ""]) == [1.0, 0.5]
    assert checked_scores(lambda **_: (None, 1))(completions=["", ""]) == [None, 1]
    assert checked_scores(MathGrader(strict=True)).__name__ == "math_strict"


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(
        "def score(completions, **_):\n    return [0.5] * len(completions)\nnumber = 3\n"
    )
    (tmp_path / "own_misspelt.py").write_text("def score(:\n")
    (tmp_path / "own_failing.py").write_text("raise RuntimeError('no\\ngrader')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_reward", "own_misspelt", "own_failing"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("own_modules")
def test_a_function_is_found_by_module_and_name():
    assert load_reward("own_reward:score")(completions=["a", "b"]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gsm8", "unknown reward 'gsm8'; did you mean 'gsm8k'?"),
        ("exactanswer", "did you mean 'exact_answer'?"),
        ("nothing like it", "Known: exact_answer, format, gsm8k, integer, math, overlong."),
        ("nothing like it", "Your own: module:function"),
        ("", "unknown reward ''"),
        ("no_such_module:score", "cannot load 'no_such_module:score'"),
        ("own_reward:scor", "cannot load 'own_reward:scor'"),
        ("own_reward:", "cannot load 'own_reward:'"),
        ("own_reward:number", "'own_reward:number' is a int; expected a function"),
        ("own_misspelt:score", "cannot load 'own_misspelt:score'"),
        ("own_failing:score", "cannot load 'own_failing:score'"),
        (":score", "cannot load ':score'"),
        ("..own_reward:score", "cannot load '..own_reward:score'"),
        ("own_reward:a\nb", r"cannot load 'own_reward:a\nb'"),
    ],
)
@pytest.mark.usefixtures("own_modules")
def test_a_reward_that_cannot_be_loaded_is_refused_in_one_line(name, expected):
    with pytest.raises(UserError) as error:
        load_reward(name)
    assert str(error.value).startswith("reward: ")
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1
