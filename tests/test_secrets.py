"""Secrets are in no byte that is written or printed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from drpo.errors import UserError
from drpo.redact import find_secret, redact
from drpo.run.recipe import BUILTIN_RECIPE, Recipe, load_recipe
from support.rollouts import make_trainer
from test_cli import drpo, here  # noqa: F401

CANARY = "canary5f3a"
"""Is in every secret here, and in nothing else."""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "DATABASE_PASSWORD"):
        monkeypatch.setenv(name, f"{name}-{CANARY}")


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leaks(folder: Path) -> list[str]:
    """The files that hold the canary, in their name or their bytes."""
    return [name for name, content in written(folder).items() if CANARY.encode() in content or CANARY in name]


SECRET_TEXTS = [
    f"https://user:{CANARY}@host/path",
    f"https://user:p@{CANARY}@host/path",
    f"https://user:p/{CANARY}@host/path",
    f"https://{CANARY}@host",
    f"https:/user:{CANARY}@host/data.jsonl: no such file",
    f"https://host/path?x=1&access_token={CANARY}&y=2",
    f"--set trainer.hub_token={CANARY}",
    f"--set trainer.hub_token=[{CANARY}, line 1",
    f"--set trainer={{a: 1, hub_token: [{CANARY}, line 1",
    f"got {{'name': 'math', 'api_key': '{CANARY}'}}",
    f'got {{"hub_token":"{CANARY}"}}',
    f"Illegal header value b'Bearer {CANARY}'",
]


@pytest.mark.parametrize("text", SECRET_TEXTS)
def test_a_secret_in_a_message_is_hidden(text: str) -> None:
    assert CANARY in text
    assert CANARY not in redact(text)
    assert CANARY not in str(UserError(text, fix=text))
    assert CANARY not in (UserError("x", fix=text).fix or "")


def test_a_secret_that_is_cut_short_in_a_long_message_is_hidden() -> None:
    for length in range(UserError.LONGEST - 60, UserError.LONGEST + 10):
        assert "canary" not in str(UserError("x" * (length - 1) + f" https://user:{CANARY}@host/"))


def test_a_secret_of_the_environment_is_hidden(environment: None) -> None:
    assert redact(f"the header is HF_TOKEN-{CANARY}, of 10") == "the header is <hidden>, of 10"


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8000/model@main: expected max_tokens=5, pad_token: <pad>, eos_token_id=[3]",
        "unknown objective 'token'; aggregation: got 'token-mean', at token 3: got -1",
        "a basic arithmetic problem of the bearer obligations, token: {prompt}",
        "write to user@host.example, or see https://host.example/a?page=2",
    ],
)
def test_text_without_a_secret_is_as_it_was(text: str) -> None:
    assert redact(text) == text
    assert find_secret(text) is None


@pytest.mark.parametrize(
    "text",
    ["a", "a.b-", "token", "https://", "https://a:", "_-", '"token"', "a:/", "token=", "basic ", "https://a:b@"],
)
def test_megabytes_are_searched_in_seconds(text: str) -> None:
    begin = time.perf_counter()
    redact(text * (10**6 // len(text)))
    assert time.perf_counter() - begin < 10


SECRET_SETTINGS = [
    (f"trainer.hub_token={CANARY}", "trainer.hub_token"),
    (f"trainer.vllm_server_base_url=http://user:{CANARY}@host:8000", "trainer.vllm_server_base_url"),
    (f"trainer.chat_template_kwargs={{inner: [{{password: {CANARY}}}]}}", "trainer.chat_template_kwargs.inner.0.password"),
    (f"""trainer.generation_kwargs='{{"api_key": "{CANARY}"}}'""", "trainer.generation_kwargs"),
    (f"trainer.hub_tokn={{secret: {CANARY}}}", "trainer.hub_tokn.secret"),
    (f"model=https://user:{CANARY}@host/model", "model"),
    (f"model=https://host/model?token={CANARY}", "model"),
    (f"task.train=https://user:{CANARY}@host/rows.jsonl", "task.train"),
    (f"task.heldout=https://user:{CANARY}@host/rows.parquet", "task.heldout"),
    (f"reward={{name: math, api_key: {CANARY}}}", "reward.api_key"),
    (f"password={CANARY}", "password"),
    (f"model=HF_TOKEN-{CANARY}", "model"),
]  # fmt: skip


@pytest.mark.parametrize(("assignment", "field"), SECRET_SETTINGS)
def test_a_secret_in_a_recipe_is_refused_by_its_field(environment: None, assignment: str, field: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(None, [assignment])
    assert f": {field}: holds a secret" in str(error.value)
    assert CANARY not in str(error.value)


def test_a_key_for_a_secret_may_be_empty() -> None:
    assert load_recipe(None, ["trainer.hub_token=null"]).trainer["hub_token"] is None


def test_a_recipe_that_is_made_in_python_says_no_secret_either() -> None:
    document = load_recipe().model_dump() | {"trainer": {"hub_token": CANARY}}
    with pytest.raises(ValueError, match=r"trainer\.hub_token: holds a secret") as error:
        Recipe.model_validate(document)
    assert CANARY not in str(error.value)


URL = f"https://user:{CANARY}@host"

FAILING = [
    *(["train", "--set", assignment] for assignment, _ in SECRET_SETTINGS),
    ["train", "--set", f"trainer.hub_token=[{CANARY}"],
    ["train", "--set", f"trainer={{hub_token: {CANARY}"],
    ["train", f"{URL}/recipe.yaml"],
    ["train", "recipe.yaml"],
    ["train", "--engine", "verl", "--verl", f"+trainer.hf_token={CANARY}"],
    ["train", "--output", f"{URL}/run\0"],
    ["train", "--resume", "--output", f"{URL}/run"],
    ["train", "--set", "reward=leak:raises"],
    ["doctor", "--no-rollout", "recipe.yaml"],
    ["doctor", "--no-rollout", "--json", "--set", f"model={URL}"],
    ["eval", URL, "--data", "arithmetic"],
    ["eval", "arithmetic", "--data", f"{URL}/rows.jsonl"],
    ["eval", "arithmetic", "--data", "arithmetic", "--chat-template-kwargs", f'{{"token": "{CANARY}"}}'],
    ["data", "gsm8k", "--from", f"{URL}/rows.jsonl"],
    ["data", "filter", "train.jsonl", "--model", URL, "--out", "kept.jsonl"],
    ["inspect", f"{URL}/rows.jsonl"],
    ["report", f"{URL}/run"],
    ["compare", f"{URL}/a", f"{URL}/b"],
]


@pytest.mark.parametrize("debug", ["0", "1"], ids=["line", "traceback"])
def test_a_command_that_fails_tells_and_writes_no_secret(
    here: Path, drpo: Any, environment: None, monkeypatch: pytest.MonkeyPatch, debug: str  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("DRPO_DEBUG", debug)
    (here / "recipe.yaml").write_text(BUILTIN_RECIPE.read_text() + f"trainer: {{hub_token: {CANARY}}}\n")
    (here / "leak.py").write_text(
        "import os\nraise OSError(f\"Bearer {os.environ['HF_TOKEN']} and {os.environ['WANDB_API_KEY']}\")\n"
    )
    before = written(here)
    for arguments in FAILING:
        code, out, err = drpo(*arguments)
        assert code in (1, 2), arguments
        assert CANARY not in out + err, arguments
    assert {name: content for name, content in written(here).items() if "__pycache__" not in name} == before


def test_a_run_from_its_start_to_its_report_writes_and_tells_no_secret(
    here: Path, drpo: Any, environment: None  # noqa: F811
) -> None:  # fmt: skip
    small = ("rollouts=2", "prompts_per_rollout=4", "checkpoint_every=1", "heldout_problems=4", "record_rollouts=true")
    code, out, err = drpo("train", "--output", "run", *(part for field in small for part in ("--set", field)))
    assert code == 0, err
    assert CANARY not in out + err
    assert leaks(here) == []
    assert {"report.html", "recipe.yaml", "rollouts.jsonl", "model"} <= {path.name for path in (here / "run").iterdir()}
    assert not [name for name in written(here) if name.endswith("training_args.bin")]


def test_a_trainer_in_python_writes_no_secret(tmp_path: Path, problems: Dataset, environment: None) -> None:
    trainer = make_trainer(
        tmp_path / "checkpoints",
        problems,
        hub_token=f"hub-{CANARY}",
        vllm_server_base_url=f"http://user:{CANARY}@host",
        chat_template_kwargs={"api_key": f"key-{CANARY}"},
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert leaks(tmp_path) == []
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "model").iterdir()
    }
