"""Whether a resolver finds versions for this library and each of verl's extras together; needs the package index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[1]


def resolve(folder: Path, *requirements: str, override: str | None = None) -> subprocess.CompletedProcess[str]:
    (folder / "requirements.txt").write_text("\n".join((f"{ROOT}[verl]", *requirements)))
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--python-version", "3.11", "requirements.txt"]
    if override is not None:
        (folder / "override.txt").write_text(override)
        command += ["--override", "override.txt"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("extras", "override", "expected"),
    [
        ("vllm", None, ("vllm==0.24.0", "torch==2.11.0", "transformers==5.9.0")),
        ("vllm,fsdp", None, ("vllm==0.24.0", "trl==0.27.0")),
        # It contradicts itself.
        ("sglang", "transformers==5.9.0", ("sglang==0.5.12", "transformers==5.9.0")),
    ],
)
def test_versions_are_found_beside_an_extra_of_verl(
    tmp_path: Path, extras: str, override: str | None, expected: tuple[str, ...]
) -> None:
    ended = resolve(tmp_path, f"verl[{extras}]==0.9.1", override=override)
    assert ended.returncode == 0, ended.stderr
    resolved = [line.strip() for line in ended.stdout.splitlines()]
    assert set(expected) <= set(resolved)


@pytest.mark.parametrize(("extra", "because"), [("sglang", "transformers"), ("megatron", "megatron-bridge")])
def test_where_none_are_found_it_is_verl_s_extra_alone(tmp_path: Path, extra: str, because: str) -> None:
    ended = resolve(tmp_path, f"verl[{extra}]==0.9.1")
    assert ended.returncode != 0
    assert because in ended.stderr
    (tmp_path / "alone.txt").write_text(f"verl[{extra}]==0.9.1")
    alone = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--python-version", "3.11", "alone.txt"]
    assert subprocess.run(alone, cwd=tmp_path, capture_output=True).returncode != 0
