"""drpo data: the schema, duplicates, contamination, and every malformed row by file and number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from drpo.data.build import OVERLAP, collect, contamination, normalised, within_pass_rates
from drpo.data.files import read_problems, write_with_report
from drpo.data.problems import BUILTIN_MODELS, Problem, as_prompt, tokenize_prompt
from drpo.data.sources import SOURCES
from drpo.errors import UserError
from test_cli import contents, drpo, here, refusal  # noqa: F401

WRAPPED = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def dapo(problem: str, answer: str, index: str, wrapped: bool = True) -> dict[str, Any]:
    content = WRAPPED.format(problem) if wrapped else problem
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": content}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


DAPO = [
    dapo("What is $1+1$?", "2", "a"),
    dapo("What is $2+2$?\n\nGive an integer.", "4", "b"),
    dapo("What is $1+1$?", "2", "c"),
    dapo("what is  $1 + 1$ ?", "2", "d"),
    dapo("What is $1+1$?", "3", "e"),
    dapo("No wrapper here.", "5", "f", wrapped=False),
]


def save(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
class TestDapo:
    def test_each_problem_with_each_answer_is_kept_once_without_its_wrapper(self, tmp_path, suffix):
        collected = collect("dapo-math-17k", save(tmp_path / f"dapo{suffix}", DAPO))
        assert collected.problems == [
            Problem("What is $1+1$?", "2", "dapo-math-17k", "a"),
            Problem("What is $2+2$?\n\nGive an integer.", "4", "dapo-math-17k", "b"),
            Problem("What is $1+1$?", "3", "dapo-math-17k", "e"),
            Problem("No wrapper here.", "5", "dapo-math-17k", "f"),
        ]
        found = {name: collected.report[name] for name in ("read", "kept", "duplicates", "conflicts", "expected")}
        assert found == {"read": 6, "kept": 4, "duplicates": 2, "conflicts": 1, "expected": 17_398}

    def test_the_wrapper_stays_if_asked_for(self, tmp_path, suffix):
        collected = collect("dapo-math-17k", save(tmp_path / f"dapo{suffix}", DAPO[:1]), wrapper=True)
        assert collected.problems[0].prompt == WRAPPED.format("What is $1+1$?")


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("gsm8k", {"question": "Q", "answer": "1+1=2\n#### 1,234"}, Problem("Q", "1234", "gsm8k", "1")),
        ("gsm8k-test", {"question": "Q", "answer": "so\n#### -3"}, Problem("Q", "-3", "gsm8k-test", "1")),
        ("math500", {"problem": "Q", "answer": "\\frac{1}{2}", "unique_id": "t/1"}, Problem("Q", "\\frac{1}{2}", "math500", "t/1")),
        ("aime24", {"id": 60, "problem": "Q", "answer": "025", "url": ""}, Problem("Q", "25", "aime24", "60")),
        ("aime25", {"id": "0", "question": "Q", "answer": 70.0}, Problem("Q", "70", "aime25", "0")),
        ("amc23", {"id": 0, "problem": "Q", "question": "Q", "answer": 27.0}, Problem("Q", "27", "amc23", "0")),
    ],
)  # fmt: skip
def test_a_record_as_published_becomes_a_row(tmp_path, name, record, expected):
    assert collect(name, save(tmp_path / "given.jsonl", [record])).problems == [expected]


def test_rows_are_a_task_and_read_back_as_written(tmp_path):
    rows = [Problem("Où est $x$?\nAnd \u2028 y", "\\frac{1}{2}", "made", "1"), Problem("b", "2", "made", "2")]
    write_with_report(tmp_path / "rows.jsonl", rows, {})
    assert read_problems(tmp_path / "rows.jsonl") == rows
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "rows.json"}


CONVERSATION = [
    {"role": "system", "content": "Answer with a number."},
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+3="},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_prompt_may_be_a_conversation_whose_last_message_is_the_question(tmp_path, suffix):
    path = save(tmp_path / f"rows{suffix}", [{"prompt": CONVERSATION, "answer": "5"}])
    (problem,) = read_problems(path, template="Q: {prompt}")
    assert (problem.prompt, problem.answer) == ("Q: 2+3=", "5")
    assert problem.messages == [*CONVERSATION[:3], {"role": "user", "content": "Q: 2+3="}]
    write_with_report(tmp_path / "again.jsonl", [problem], {})
    assert read_problems(tmp_path / "again.jsonl") == [problem]


def test_a_conversation_goes_through_the_chat_template_and_needs_one():
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODELS["arithmetic"])
    problem = Problem("2+3=", "5", context=({"role": "system", "content": "7,"},))
    with pytest.raises(
        UserError, match=r"the prompt '2\+3=' is the end of a conversation, for which the model has no chat temp"
    ):
        tokenize_prompt(problem, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert tokenize_prompt(problem, tokenizer) == tokenizer("7,2+3=")["input_ids"]
    assert as_prompt(problem, tokenizer) == problem.messages


class TestContamination:
    def test_is_the_same_words_in_another_layout_or_a_long_run_in_common(self):
        words = [f"w{n}" for n in range(OVERLAP + 1)]
        evaluated = [Problem("Let  X = 1,\nfind X.", "1", "e", "1"), Problem(" ".join(words), "1", "e", "2")]
        trained = [
            Problem("let x=1, find x.", "1", "t", "same"),
            Problem("Before. " + " ".join(words[1:]) + " After.", "1", "t", "overlap"),
            Problem("Before. " + " ".join(words[2:]) + " After.", "1", "t", "too short"),
            Problem("Let X = 2, find X.", "2", "t", "other"),
        ]
        assert contamination(trained, evaluated) == {"same": ["same"], "overlap": ["overlap"]}

    def test_of_texts_is_told_from_words_and_signs_alone(self):
        assert normalised("Ｌet\t$x=1$") == normalised("let $ x = 1 $")
        assert normalised("x=1") != normalised("x=-1")


GOOD = {"question": "Q", "answer": "#### 1"}
MALFORMED = [
    (b"{", "is not JSON"), (b"\"\"", "is a str"), (b"[1]", "is a list"), (b"null", "is a NoneType"), (b"3", "is a Number"),
    (b'{"question": "Q"}', "has no field 'answer'"), (b'{"answer": "#### 1"}', "has no field 'problem'"),
    (b'{"question": null, "answer": "#### 1"}', "question is None"), (b'{"question": "", "answer": "#### 1"}', "question is empty"),
    (b'{"question": " \\n", "answer": "#### 1"}', "question is empty"), (b'{"question": ["Q"], "answer": "#### 1"}', "question is ['Q']"),
    (b'{"question": {"a": 1}, "answer": "#### 1"}', "question is {'a': 1}"), (b'{"question": true, "answer": "#### 1"}', "question is True"),
    (b'{"question": "Q", "answer": null}', "answer is None"), (b'{"question": "Q", "answer": "1"}', "expected a solution that ends in ####"),
    (b'{"question": "Q", "answer": "#### one"}', "expected a solution"), (b'{"question": "Q", "answer": "####"}', "expected a solution"),
    (b'{"question": "Q", "answer": NaN}', "answer is nan"), (b'{"question": "Q", "answer": Infinity}', "answer is inf"),
    (b'{"question": "\\ud800", "answer": "#### 1"}', "lone surrogate"), (b'{"question": "Q", "answer": "\\udfff #### 1"}', "lone surrogate"),
    (b'{"question": "\xff", "answer": "#### 1"}', "is not JSON in UTF-8"), (b'{"question": "Q", "answer": "#### 1"', "is not JSON"),
    (b'{"question": "' + b"a" * 10_000_000 + b'", "answer": "#### 1"}', "has more than 4,000,000 bytes"),
    (b'{"question": "Q", "answer": "' + b"1" * 200_000 + b'"}', "has 200,000 characters"),
]  # fmt: skip


def test_every_malformed_row_is_named_and_nothing_is_written(here, drpo):  # noqa: F811
    lines, expected = [], []
    for number, (line, what) in enumerate(MALFORMED * 2):
        lines += [json.dumps(GOOD).encode(), line]
        expected.append((f"error: gsm8k.jsonl, row {2 * number + 2}: ", what))
    # A blank line counts as a row and is no mistake.
    (here / "gsm8k.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")
    before = contents(here)
    code, out, err = drpo("data", "gsm8k", "--from", "gsm8k.jsonl", "--out", "data")
    assert (code, out) == (2, "")
    assert len(expected) == len(err.splitlines()) == 50
    for said, (where, what) in zip(err.splitlines(), expected, strict=True):
        assert said.startswith(where)
        assert what in said
    assert contents(here) == before


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ({"prompt": []}, "prompt is not a list of chat messages"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt: content is None"),
        ({"reward_model": {"ground_truth": None}}, "reward_model.ground_truth is None"),
        ({"reward_model": None}, "has no field 'reward_model.ground_truth'"),
    ],
)
def test_a_malformed_parquet_row_is_named(tmp_path, broken, what):
    path = save(tmp_path / "dapo.parquet", [*DAPO, DAPO[0] | broken])
    with pytest.raises(UserError) as error:
        collect("dapo-math-17k", path)
    assert len(error.value.lines) == 1
    assert f"{path}, row 7: {what}" in error.value.lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["gsm9k"], "unknown data set 'gsm9k'; did you mean 'gsm8k'?"),
        (["gsm8k", "--from", "missing.jsonl"], "missing.jsonl: no such file"),
        (["gsm8k", "--from", "rows.csv"], "rows.csv: expected a file that ends in .jsonl or .parquet"),
        (["gsm8k", "--from", "empty.jsonl"], "empty.jsonl: has no rows"),
        (["gsm8k", "--from", "torn.parquet"], "torn.parquet: cannot be read"),
        (["gsm8k", "--from", "good.jsonl", "--wrapper"], "--wrapper: gsm8k has none"),
        (["gsm8k", "--from", "good.jsonl", "--against", "good.jsonl"], "good.jsonl, row 1: has no field 'prompt'"),
        (["gsm8k", "--from", "good.jsonl", "--out", "taken"], "taken/gsm8k.jsonl: already exists"),
        (["gsm8k", "--from", "good.jsonl", "--out", "good.jsonl"], "--out good.jsonl/gsm8k.jsonl: cannot be written"),
        (["gsm8k"], "cannot load openai/gsm8k from the hub"),
        (["filter", "missing.jsonl", "--model", "arithmetic", "--out", "kept.jsonl"], "missing.jsonl: no such file"),
        (["filter", "good.jsonl", "--model", "m", "--out", "kept.txt"], "--out kept.txt: expected a name that ends in .jsonl"),
        (["filter", "good.jsonl", "--model", "m", "--out", "good.jsonl", "--overwrite"], "--out good.jsonl: is what is filtered"),
        (["filter", "good.jsonl", "--model", "m", "--out", "k.jsonl", "--min", "0.9"], "--min 0.9: expected at most --max"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_line(here, refusal, arguments, expected):  # noqa: F811
    save(here / "good.jsonl", [GOOD])
    (here / "empty.jsonl").touch()
    (here / "torn.parquet").write_bytes(b"PAR1 torn")
    (here / "rows.csv").write_text("a,b")
    (here / "taken").mkdir()
    (here / "taken" / "gsm8k.jsonl").touch()
    assert refusal("data", *arguments).startswith(expected)


def test_the_command_writes_rows_and_a_report(here, drpo):  # noqa: F811
    save(here / "test.jsonl", [GOOD | {"question": "Seen before"}])
    save(here / "train.jsonl", [GOOD, GOOD, GOOD | {"question": "seen  BEFORE"}])
    drpo("data", "gsm8k-test", "--from", "test.jsonl")
    code, out, _ = drpo("data", "gsm8k", "--from", "train.jsonl", "--against", "data/gsm8k-test.jsonl")
    assert code == 0
    assert out.splitlines() == [
        "2 problems (published: 7,473) from 3 rows, 1 duplicates",
        "1 of them are in data/gsm8k-test.jsonl, 0 more share 20 words with one there",
        "data/gsm8k.jsonl",
    ]
    report = json.loads((here / "data" / "gsm8k.json").read_text())
    assert report["contamination"] == {"data/gsm8k-test.jsonl": {"same": ["3"], "overlap": []}}
    assert report["versions"]["drpo"]


def test_the_pass_rate_decides_what_is_kept_bounds_included():
    rows = [Problem(str(n), "1", "made", str(n)) for n in range(5)]
    table = [{"correct": n, "samples": 4} for n in range(5)]
    assert [row.id for row in within_pass_rates(rows, table, 0.25, 0.75)] == ["1", "2", "3"]


def test_every_source_has_its_published_count():
    counts = {name: source.rows for name, source in SOURCES.items()}
    assert counts == {
        "dapo-math-17k": 17_398, "gsm8k": 7473, "gsm8k-test": 1319, "math500": 500, "aime24": 30, "aime25": 30, "amc23": 40,
    }  # fmt: skip
