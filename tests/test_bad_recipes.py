"""Several hundred malformed recipes, made from the fields of a recipe: each is one line that names the field."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from drpo.errors import UserError
from drpo.run.recipe import LARGEST, Recipe, load_recipe
from drpo.run.specs import LoRASpec, TaskSpec
from test_cli import contents, drpo, here, refusal  # noqa: F401

FIELDS = {
    "model": "arithmetic",
    "task": "{train: arithmetic}",
    "reward": "exact_answer",
    "objective": "drpo",
    "rollouts": "4",
    "prompts_per_rollout": "2",
    "num_generations": "4",
    "updates_per_rollout": "2",
    "learning_rate": "0.0001",
    "max_completion_length": "20",
}
"""A recipe: the YAML of each field."""

HUGE = "1" + 40 * "0"

NO_COUNT = [
    "many",
    "'4'",
    "4.5",
    "1e-5",
    "true",
    "[4]",
    "{a: 4}",
    ".nan",
    ".inf",
    "-1",
    HUGE,
    "0x10",
    "4_000",
    "'4,000'",
    "''",
]
NO_NUMBER = ["fast", "'1e-5'", "1e-5x", "true", "[1.0]", "{a: 1.0}", ".nan", ".inf", "-.inf", "1e999", HUGE]
NO_TEXT = ["3", "4.5", "true", "[a]", "{a: b}", "''", ".nan"]
NO_CHOICE = ["bf17", "''", "3", "true", "[fp32]", "{fp32: fp32}", "FP32"]
NO_BOOLEAN = ["soon", "'true'", "1", "0", "[true]", "yes", "null"]

COUNTS = [
    *("rollouts", "prompts_per_rollout", "num_generations", "updates_per_rollout", "max_completion_length"),
    *("micro_batch_size", "horizon", "evaluate_every", "checkpoint_every", "heldout_problems", "heldout_samples"),
    *("seed", "rollout_lag", "lora.r", "lora.alpha"),
]
CHOICES = ["aggregation", "advantage", "anchor", "train_precision", "rollout_precision"]
TEXTS = ["model", "task.train", "task.heldout", "task.prompt", "task.answer", "task.template", "lora.target_modules"]
TEXT_LISTS = ["lora.target_modules"]

OF_KINDS: list[tuple[str, str]] = [
    *((field, value) for field in COUNTS for value in NO_COUNT),
    *((field, "0") for field in COUNTS if field not in ("seed", "rollout_lag")),
    *((field, "null") for field in COUNTS if field not in ("micro_batch_size", "horizon", "rollout_lag")),
    *((field, value) for field in ("learning_rate", "temperature") for value in [*NO_NUMBER, "0", "-1"]),
    *(("audit_threshold", value) for value in [*NO_NUMBER[:-1], "0", "-1"]),
    *((field, value) for field in CHOICES for value in NO_CHOICE),
    *((field, value) for field in TEXTS for value in NO_TEXT if (field, value) != ("lora.target_modules", "[a]")),
    *((field, "null") for field in ("model", "task.train", "task.prompt", "task.template", "lora.target_modules")),
    *(("record_rollouts", value) for value in NO_BOOLEAN),
    *(("lora.target_modules", value) for value in ("[]", "[3]", "['']", "[[q_proj]]")),
    *((field, value) for field in ("task", "lora", "trainer") for value in ("3", "text", "[a]", "true")),
    *(("objective", value) for value in ("3", "true", "null", "[drpo]", "''", "drop", "{}", "{name: 3}", "{name: null}")),
    *(("objective", f"{{name: drpo, delta: {value}}}") for value in [*NO_NUMBER[:-1], "0", "-1", "null"]),
    *(("correction", value) for value in ("3", "true", "[token_mask]", "token_mas", "{}", "{name: 3}", "{high: 2}")),
    *(("reward", value) for value in ("3", "true", "null", "[]", "[[]]", "{}", "{name: 3}", "[{weight: 1}]", "exact_anwser")),
    *(("reward", f"{{name: math, weight: {value}}}") for value in NO_NUMBER),
    *(("reward", f"{{name: math, strict: {value}}}") for value in NO_BOOLEAN),
    *(("reward", value) for value in ("{name: math, time_limit: 0}", "{name: exact_answer, strict: true}", "overlong")),
    *(("reward", value) for value in ("'os:sep'", "'os:nothing'", "'nowhere:score'", "':'", "'os:'", "':score'", "'a b:c'")),
]  # fmt: skip

UNKNOWN = [
    *(
        (name[:-1] + "x" if is_end else name[1:], name)
        for name in Recipe.model_fields
        if name not in FIELDS
        for is_end in (True, False)
    ),
    *((f"task.{name[:-1]}x", f"task.{name}") for name in TaskSpec.model_fields),
    *((f"lora.{name}x", f"lora.{name}") for name in LoRASpec.model_fields),
]
"""A misspelt field, and the one it is nearest to."""

OF_THE_TRAINER = [
    *(("max_grad_norm", value) for value in ["much", "true", "[1.0]", "{a: 1}", ".nan", ".inf", "-1", "null", "''"]),
    *(("weight_decay", value) for value in ["much", "true", "-0.1", "[]"]),
    *((name, value) for name in ("adam_beta1", "adam_beta2") for value in ["-0.1", "1", "3.7", "true", "much"]),
    *(("data_seed", value) for value in ["-1", HUGE, "true", "1.5", "much"]),
    *((name, value) for name in ("dataloader_num_workers", "save_total_limit") for value in ["-1", HUGE, "1.5", "true"]),
    *(("per_device_eval_batch_size", value) for value in ["0", "-1", "1.5", "true", HUGE, "null"]),
    *(("max_skipped_updates", value) for value in ["0", "-1", "1.5", "true", "much"]),
    *(("tokens_per_micro_batch", value) for value in ["0", "-1", "1.5", "true", "much", HUGE]),
    *((name, value) for name in ("bf16_full_eval", "fused_loss") for value in ["0", "1", "soon", "null", "[true]"]),
    *(("warmup_ratio", value) for value in ["-0.1", "1.5", "true", "much"]),
    *(("lr_scheduler_type", value) for value in ["cosinus", "3", "true", "''", "[cosine]", "null"]),
    ("lr_scheduler_type", "cosine_with_min_lr"),
    *(("lr_scheduler_kwargs", value) for value in ["cosine", "3", "[1]", "'[1]'", "'{'"]),
    *(("optim", value) for value in ["adam", "3", "''", "[sgd]", "null"]),
    *(("report_to", value) for value in ["wandbb", "[wandbb]", "3", "{a: 1}"]),
    *(("log_level", value) for value in ["loud", "3", "''"]),
    *(("train_sampling_strategy", value) for value in ["sorted", "3"]),
    *(("accelerator_config", value) for value in ["missing.json", "{a: 1}", "3"]),
    *(("generation_kwargs", value) for value in ["{top_k: 5}", "{do_sample: false}", "3", "[1]", "{max_time: .nan}"]),
    *(("ddp_backend", value) for value in ["glooo", "3"]),
    *(("beta", value) for value in ["0.1", "much"]),
    *(("loss_type", value) for value in ["grpo2", "3"]),
    *((name, "3") for name in ("output_dir", "max_steps", "push_to_hub", "seed", "rollouts", "learning_rate", "fp16")),
]  # fmt: skip

DOCUMENTS = [
    ("duplicate field", "rollouts: 4\nrollouts: 5", "duplicate key 'rollouts'"),
    ("python tag", "seed: !!python/object/apply:os.system [ls]", "(in seed)"),
    ("python name", "reward: !!python/name:os.system", "(in reward)"),
    ("python in a list", "reward:\n- !!python/name:os.system", "tag:yaml.org"),
    ("number tag", "seed: !!int abc", "(in seed)"),
    ("digits without end", f"seed: {'9' * 5000}", "(in seed)"),
    ("timestamp tag", "seed: !!timestamp 2024-01-01x", "(in seed)"),
    ("set", "seed: !!set {a}", "seed: got {'a'}; expected an integer"),
    ("set in an option", "trainer: {run_name: !!set {a}}", "trainer.run_name: got {'a'}"),
    ("bytes in an option", "trainer: {run_name: !!binary aGk=}", "trainer.run_name: got b'hi'"),
    ("date in an option", "trainer: {run_name: !!timestamp 2024-01-01}", "trainer.run_name: got datetime.date"),
    ("alias", "seed: &a 1\nrollout_lag: *a", "aliases are not supported; expected the value itself (in rollout_lag)"),
    ("alias of itself", "trainer: &a {b: *a}", "aliases are not supported; expected the value itself (in trainer)"),
    ("merge key", "<<: {seed: 1}", "unknown field '<<'"),
    ("nested merge key", "lora: {<<: {r: 1}}", "unknown field 'lora.<<'"),
    ("key that is a list", "? [a]\n: 1", "key ['a'] is not text"),
    ("key that is a number", "1: a", "key 1 is not text"),
    ("key that is nothing", "~: a", "key None is not text"),
    ("tab", "task:\n\ttrain: x", "line 11"),
    ("unclosed bracket", "seed: [1", "line 11"),
    ("unclosed quote", "seed: 'a", "line 11"),
    ("two documents", "seed: 1\n---\nseed: 2", "another document"),
    ("directive", "%YAML 3.0\n---\nseed: 1", "line"),
    ("control character", "seed: a\x07b", "special characters are not allowed (in seed)"),
    ("deep list", f"seed: {'[' * 60}{']' * 60}", "seed: got [[[["),
    ("deep mapping", f"trainer: {'{a: ' * 200}1{'}' * 200}", "trainer"),
    ("very deep list", f"seed: {'[' * 5000}", "is nested too deeply"),
    ("long value", f"seed: {'x' * 90_000}", "seed: got 'xxx"),
    ("long key", f"{'x' * 900}: 1", "unknown field 'xxx"),
    ("many fields", "\n".join(f"x{n}: 1" for n in range(5000)), "unknown field 'x0'"),
    ("large file", f"# {'x' * LARGEST}", f"has more than {LARGEST:,} bytes"),
]  # fmt: skip


def recipe_with(field: str, value: str) -> str:
    """The text of a recipe with this YAML for a field, which may be a field of task, lora or trainer."""
    parent, _, inner = field.rpartition(".")
    if parent:
        others = "train: arithmetic, " if parent == "task" and inner != "train" else ""
        field, value = parent, f"{{{others}{inner}: {value}}}"
    return "".join(f"{name}: {text}\n" for name, text in {**FIELDS, field: value}.items())


def read(path: Path) -> None:
    """What ``drpo train`` checks before it loads a model."""
    from drpo.run.build import load_problems, make_config

    recipe = load_recipe(path)
    recipe.make_reward()
    load_problems(recipe, "train", 4)
    make_config(recipe, str(path.parent / "never"), processes=1)


def check(path: Path, text: str) -> str:
    """The line in which a recipe is refused, without its path."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) <= UserError.LONGEST + 3
    assert os.listdir(path.parent) == [path.name]
    return message.removeprefix(f"{path}").removeprefix(": ")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def short(value: Any) -> str:
    return str(value)[:40].replace("\n", "\\n")


@pytest.mark.parametrize(("field", "value"), OF_KINDS, ids=short)
def test_a_value_of_another_kind_is_refused_by_its_field(path: Path, field: str, value: str) -> None:
    message = check(path, recipe_with(field, value))
    assert message.startswith((f"{field}:", f"{field}.")), message


@pytest.mark.parametrize(("field", "nearest"), UNKNOWN)
def test_an_unknown_field_is_refused_with_the_nearest(path: Path, field: str, nearest: str) -> None:
    message = check(path, recipe_with(field, "1"))
    assert message.startswith(f"unknown field {field!r}; did you mean ")
    assert f"{nearest!r}" in message.split(" Known:")[0]


@pytest.mark.parametrize(("option", "value"), OF_THE_TRAINER, ids=short)
def test_an_option_of_the_trainer_is_refused_by_its_name(path: Path, option: str, value: str) -> None:
    message = check(path, recipe_with(f"trainer.{option}", value))
    assert message.startswith((f"trainer.{option}", f"trainer: has '{option}'")), message


def test_one_of_several_options_is_named(path: Path) -> None:
    message = check(path, recipe_with("trainer", "{weight_decay: 0.1, optim: adam, max_grad_norm: 0.5}"))
    assert message.startswith("trainer.optim: adam is not a valid OptimizerNames")


@pytest.mark.parametrize(("text", "expected"), [pytest.param(*rest, id=name) for name, *rest in DOCUMENTS])
def test_text_that_is_no_recipe_is_refused_by_line_and_field(path: Path, text: str, expected: str) -> None:
    begun = "".join(f"{name}: {value}\n" for name, value in FIELDS.items() if not text.startswith(f"{name}:"))
    assert expected in check(path, begun + text)


def test_there_are_more_than_five_hundred() -> None:
    assert len(OF_KINDS) + len(UNKNOWN) + len(OF_THE_TRAINER) + len(DOCUMENTS) > 500


@pytest.mark.parametrize(("field", "value"), [*OF_KINDS[::60], *((f"trainer.{o}", v) for o, v in OF_THE_TRAINER[::20])])
def test_the_command_says_the_same_and_writes_nothing(here: Path, refusal: Any, field: str, value: str) -> None:  # noqa: F811
    (here / "recipe.yaml").write_text(recipe_with(field, value))
    assert field in refusal("train", "recipe.yaml", "--output", "run")
