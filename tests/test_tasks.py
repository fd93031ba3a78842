"""Problems have the answers they claim, and the model shipped with them can learn them."""

from __future__ import annotations

import json
import random
import re
import string
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from drpo.data.arithmetic import LARGEST_TERM, LARGEST_TOTAL, TERMS, sample_prompt, sample_prompts
from drpo.data.files import MalformedRowsError, read_problems
from drpo.data.problems import BUILTIN_MODELS, BUILTIN_TASKS, MODEL_PATH, Problem, builtin_problems
from drpo.data.split import split_of
from drpo.errors import UserError
from drpo.rewards import exact_answer
from drpo.run.build import load_problems
from drpo.run.recipe import load_recipe

SPLITS = ("train", "heldout")
SEEDS = (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("split", SPLITS)
def test_totals_add_up(split, seed):
    totals_of = sample_prompts(split, 500, seed)
    for prompt, totals in totals_of.items():
        assert re.fullmatch(r"\d+([+-]\d+){4}=", prompt)
        first, *operands = map(int, re.findall(r"[+-]?\d+", prompt))
        assert totals == [first + sum(operands[: n + 1]) for n in range(len(operands))]
        assert all(0 <= total <= 99 for total in totals)
    answers = {problem.prompt: problem.answer for problem in builtin_problems(split, 500, seed)}
    assert answers == {prompt: str(totals[-1]) for prompt, totals in totals_of.items()}


def test_a_problem_keeps_to_its_bounds():
    rng = random.Random(0)
    for _ in range(200):
        prompt, totals = sample_prompt(rng)
        terms = list(map(int, re.findall(r"\d+", prompt)))
        assert len(terms) == TERMS
        assert all(1 <= term <= LARGEST_TERM for term in terms)
        assert all(0 <= total <= LARGEST_TOTAL for total in totals)


@pytest.mark.parametrize("split", SPLITS)
def test_a_sum_comes_after_four_right_examples(split):
    for problem in builtin_problems(split, 200, 0, "addition"):
        *examples, question = problem.prompt.split("\n")
        assert len(examples) == 4
        for line in (*examples, question + problem.answer):
            first, second, total = map(int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)", line).groups())
            assert first + second == total
            assert 2 <= min(first, second) <= max(first, second) <= 20


def question(problem):
    return problem.prompt.rpartition("\n")[2]


@pytest.mark.parametrize("task", BUILTIN_TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_hash_of_the_question_decides_its_split(split, task):
    assert {split_of(question(problem)) for problem in builtin_problems(split, 500, 0, task)} == {split}


@pytest.mark.parametrize("task", BUILTIN_TASKS)
@pytest.mark.parametrize("train_seed", SEEDS)
def test_no_held_out_question_is_trained_on(train_seed, task):
    trained = {question(problem) for problem in builtin_problems("train", 3000, train_seed, task)}
    for seed in SEEDS:
        assert trained.isdisjoint(map(question, builtin_problems("heldout", 1000, seed, task)))


@pytest.mark.parametrize("task", BUILTIN_TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_problems_are_distinct_and_follow_from_the_seed(split, task):
    problems = builtin_problems(split, 500, 0, task)
    assert len({problem.prompt for problem in problems}) == 500
    assert builtin_problems(split, 500, 0, task) == problems
    assert builtin_problems(split, 200, 0, task) == problems[:200]
    assert builtin_problems(split, 500, 1, task) != problems


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


NUMBERS = [
    ("0.00005", "0.00005"),
    ("5e-05", "0.00005"),
    ("8.59140914", "8.59140914"),
    ("2.50", "2.50"),
    ("0.1234567890123456789", "0.1234567890123456789"),
    ("12345678901234567890", "12345678901234567890"),
    ("70.0", "70"),
    ("1e3", "1000"),
    ("-3", "-3"),
]


@pytest.mark.parametrize(("written", "answer"), NUMBERS)
def test_a_number_keeps_its_digits_and_gets_no_exponent(tmp_path, written, answer):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "q", "answer": {written}}}\n')
    assert read(path) == [Problem("q", answer)]


@pytest.mark.parametrize(
    ("values", "answers"),
    [
        ([0.00005, 70.0], ["0.00005", "70"]),
        ([2**62, -1], [str(2**62), "-1"]),
        ([Decimal("2.50"), Decimal("0.00")], ["2.50", "0"]),
    ],
)
def test_a_number_of_a_parquet_file_gets_no_exponent(tmp_path, values, answers):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pydict({"question": ["q"] * 2, "answer": values}), path)
    assert read(path) == [Problem("q", answer) for answer in answers]


@pytest.mark.parametrize(
    ("labels", "source", "identifier"),
    [
        ({"source": "gsm8k", "id": 7}, "gsm8k", "7"),
        ({"source": None, "id": {"a": 1}}, "", ""),
        ({"id": ""}, "", ""),
    ],
    ids=str,
)
def test_a_label_is_taken_where_it_is_text_or_a_number(tmp_path, labels, source, identifier):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "4", **labels}))
    assert read(path) == [Problem("q", "4", source, identifier)]


def test_all_malformed_rows_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"null\n" + GOOD + b'{"question": "q"}\n')
    with pytest.raises(MalformedRowsError) as error:
        read(path)
    assert [line.split(": ")[0] for line in error.value.lines] == [f"{path}, row 2", f"{path}, row 4"]


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
        (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "expected text or a finite number"),
        (b"null", "expected an object"),
        (b'["2+2?", "4"]', "is a list; expected an object"),
        (b'"2+2?"', "is a str; expected an object"),
        (b"3", "is a Number; expected an object"),
        (b'{"qestion": "2+2?", "answer": "4"}', "has no field 'question'; did you mean 'qestion'?"),
        (b'{"question": "2+2?", "anwser": "4"}', "has no field 'answer'; did you mean 'anwser'?"),
        (b"{}", "has no field 'question'. There are none."),
        (b'{"a\\nb": 1}', "has no field 'question'"),
        (b'{"question": 4, "answer": "4"}', "question is 4; expected text"),
        (b'{"question": null, "answer": "4"}', "question is None; expected text"),
        (b'{"question": ["2+2?"], "answer": "4"}', "question[0] is '2+2?'; expected an object with role and content"),
        (b'{"question": [], "answer": "4"}', "question is []; expected text, or a list of messages"),
        (
            b'{"question": [{"role": "user"}], "answer": "4"}',
            "question[0] is {'role': 'user'}; expected an object with role and",
        ),
        (b'{"question": [{"role": "user", "content": 4}], "answer": "4"}', "question[0].content is 4; expected text"),
        (
            b'{"question": [{"role": "system", "content": "q"}], "answer": "4"}',
            "question ends with a message of 'system'; expected one of 'user'",
        ),
        (b'{"question": " ", "answer": "4"}', "question is empty"),
        (b'{"question": ["' + b"x" * 1_000_000 + b'"], "answer": "4"}', "question[0] is 'xxx"),
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
        ("empty.jsonl", b"", "has no rows; expected one JSON object a line, or one row of parquet"),
        ("blank.jsonl", b"\n \n\r\n", "has no rows; expected one JSON object a line"),
        ("missing.jsonl", None, "no such file"),
        ("rows.csv", GOOD, "expected a file that ends in .jsonl or .parquet"),
        ("rows.json", GOOD, "expected a file that ends in .jsonl or .parquet"),
        ("rows", GOOD, "expected a file that ends in .jsonl or .parquet"),
        ("arithmatic", None, "expected a file that ends in .jsonl or .parquet"),
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


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_recipe_s_problems_are_read_from_either_kind_of_file(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    table = pyarrow.Table.from_pylist([{"question": f"{n}?", "gold": n / 2} for n in range(20)])
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, "rows.parquet")
    else:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    source = f"rows{suffix}"
    fields = [f"task.train={source}", f"task.heldout={source}", "task.prompt=question", "task.answer=gold"]
    recipe = load_recipe(None, [*fields, "task.template='Q: {prompt}'"])
    assert recipe.task.train == str(tmp_path / source)
    assert load_problems(recipe, "train", 1)[:4] == [
        Problem(f"Q: {n}?", answer) for n, answer in enumerate(("0", "0.5", "1", "1.5"))
    ]
    assert len(load_problems(recipe, "heldout", 3)) == 3


def test_all_malformed_rows_of_a_task_are_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text("1\n" * 2)
    with pytest.raises(MalformedRowsError) as error:
        load_problems(load_recipe(None, [f"task.train={tmp_path}/rows.jsonl"]), "train", 1)
    expected = [f"task.train: {tmp_path}/rows.jsonl, row {n}: is a Number; expected an object" for n in (1, 2)]
    assert error.value.lines == expected
