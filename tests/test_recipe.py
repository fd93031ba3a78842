"""A recipe is read as a whole or refused in one line that names the field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from drpo.data.sources import SOURCES
from drpo.errors import UserError
from drpo.recipes import FOLDER
from drpo.run.recipe import BUILTIN_RECIPE, dump_recipe, load_recipe

RECIPES = [BUILTIN_RECIPE, *sorted(FOLDER.glob("*.yaml"))]

RECIPE = """\
model: arithmetic
task:
  train: arithmetic
  heldout: arithmetic
reward: exact_answer
objective:
  name: drpo
  delta: 0.2
rollouts: 4
prompts_per_rollout: 2
num_generations: 4
updates_per_rollout: 2
learning_rate: 0.0001
max_completion_length: 20
seed: 0
"""


def changed(old: str, new: str) -> str:
    assert RECIPE.count(old) == 1, old
    return RECIPE.replace(old, new)


# What is written in place of which text, and what the message has to say.
MALFORMED = [
    pytest.param(changed(old, new), expected, id=name)
    for name, old, new, expected in (
        ("text for an integer", "rollouts: 4", "rollouts: many", "rollouts: got 'many'; expected an integer"),
        ("fraction for an integer", "rollouts: 4", "rollouts: 4.5", "rollouts: got 4.5; expected an integer"),
        ("bool for an integer", "seed: 0", "seed: true", "seed: got True; expected an integer"),
        ("nothing for an integer", "seed: 0", "seed:", "seed: got None; expected an integer"),
        ("number for text", "model: arithmetic", "model: 3", "model: got 3; expected text"),
        ("empty text", "model: arithmetic", "model: ''", "model: got ''"),
        ("number for a name", "reward: exact_answer", "reward: 3", "reward: got 3; expected a name"),
        ("unknown option", "reward: exact_answer", "reward: {name: math, strickt: true}", "option of math 'strickt'; did"),
        ("text for a bool", "reward: exact_answer", "reward: {name: math, strict: soon}", "strict: got 'soon'; expected"),
        ("out of range", "reward: exact_answer", "reward: {name: math, time_limit: 0}", "time_limit: got 0; expected"),
        ("no limit", "reward: exact_answer", "reward: {name: overlong}", "limit: is missing; overlong has no default"),
        ("text for a weight", "reward: exact_answer", "reward: [math, {name: gsm8k, weight: w}]", "reward.1.weight: got"),
        ("no reward", "reward: exact_answer", "reward: []", "reward: got []; expected"),
        ("NaN in an option", "seed: 0", "trainer: {generation_kwargs: {max_time: .nan}}", "trainer.generation_kwargs.max_time: got nan; expected a finite number"),
        ("number among modules", "seed: 0", "lora: {target_modules: 3}", "lora.target_modules: got 3; expected text"),
        ("text for a mapping", "task:\n  train: arithmetic\n  heldout: arithmetic", "task: arithmetic", "task: got"),
        ("list for an objective", "\n  name: drpo\n  delta: 0.2", " [drpo]", "objective: got ['drpo']"),
        ("number for a name", "name: drpo", "name: 3", "objective.name: got 3"),
        ("unknown field", "seed: 0", "sede: 0", "unknown field 'sede'; did you mean 'seed'?"),
        ("misspelt field without a default", "rollouts: 4", "rolouts: 4", "'rolouts'; did you mean 'rollouts'?"),
        ("unknown field of task", "heldout: arithmetic", "held_out: x", "'task.held_out'; did you mean 'task.heldout'?"),
        ("unknown field of lora", "seed: 0", "lora: {rank: 4}", "unknown field 'lora.rank'"),
        ("key that is not text", "seed: 0", "0: seed", "line 15: key 0 is not text"),
        ("duplicate key", "seed: 0", "seed: 0\nseed: 1", "line 16: duplicate key 'seed'"),
        ("duplicate nested key", "delta: 0.2", "delta: 0.2\n  delta: 0.3", "line 9: duplicate key 'delta'"),
        ("quoted 1e-5", "0.0001", "'1e-5'", "learning_rate: got '1e-5'; expected a number"),
        ("quoted number", "rollouts: 4", "rollouts: '4'", "rollouts: got '4'; expected an integer"),
        ("negative integer", "seed: 0", "seed: -1", "seed: got -1"),
        ("negative number", "0.0001", "-0.0001", "learning_rate: got -0.0001"),
        ("zero", "0.0001", "0.0", "learning_rate: got 0.0; expected greater than 0"),
        ("zero for a count", "rollouts: 4", "rollouts: 0", "rollouts: got 0"),
        ("NaN", "0.0001", ".nan", "learning_rate: got nan; expected a finite number"),
        ("infinity", "0.0001", ".inf", "learning_rate: got inf; expected a finite number"),
        ("overflow", "0.0001", "1.0e999", "learning_rate: got inf; expected a finite number"),
        ("one sample a prompt", "num_generations: 4", "num_generations: 1", "num_generations: got 1"),
        ("seed that no generator takes", "seed: 0", "seed: 99999999999999999999999", "seed"),
        ("octal", "rollouts: 4", "rollouts: 010", "rollouts: got '010'; expected an integer"),
        ("hexadecimal", "rollouts: 4", "rollouts: 0x10", "rollouts: got '0x10'"),
        ("underscores", "rollouts: 4", "rollouts: 1_000", "rollouts: got '1_000'"),
        ("yes for a number", "seed: 0", "seed: yes", "seed: got 'yes'"),
        ("no for a number", "delta: 0.2", "delta: no", "objective: delta is 'no'; expected a finite number > 0"),
        ("alias", "seed: 0", "seed: &zero 0\nprecision: *zero", "line 16: aliases are not supported"),
        ("merge key", "seed: 0", "<<: {seed: 0}", "unknown field '<<'"),
        ("python tag", "model: arithmetic", "model: !!python/name:os.system", "line 1: could not determine a constructor"),
        ("python call", "seed: 0", "seed: !!python/object/apply:os.getpid []", "line 15: could not determine a constructor"),
        ("tag that contradicts its value", "seed: 0", "seed: !!int abc", "abc"),
        ("bool tag on another word", "seed: 0", "seed: !!bool abc", "abc"),
        ("second document", "seed: 0", "seed: 0\n---\nseed: 1", "line 16: but found another document"),
        ("tab", "  delta", "\tdelta", "line 8"),
        ("unclosed list", "model: arithmetic", "model: [arithmetic", "line 2"),
        ("missing field", "learning_rate: 0.0001\n", "", "learning_rate: is missing"),
        ("missing nested field", "train: arithmetic\n", "prompt: question\n", "task.train: is missing"),
        ("objective without a name", "name: drpo\n", "", "objective.name: is missing"),
        ("unknown anchor", "seed: 0", "anchor: oldd", "anchor: got 'oldd'; expected 'sampler' or 'old'"),
        ("unknown correction", "seed: 0", "correction: token_mas", "correction 'token_mas'; did you mean 'token_mask'"),
        ("correction of the sampler", "seed: 0", "correction: token_mask", "correction: TokenMask weighs by π_old/μ"),
        (
            "likeliest tokens of the old policy",
            "objective:\n  name: drpo\n",
            "anchor: old\nobjective:\n  name: drpo_topk\n",
            "anchor: got 'old' with DRPOTopK",
        ),
        ("unknown objective", "name: drpo", "name: drop", "objective: unknown objective 'drop'; did you mean 'dro' or 'drpo'?"),
        ("hyperparameter of another objective", "delta: 0.2", "clip_low: 0.2", "objective: unknown hyperparameter of drpo 'clip_low'"),
        ("misspelt hyperparameter", "delta: 0.2", "detla: 0.2", "'detla'; did you mean 'delta'?"),
        ("hyperparameter of 0", "delta: 0.2", "delta: 0", "objective: delta is 0; expected a finite number > 0"),
        ("hyperparameter of NaN", "delta: 0.2", "delta: .nan", "objective: delta is nan"),
        ("hyperparameter as text", "delta: 0.2", "delta: '1e-1'", "objective: delta is '1e-1'"),
        ("bool hyperparameter", "delta: 0.2", "delta: true", "objective: delta is True"),
        # 2 prompts x 4 generations = 8 samples
        ("updates that do not divide", "updates_per_rollout: 2", "updates_per_rollout: 3", "updates_per_rollout: prompts_per_rollout 2 x num_generations 4 = 8 samples, updates_per_rollout 3: expected a divisor of 8"),
        # 8 samples / 2 updates = 4 an update
        ("micro batch that does not divide", "seed: 0", "micro_batch_size: 3", "micro_batch_size: prompts_per_rollout 2 x num_generations 4 = 8 samples, updates_per_rollout 2 = 4 samples an update: expected a divisor of 4, got 3"),
        ("horizon without its aggregation", "seed: 0", "horizon: 20", "horizon: expected with aggregation seq-mean-token-sum-norm"),
        ("horizon of another aggregation", "seed: 0", "aggregation: token-mean\nhorizon: 20", "horizon: expected with aggregation seq-mean-token-sum-norm"),
        ("aggregation without its horizon", "seed: 0", "aggregation: seq-mean-token-sum-norm", "horizon: expected with aggregation seq-mean-token-sum-norm"),
        ("unknown choice", "seed: 0", "aggregation: mean", "aggregation: got 'mean'; expected 'token-mean'"),
        ("template without its place", "train: arithmetic", "train: x.jsonl\n  template: question", "task.template: expected text with {prompt} in it"),
        ("recipe field among the trainer's", "seed: 0", "trainer: {seed: 1}", "trainer: has 'seed', which belongs at the top"),
        ("field by another name", "seed: 0", "trainer: {per_device_train_batch_size: 4}", "trainer: has 'per_device_train_batch_size'; expected micro_batch_size at the top of the recipe"),
        ("option of the run folder", "seed: 0", "trainer: {output_dir: runs}", "trainer: has 'output_dir'; it follows from the recipe and its run folder; leave it out"),
        ("adapters of a copy", "seed: 0", "lora: {}\nrollout_lag: 2\nrollout_precision: bf16", "lora: rollout_precision and rollout_lag would sample from a copy of the policy, which does not work with adapters"),
        ("shards of a copy", "seed: 0", "trainer: {fsdp: full_shard}\nrollout_lag: 2", "trainer.fsdp: rollout_lag would sample"),
        ("list for the trainer's", "seed: 0", "trainer: [bf16]", "trainer: got ['bf16']; expected a mapping"),
        ("long value", "seed: 0", f"seed: {'x' * 5000}", "seed: got 'xxx"),
        ("value with line breaks", "seed: 0", r'seed: "a\nb\u2028c"', r"seed: got 'a\nb\u2028c'"),
        ("field with line breaks", "seed: 0", r'"a\nb": 0', r"unknown field 'a\nb'"),
    )
]  # fmt: skip

NOT_RECIPES = [
    pytest.param(content, expected, id=name)
    for name, content, expected in (
        ("empty", b"", "is empty; expected a mapping of fields"),
        ("only a comment", b"# model: x\n", "is empty; expected a mapping of fields"),
        ("list", b"- model: arithmetic\n", "is list; expected a mapping of fields"),
        ("text", b"arithmetic\n", "is str; expected a mapping of fields"),
        ("binary", bytes(range(256)), "cannot be read ("),
        ("another encoding", RECIPE.encode("utf-16"), "cannot be read ("),
        ("NUL", b"model: a\0b\n", "special characters are not allowed"),
        ("surrogate bytes", b"model: \xed\xa0\x80\n", "cannot be read ("),
        ("brackets", b"[" * 20_000, "is nested too deeply"),
        ("braces", b"{a: " * 20_000, "is nested too deeply"),
        (
            "alias bomb",
            b"a: &a [x,x,x,x,x,x,x,x,x]\n"
            + b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9)) for n in b"bcdefghi"),
            "line 2: aliases are not supported",
        ),
    )
]  # fmt: skip


def refusal(path: Path | None, overrides: list[str] | None = None) -> str:
    """The message of the UserError that reading a recipe ends in."""
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides or [])
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(("text", "expected"), MALFORMED)
def test_a_malformed_recipe_is_refused_in_one_line_that_names_the_field(recipe_file, text, expected):
    recipe_file.write_text(text)
    message = refusal(recipe_file)
    assert message.startswith(str(recipe_file))
    assert expected in message
    assert len(message) < 1000


@pytest.mark.parametrize(("content", "expected"), NOT_RECIPES)
def test_a_file_that_is_no_mapping_is_refused_in_one_line(recipe_file, content, expected):
    recipe_file.write_bytes(content)
    message = refusal(recipe_file)
    assert message.startswith(str(recipe_file))
    assert expected in message


@pytest.mark.parametrize("name", ["missing.yaml", "folder", "n" * 300, "nul\0"])
def test_a_path_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    assert refusal(path).startswith(str(path))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("max_grad_nrom: 1.0", "trainer: unknown option 'max_grad_nrom'; did you mean 'max_grad_norm'?"),
        ("lr_scheduler_type: cosinus", "trainer.lr_scheduler_type: cosinus is not a valid SchedulerType"),
        ("max_grad_norm: much", "max_grad_norm"),
    ],
)
def test_a_malformed_trainer_option_is_refused_before_anything_is_written(recipe_file, tmp_path, option, expected):
    from drpo.run.folder import RunFolder
    from drpo.run.train import train

    recipe_file.write_text(f"{RECIPE}trainer: {{{option}}}\n")
    recipe = load_recipe(recipe_file, ["task.heldout=null", "rollouts=1"])
    with pytest.raises(UserError) as error:
        train(recipe, RunFolder(tmp_path / "run"), resume=False)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_in_the_repository_loads_and_survives_a_round_trip(tmp_path, path):
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


EVERY_FIELD = """\
model: ./model
task: {train: a.jsonl, heldout: b.jsonl, prompt: question, answer: solution, template: "Q: {prompt}"}
reward: gsm8k
objective: {name: ppo, clip_low: 0.1, clip_high: 0.3}
rollouts: 3
prompts_per_rollout: 6
num_generations: 4
updates_per_rollout: 3
learning_rate: 0.0002
max_completion_length: 30
micro_batch_size: 2
temperature: 0.7
aggregation: seq-mean-token-sum-norm
horizon: 30
advantage: mean-std
anchor: old
correction: {name: token_mask, high: 3.0}
audit_threshold: 0.01
train_precision: bf16
rollout_precision: int8
rollout_lag: 3
reward_timeout: 60.0
lora: {r: 4, alpha: 8, target_modules: [q_proj, v_proj]}
evaluate_every: 2
checkpoint_every: 5
stop_on_collapse: 4
record_rollouts: true
heldout_problems: 40
heldout_samples: 2
seed: 11
trainer: {max_grad_norm: 0.5, warmup_steps: 10, run_name: null, group_by_length: true}
"""


# Adapters and samples by a copy of the policy do not go together.
@pytest.mark.parametrize("without", [["lora"], ["rollout_precision", "rollout_lag"]], ids=" ".join)
def test_every_field_survives_a_round_trip(recipe_file, without):
    lines = EVERY_FIELD.splitlines(keepends=True)
    recipe_file.write_text("".join(line for line in lines if line.partition(":")[0] not in without))
    recipe = load_recipe(recipe_file)
    given, default = recipe.model_dump(), load_recipe().model_dump()
    assert {name for name in given if given[name] == default[name]} == set(without)
    recipe_file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(recipe_file) == recipe


def test_without_a_path_the_built_in_recipe_is_read():
    assert load_recipe() == load_recipe(BUILTIN_RECIPE)


TEXTS = ["1e-5", "1.0e5", "1.", "010", "0x10", "1_000", "yes", "NO", "null", "~", ".inf", "2024-01-01", "<<", "=", "- a", "a: b", "# a", "!a", "&a", "*a", "{prompt}", "'\"", "a\nb", " a ", "\ta", "\x85", "a\u2028b", "\0", "ü", "😀"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip(tmp_path, text):
    recipe = load_recipe().model_copy(update={"model": text, "trainer": {"run_name": text}})
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("number", [1e-300, 1e-6, 5e-5, 0.1, 1.0, 3.0e10, 1e22, 1.7976931348623157e308])
def test_a_number_survives_a_round_trip(tmp_path, number):
    recipe = load_recipe().model_copy(update={"audit_threshold": number})
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml").audit_threshold == number


@pytest.mark.parametrize(
    ("assignment", "field", "expected"),
    [
        ("seed=7", "seed", 7),
        ("learning_rate=1e-5", "learning_rate", 1e-5),
        ("learning_rate=2E-4", "learning_rate", 2e-4),
        ("learning_rate=1.5e-5", "learning_rate", 1.5e-5),
        ("learning_rate=1", "learning_rate", 1.0),
        ("model=a=b", "model", "a=b"),
        ("model='1e-5'", "model", "1e-5"),
        ("aggregation=seq-mean-token-sum", "aggregation", "seq-mean-token-sum"),
        ("aggregation=null", "aggregation", None),
        ("trainer={max_grad_norm: 0.5}", "trainer", {"max_grad_norm": 0.5}),
        ("trainer.max_grad_norm=0.5", "trainer", {"max_grad_norm": 0.5}),
    ],
)
def test_an_override_wins_over_the_file(recipe_file, assignment, field, expected):
    assert getattr(load_recipe(recipe_file, [assignment]), field) == expected


def test_the_last_override_of_a_field_counts(recipe_file):
    assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


def test_a_dotted_override_leaves_the_other_fields_of_its_mapping(recipe_file):
    task = load_recipe(recipe_file, ["task.train=rows.jsonl"]).task
    assert (task.train, task.heldout) == (str(Path("rows.jsonl").absolute()), "arithmetic")


@pytest.mark.parametrize(
    ("overrides", "name", "hyperparameters"),
    [
        (["objective.delta=0.3"], "drpo", {"delta": 0.3}),
        (["objective=ppo"], "ppo", {}),
        (["objective=ppo", "objective.clip_low=0.1"], "ppo", {"clip_low": 0.1}),
        (["objective={name: spo, epsilon: 3}"], "spo", {"epsilon": 3}),
    ],
)
def test_an_objective_name_replaces_the_mapping_and_a_dotted_key_adds_to_it(
    recipe_file, overrides, name, hyperparameters
):
    objective = load_recipe(recipe_file, overrides).objective
    assert (objective.name, objective.hyperparameters) == (name, hyperparameters)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed", "--set seed: expected key=value"),
        ("=1", "--set =1: expected key=value"),
        ("sed=1", "unknown field 'sed'"),
        ("task.trian=x", "'task.trian'; did you mean 'task.train'?"),
        ("task.train.file=x", "train has no fields of its own"),
        ("objective.delta=-1", "objective: delta is -1"),
        ("objective.name=drop", "did you mean 'dro' or 'drpo'?"),
        ("seed=[1", "--set seed=[1, line 1"),
        ("seed=*a", "aliases are not supported"),
        ("seed=!!python/name:os.system", "could not determine a constructor"),
        ("seed={a: 1, a: 2}", "duplicate key 'a'"),
        ("seed=1e999", "seed: got inf"),
        ("rollouts=010", "rollouts: got '010'"),
        ("model=", "model: got None"),
        ("seed\n", "expected key=value"),
        ("seed=[\n", "--set seed=["),
    ],
)
def test_a_malformed_override_is_refused_in_one_line(recipe_file, assignment, expected):
    assert expected in refusal(recipe_file, [assignment])


def test_rewards_are_made_with_their_options_and_weights(tmp_path):
    given = "reward: [{name: math, strict: true}, {name: overlong, weight: 0.5, limit: 20, buffer: 4}]"
    (tmp_path / "recipe.yaml").write_text(changed("reward: exact_answer", given))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert [(type(reward).__name__, weight) for reward, weight in recipe.make_reward().parts] == [
        ("MathGrader", 1.0),
        ("Overlong", 0.5),
    ]
    assert recipe.make_reward().correctness.strict
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert load_recipe(None, ["reward.strict=true", "reward.name=math"]).make_reward().strict


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_that_comes_with_the_library_is_one_that_can_be_run(path, tmp_path, monkeypatch):
    from drpo.run.build import make_config

    # No accelerator here, no weights: as far as it goes without.
    recipe = load_recipe(path, ["train_precision=fp32"])
    config = make_config(recipe, str(tmp_path), processes=1)
    assert config.generation_batch_size == recipe.prompts_per_rollout * recipe.num_generations
    assert recipe.make_reward() is not None
    stated = path.read_text(encoding="utf-8")
    for command in re.findall(r"drpo data (\S+)", stated):
        assert command == "filter" or command in SOURCES


def test_the_paper_s_setting_is_the_paper_s():
    recipe = load_recipe(FOLDER / "qwen3-4b-base-dapo-math.yaml")
    assert (recipe.prompts_per_rollout, recipe.num_generations, recipe.updates_per_rollout) == (64, 8, 4)
    assert (recipe.learning_rate, recipe.max_completion_length, recipe.horizon) == (1e-6, 8192, 8192)
    assert (recipe.aggregation, recipe.objective.make().delta) == ("seq-mean-token-sum-norm", 12.5)
    assert (recipe.evaluate_every, recipe.heldout_samples, recipe.heldout_problems) == (10, 16, 60)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("max_grad_norm", "0.5", 0.5),
        ("fsdp", True, True),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
        ("lr_scheduler_kwargs", {"num_cycles": 2}, {"num_cycles": 2}),
        ("deepspeed", "zero2.json", "zero2.json"),
    ],
)
def test_an_option_of_the_trainer_has_the_type_that_it_has_there(option, value, expected):
    from drpo.run.options import check_option

    assert check_option(option, value) == expected


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("max_grad_norm", "much", "trainer.max_grad_norm: got 'much'; expected a number"),
        ("logging_first_step", 3, "trainer.logging_first_step: got 3; expected true or false"),
        ("lr_scheduler_kwargs", "cosine", "trainer.lr_scheduler_kwargs: got 'cosine'; expected a mapping or"),
        ("lr_scheduler_kwargs", "[1]", "trainer.lr_scheduler_kwargs: got '[1]'; expected a mapping"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_type(option, value, expected):
    from drpo.run.options import check_option

    with pytest.raises(UserError) as error:
        check_option(option, value)
    assert str(error.value).startswith(expected)
