"""Several hundred malformed rows of problems and rollouts, in JSON Lines and Parquet: each is named by file and row."""

from __future__ import annotations

import datetime
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from drpo.data.files import LONGEST_PROBLEM, LONGEST_TEXT, MalformedRowsError, read_problems
from drpo.data.problems import Problem, refuse_longer_prompts
from drpo.errors import UserError
from drpo.inspect.read import read_rollouts
from support.rollouts import load_model
from test_cli import contents, drpo, here, refusal  # noqa: F401

GOOD = b'{"prompt": "1+1=", "answer": "2"}'

NO_TEXT = [
    *("null", "true", "[]", '["1+1="]', "{}", '{"a": "b"}', '""', '" "', '"\\n\\t"', "NaN", "Infinity", "-Infinity"),
    *('"\\ud800"', '"a\\udfffb"', '"\\udc00\\ud800"', '"a\\u0000b"', f'"{"x" * (LONGEST_TEXT + 1)}"'),
]  # fmt: skip

LINES: list[bytes] = [
    *(GOOD[:length] for length in range(1, len(GOOD))),
    # Any bit of what holds the line together.
    *(
        GOOD[:place] + bytes([byte ^ (1 << bit)]) + GOOD[place + 1 :]
        for place, byte in enumerate(GOOD)
        if byte in b'{}":,'
        for bit in range(8)
    ),
    *(f'{{"prompt": {value}, "answer": "2"}}'.encode() for value in [*NO_TEXT, "3", "1.5"]),
    *(f'{{"prompt": "1+1=", "answer": {value}}}'.encode() for value in [*NO_TEXT, "1e999", "-1e309", "1e-400", "9" * 400]),
    *(b"null", b"true", b"3", b"1.5", b"NaN", b'"text"', b"[]", b'["1+1=", "2"]', b"[" + GOOD + b"]", b"{}"),
    *(b'{"prompt": "1+1="}', b'{"answer": "2"}', b'{"promt": "1+1=", "answer": "2"}', b'{"Prompt": "1", "answer": "2"}'),
    *(b'{"prompt": "1", "answer": "2", "prompt": "3"}', b'{"prompt": "1", "answer": "2", "answer": "2"}'),
    b'{"prompt": "1", "answer": "2", "extra": {"a": 1, "a": 2}}',
    *(
        place.replace(b"?", wrong)
        for wrong in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x28", b"\x80", b"\0", b"\x1b")
        for place in (b'{"prompt": "?", "answer": "2"}', b'{"pr?ompt": "1", "answer": "2"}', b'?{"prompt": "1", "answer": "2"}')
    ),
    *(GOOD + GOOD, GOOD + b",", GOOD[:-1] + b",}", GOOD.replace(b'"', b"'"), b"// a\r" + GOOD, GOOD + b"]", b"prompt,answer"),
    GOOD.decode().encode("utf-16"),
    b"\xef\xbb\xbf" + GOOD,
    *(b"[" * 100_000, b'{"prompt": ' * 100_000, b'{"prompt": "1", "answer": ' + b"[" * 100_000),
    *(b'{"prompt": "' + b"a" * 10_000_000 + b'", "answer": "2"}', b'{"prompt": "1", "answer": "' + b"1" * 10_000_000 + b'"}'),
    b"{" + b", ".join(b'"%d": 0' % key for key in range(200_000)) + b"}",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda line: repr(line[:40])[2:-1] + f" {len(line)}")
def test_a_malformed_line_is_named_by_file_and_row(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join((GOOD, line, GOOD, b"")))
    with pytest.raises(MalformedRowsError) as error:
        read_problems(path)
    (named,) = error.value.lines
    assert named.startswith(f"{path}, row 2: ")
    assert len(named) < 1100


INVALID = b"\xed\xa0\x80"


def strings(*values: bytes) -> pa.Array:
    """Text in Parquet, which may be no UTF-8."""
    return pa.array(values, pa.binary()).view(pa.string())


DAY = datetime.date(2024, 1, 1)
PROMPTS = pa.array(["1+1="] * 3)
ANSWERS = pa.array(["2"] * 3)

COLUMNS: dict[str, tuple[pa.Array, pa.Array]] = {
    "null prompt": (pa.array(["1", None, "3"]), ANSWERS),
    "null answer": (PROMPTS, pa.array(["1", None, "3"])),
    "empty prompt": (pa.array(["1", "", "3"]), ANSWERS),
    "blank answer": (PROMPTS, pa.array(["1", " \n", "3"])),
    "NUL": (pa.array(["1", "a\0b", "3"]), ANSWERS),
    "long prompt": (pa.array(["1", "x" * (LONGEST_TEXT + 1), "3"]), ANSWERS),
    "10 MB prompt": (pa.array(["1", "x" * 10_000_000, "3"]), ANSWERS),
    "10 MB answer": (PROMPTS, pa.array(["1", "x" * 10_000_000, "3"])),
    "no UTF-8 in a prompt": (strings(b"1", INVALID, b"3"), ANSWERS),
    "no UTF-8 in an answer": (PROMPTS, strings(b"1", b"\xff", b"3")),
    "NaN": (PROMPTS, pa.array([1.0, math.nan, 3.0])),
    "inf": (PROMPTS, pa.array([1.0, -math.inf, 3.0])),
    "null number": (PROMPTS, pa.array([1, None, 3])),
    "null in a union of none": (PROMPTS, pa.array([1.5, None, 3.5], pa.float32())),
}

ALL_ROWS: dict[str, tuple[pa.Array, pa.Array]] = {
    "numbers for prompts": (pa.array([1, 2, 3]), ANSWERS),
    "lists for prompts": (pa.array([["1"]] * 3), ANSWERS),
    "structs for prompts": (pa.array([{"role": "user", "content": "1"}] * 3), ANSWERS),
    "bytes for prompts": (pa.array([b"1"] * 3), ANSWERS),
    "nothing for prompts": (pa.nulls(3), ANSWERS),
    "booleans": (PROMPTS, pa.array([True, False, True])),
    "lists": (PROMPTS, pa.array([[1]] * 3)),
    "structs": (PROMPTS, pa.array([{"a": 1}] * 3)),
    "bytes": (PROMPTS, pa.array([b"2"] * 3)),
    "dates": (PROMPTS, pa.array([DAY] * 3)),
    "times": (PROMPTS, pa.array([datetime.datetime(2024, 1, 1)] * 3)),
    "durations": (PROMPTS, pa.array([datetime.timedelta(1)] * 3)),
    "times that Python has not": (PROMPTS, pa.array([2**62] * 3, pa.timestamp("us"))),
    "nothing": (PROMPTS, pa.nulls(3)),
    "infinite numbers": (PROMPTS, pa.array([math.inf] * 3, pa.float32())),
}


def save(path: Path, **columns: pa.Array) -> Path:
    pyarrow.parquet.write_table(pa.table(columns), path, write_page_checksum=True)
    return path


@pytest.mark.parametrize("case", COLUMNS)
def test_a_malformed_row_of_parquet_is_named(tmp_path: Path, case: str) -> None:
    prompts, answers = COLUMNS[case]
    path = save(tmp_path / "rows.parquet", prompt=prompts, answer=answers)
    with pytest.raises(MalformedRowsError) as error:
        read_problems(path)
    (named,) = error.value.lines
    assert named.startswith(f"{path}, row 2: ")


@pytest.mark.parametrize("case", ALL_ROWS)
def test_a_column_of_another_type_is_named_row_by_row(tmp_path: Path, case: str) -> None:
    prompts, answers = ALL_ROWS[case]
    path = save(tmp_path / "rows.parquet", prompt=prompts, answer=answers)
    with pytest.raises(MalformedRowsError) as error:
        read_problems(path)
    assert [line.split(":")[0] for line in error.value.lines] == [f"{path}, row {row}" for row in (1, 2, 3)]


@pytest.mark.parametrize("names", [("promt", "answer"), ("prompt", "anwser"), ("question", "solution"), ("a", "b")])
def test_columns_of_other_names_are_named(tmp_path: Path, names: tuple[str, str]) -> None:
    path = save(tmp_path / "rows.parquet", **dict(zip(names, (PROMPTS, ANSWERS), strict=True)))
    with pytest.raises(MalformedRowsError, match=r"row 1: has no field '(prompt|answer)'"):
        read_problems(path)


def damaged(whole: bytes) -> list[bytes]:
    """A file without its end, with a bit flipped, and what is no Parquet at all."""
    return [
        *(whole[:length] for length in range(0, len(whole), len(whole) // 60)),
        *(
            whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :]
            for place in range(0, len(whole), len(whole) // 150)
        ),
        *(b"PAR1", b"PAR1PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1", b"\0" * 1000, GOOD, whole + b"x", b"x" + whole),
        *(whole[:place] + whole[place + 1 :] for place in range(4, len(whole), len(whole) // 20)),
    ]


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd"])
def test_a_damaged_file_is_named_or_reads_as_it_was(tmp_path: Path, compression: Any) -> None:
    """A bit of the footer that nothing depends on may be flipped; text without a checksum may be, and nobody can know."""
    table = pa.table({"prompt": [f"{n}+{n}=" for n in range(200)], "answer": [str(2 * n) for n in range(200)]})
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path, compression=compression, write_page_checksum=True)
    problems = read_problems(path)
    cases = damaged(path.read_bytes())
    refusals = []
    for content in cases:
        path.write_bytes(content)
        try:
            assert read_problems(path) == problems
        except UserError as error:
            refusals.append(str(error))
    assert all(message.startswith(str(path)) for message in refusals)
    assert len(cases) > 200
    assert len(refusals) > 0.6 * len(cases)


ROLLOUT: dict[str, Any] = {
    "logp": [-0.5, -1.0, -2.0],
    "behavior_logp": [-0.5, -1.5, -2.0],
    "old_logp": [-0.5, -1.5, -2.0],
    "advantage": 1.0,
    "reward": 1.0,
    "group": "a",
    "mask": [1, 1, 1],
    "step": 1,
    "age": 0,
}

LOG_PROBS = ("logp", "behavior_logp", "old_logp")

ROLLOUTS: list[tuple[str, Any]] = [
    *(
        (field, value)
        for field in LOG_PROBS
        for value in (
            *([], [-1.0], [-1.0] * 2, [-1.0] * 4, [[-1.0] * 3], None, "text", 3, True, {"a": 1}, {}),
            *([-1.0, None, -1.0], [-1.0, "-1", -1.0], [-1.0, True, -1.0], [-1.0, [-1.0], -1.0], [-1.0, {}, -1.0]),
            *([-1.0, math.nan, -1.0], [-1.0, math.inf, -1.0], [-1.0, -math.inf, -1.0], [-1.0, 0.5, -1.0]),
            *([-1.0, -1e19, -1.0], [-1.0, -(10**400), -1.0], [-1.0, 10**400, -1.0]),
        )
    ),
    *(("mask", value) for value in ([], [1], [1] * 4, [1, 2, 1], [1, -1, 1], [1, None, 1], [1, 0.5, 1], "111", None, 3)),
    *(
        ("advantage", value)
        for value in (None, "1", math.nan, math.inf, 1e19, 10**400, [], [1.0], [1.0] * 4, [1.0, None, 1.0], {})
    ),
    *(("advantage", [1.0, value, 1.0]) for value in (math.nan, math.inf, "1", [], 1e19)),
    *(("reward", value) for value in ("1", math.inf, -1e19, [1.0], [1.0, None, 1.0], ["1"] * 3, {})),
    *((field, value) for field in ("step", "age") for value in (-1, 0.5, "1", None, True, math.nan, 2**60, [1], {})),
    *((field, "missing") for field in ROLLOUT),
    ("group", None),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), ROLLOUTS, ids=lambda value: repr(value)[:40])
def test_a_malformed_rollout_is_named_by_file_and_row(tmp_path: Path, field: str, value: Any) -> None:
    # Rewards and groups are read where there are no advantages.
    unread = ("advantage",) if field in ("reward", "group") else ("reward", "group")
    good = {name: value for name, value in ROLLOUT.items() if name not in unread}
    bad = {**good, field: value}
    if value == "missing":
        del bad[field]
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, bad, good)))
    with pytest.raises(MalformedRowsError) as error:
        read_rollouts(path, {}, "mean")
    (named,) = error.value.lines
    assert named.startswith(f"{path}, row 2: ")
    # A list of log-probs that is too short or too long is found beside the mask's.
    assert field in named or "mask has 3 values" in named


def test_there_are_more_than_two_hundred_of_each() -> None:
    assert len(LINES) > 200
    assert len(ROLLOUTS) > 100


def test_a_prompt_longer_than_the_model_reads_is_named_before_anything_is_written(here: Path, refusal: Any) -> None:  # noqa: F811
    rows = [{"prompt": "1+1=", "answer": "2"}] * 16 + [{"prompt": "1+" * 4000 + "1=", "answer": "4001"}]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refusal("train", "--set", "task.train=rows.jsonl", "--output", "run")
    # 4,001 ones, 4,000 pluses and a sign of equality, a token each.
    assert message.startswith(
        "task.train: the prompt of problem 17, '1+1+1+1+1+1+...+1+1+1+1+1+1=', has 8,002 tokens, which"
    )
    assert "the model's 4,096 positions; expected prompts of at most 4,076 tokens" in message


@pytest.mark.parametrize("told", [{}, {"long": True}])
def test_the_chat_template_counts_in_the_length_of_a_prompt(told: dict[str, bool]) -> None:
    _, tokenizer = load_model()
    around = "{% if long %}{{ '1+' * 45 }}{% endif %}" if told else "1+" * 45
    tokenizer.chat_template = around + "{{ messages[0].content }}"
    # 90 characters of the template and 4 of the prompt, a token each, beside a completion of 10.
    refuse_longer_prompts([Problem("1+1=", "2")], tokenizer, 104, 10, "task.train", told)
    with pytest.raises(
        UserError, match="has 94 tokens, which with max_completion_length 10 are more than the model's 103"
    ):
        refuse_longer_prompts([Problem("1+1=", "2")], tokenizer, 103, 10, "task.train", told)


@pytest.mark.parametrize(
    ("arguments", "content"),
    [
        (["train", "--set", "task.train=rows.jsonl"], b'{"prompt": "1+1=", "answer": NaN}'),
        (["train", "--set", "task.heldout=rows.jsonl"], b"{"),
        (["data", "gsm8k", "--from", "rows.jsonl"], b"{"),
        (["data", "verl", "rows.jsonl", "--out", "out.jsonl"], b'{"prompt": "\\ud800", "answer": "1"}'),
        (["eval", "arithmetic", "--data", "rows.jsonl"], b"null"),
        (["inspect", "rows.jsonl"], b'{"logp": [-1.0, -1.0], "behavior_logp": [-1.0], "advantage": 1}'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_every_command_names_the_row_and_writes_nothing(
    here: Path, refusal: Any, arguments: list[str], content: bytes  # noqa: F811
) -> None:  # fmt: skip
    (here / "rows.jsonl").write_bytes(content + b"\n")
    assert "rows.jsonl, row 1: " in refusal(*arguments)


PEAKS = """
import os, resource, sys
from pathlib import Path
from drpo.data.files import read_problems
from drpo.errors import UserError
from drpo.inspect.read import read_rollouts
for argument in sys.argv[1:]:
    path = Path(argument)
    if os.fork():
        os.wait()
        continue
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_rollouts(path, {}, "mean") if path.name.startswith("rollouts") else read_problems(path)
    except UserError as error:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error, flush=True)
    os._exit(0)
"""


def _large_line(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(600_000_000)  # takes no room on the disk


def _large_prompts(path: Path) -> None:
    prompts = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["x" * 10_000_000]))
    save(path, prompt=prompts, answer=pa.array(["1"] * 300))


FILES: dict[str, Callable[[Path], Any]] = {
    "zeros.jsonl": _large_line,
    "rollouts-zeros.jsonl": _large_line,
    "numbers.jsonl": lambda path: path.write_bytes(b"[" + b"1," * (LONGEST_PROBLEM // 2 - 2) + b"1]"),
    "rollouts-objects.jsonl": lambda path: path.write_bytes(b'{"logp": [' + b"{}," * 5_300_000 + b"1]}"),
    "prompts.parquet": _large_prompts,
}


@pytest.mark.long
def test_a_malformed_file_takes_half_a_gigabyte_at_most(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in FILES]
    for path, write in zip(paths, FILES.values(), strict=True):
        write(path)
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, *map(str, paths)], capture_output=True, text=True, timeout=120, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines, strict=True):
        kilobytes, message = line.split(" ", 1)
        assert message.startswith(str(path))
        assert int(kilobytes) < 512 * 1024, line
