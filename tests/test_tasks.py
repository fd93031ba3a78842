"""Problems have the answers they claim, and the model shipped with them can learn them."""

from __future__ import annotations

import random
import re
import string
from pathlib import Path

import pytest
import torch

from drpo.data.arithmetic import LARGEST_TERM, LARGEST_TOTAL, TERMS, sample_problem, sample_problems, split_of
from drpo.data.problems import BUILTIN_MODELS, MODEL_PATH, Problem, builtin_problems, read_problems
from drpo.errors import UserError
from drpo.rewards import exact_answer

SPLITS = ("train", "heldout")
SEEDS = (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("split", SPLITS)
def test_totals_add_up(split, seed):
    for problem in sample_problems(split, 500, seed):
        assert re.fullmatch(r"\d+([+-]\d+){4}=", problem.prompt)
        first, *operands = map(int, re.findall(r"[+-]?\d+", problem.prompt))
        totals = [first + sum(operands[: n + 1]) for n in range(len(operands))]
        assert problem.totals == tuple(totals)
        assert problem.solution == ",".join(map(str, totals))
        assert problem.answer == str(totals[-1])
        assert all(0 <= total <= 99 for total in totals)


def test_a_problem_keeps_to_its_bounds():
    rng = random.Random(0)
    for _ in range(200):
        problem = sample_problem(rng)
        terms = list(map(int, re.findall(r"\d+", problem.prompt)))
        assert len(terms) == TERMS
        assert all(1 <= term <= LARGEST_TERM for term in terms)
        assert all(0 <= total <= LARGEST_TOTAL for total in problem.totals)


@pytest.mark.parametrize("split", SPLITS)
def test_a_hash_of_the_prompt_decides_its_split(split):
    assert {split_of(problem.prompt) for problem in builtin_problems(split, 500, 0)} == {split}


@pytest.mark.parametrize("train_seed", SEEDS)
def test_no_held_out_problem_is_trained_on(train_seed):
    trained = {problem.prompt for problem in builtin_problems("train", 3000, train_seed)}
    for seed in SEEDS:
        assert trained.isdisjoint(problem.prompt for problem in builtin_problems("heldout", 1000, seed))


@pytest.mark.parametrize("split", SPLITS)
def test_problems_are_distinct_and_follow_from_the_seed(split):
    problems = builtin_problems(split, 500, 0)
    assert len({problem.prompt for problem in problems}) == 500
    assert builtin_problems(split, 500, 0) == problems
    assert builtin_problems(split, 200, 0) == problems[:200]
    assert builtin_problems(split, 500, 1) != problems


@pytest.fixture(scope="module")
def model_and_tokenizer():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    return model.eval(), tokenizer


def test_the_built_in_model_is_small_and_holds_no_pickle():
    assert BUILTIN_MODELS == {"arithmetic": MODEL_PATH}
    files = [path for path in MODEL_PATH.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_the_tokenizer_gives_printable_ascii_back(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    text = "".join(character for character in string.printable if character.isprintable()) + "\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text) == 96
    assert max(ids) < model.config.vocab_size
    assert tokenizer.unk_token_id not in ids


def test_the_built_in_model_is_sometimes_right_and_rarely_never(model_and_tokenizer):
    """What a policy gradient needs: rewards that vary within nearly every group."""
    model, tokenizer = model_and_tokenizer
    problems, samples = builtin_problems("heldout", 200, seed=0), 16
    prompts = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(
            **prompts,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=samples,
            max_new_tokens=20,
        )
    completions = tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    rewards = exact_answer(completions, [problem.answer for problem in problems for _ in range(samples)])
    right = torch.tensor(rewards).view(len(problems), samples)
    assert 0.2 <= right.mean() <= 0.4
    assert right.amax(dim=1).mean() >= 0.95


GOOD = b'{"question": "2+2?", "answer": "4"}\n'


def read(path: Path) -> list[Problem]:
    return read_problems(path, prompt="question", answer="answer", template="{prompt}")


def test_rows_become_problems(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        GOOD + b"\n" + '{"answer": 5, "question": "{answer} é?", "id": null}\r\n{"question":"x","answer":2.5}'.encode()
    )
    problems = read_problems(path, prompt="question", answer="answer", template="Q: {prompt}\nA: {x}")
    assert problems == [
        Problem("Q: 2+2?\nA: {x}", "4"),
        Problem("Q: {answer} é?\nA: {x}", "5"),
        Problem("Q: x\nA: {x}", "2.5"),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b'{"question": "2+2?", "ans', "is not JSON in UTF-8"),
        (b"{'question': '2+2?', 'answer': 4}", "is not JSON in UTF-8"),
        (b"question,answer", "is not JSON in UTF-8"),
        (GOOD.strip() + GOOD.strip(), "is not JSON in UTF-8"),
        (b'{"question": "\xff", "answer": "4"}', "is not JSON in UTF-8"),
        (b"\x80\x02}q\x00.", "is not JSON in UTF-8"),
        (b"[" * 100_000, "is not JSON in UTF-8"),
        (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "is not JSON in UTF-8"),
        (b"null", "expected an object"),
        (b'["2+2?", "4"]', "is a list; expected an object"),
        (b'"2+2?"', "is a str; expected an object"),
        (b"3", "is a int; expected an object"),
        (b'{"qestion": "2+2?", "answer": "4"}', "unknown field 'question'; did you mean 'qestion'?"),
        (b'{"question": "2+2?", "anwser": "4"}', "unknown field 'answer'; did you mean 'anwser'?"),
        (b"{}", "unknown field 'question'. There are none."),
        (b'{"a\\nb": 1}', "unknown field 'question'"),
        (b'{"question": 4, "answer": "4"}', "question is 4; expected text"),
        (b'{"question": null, "answer": "4"}', "question is None; expected text"),
        (b'{"question": ["2+2?"], "answer": "4"}', "question is ['2+2?']; expected text"),
        (b'{"question": " ", "answer": "4"}', "question is ' '; expected text"),
        (b'{"question": ["' + b"x" * 1_000_000 + b'"], "answer": "4"}', "question is ['xxx"),
        (b'{"question": "\\ud800", "answer": "4"}', "question has a lone surrogate"),
        (b'{"question": "2+2?", "answer": "\\udfff"}', "answer has a lone surrogate"),
        (b'{"question": "2+2?", "answer": true}', "answer is True; expected text or a finite number"),
        (b'{"question": "2+2?", "answer": null}', "answer is None; expected text or a finite number"),
        (b'{"question": "2+2?", "answer": [4]}', "answer is [4]; expected text or a finite number"),
        (b'{"question": "2+2?", "answer": NaN}', ""),
        (b'{"question": "2+2?", "answer": 1e999}', ""),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else value[:30],
)
def test_a_malformed_row_is_named_by_file_and_row_in_one_line(tmp_path, row, expected):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + row + b"\n" + GOOD)
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}, row 2: ")
    assert expected in message
    assert len(message.splitlines()) == 1
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", b"", "has no rows; expected one JSON object a line"),
        ("blank.jsonl", b"\n \n\r\n", "has no rows; expected one JSON object a line"),
        ("missing.jsonl", None, "no such file"),
        ("rows.csv", GOOD, "expected a .jsonl file"),
        ("rows.json", GOOD, "expected a .jsonl file"),
        ("rows", GOOD, "expected a .jsonl file"),
        ("arithmatic", None, "expected a .jsonl file (one JSON object a line) or one of arithmetic"),
        ("utf16.jsonl", GOOD.decode().encode("utf-16"), "row 1: is not JSON in UTF-8"),
        ("n" * 300 + ".jsonl", None, ""),
        ("nul\0.jsonl", None, ""),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_is_no_file_of_problems(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(UserError, match=r"rows\.jsonl: cannot be read"):
        read(tmp_path / "rows.jsonl")
