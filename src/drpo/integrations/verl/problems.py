"""Problems as rows of a data set of verl's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from drpo.data.problems import Problem
from drpo.files import replace_jsonl, replacing

PLAIN_TEMPLATE = "'{{ messages[0].content }}'"
"""The chat template of a model that has none: the prompt as it stands."""


def write_rows(problems: Iterable[Problem], path: Path, source: str) -> int:
    """Write problems as verl reads them, a conversation and a reference answer each, as JSON Lines or .parquet; returns how many."""
    rows = [
        {
            "data_source": source,
            "prompt": problem.messages,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"index": index},
        }
        for index, problem in enumerate(problems)
    ]
    with replacing(path, "--out") as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), partial)
        else:
            replace_jsonl(partial, rows)
    return len(rows)
