"""drpo doctor: what it finds in recipes, model folders and data with one thing wrong, and in those with nothing; what it prints where."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from drpo.cli.main import main
from drpo.doctor import Finding, environment
from drpo.doctor.examine import examine_recipe
from drpo.doctor.findings import show
from drpo.doctor.rollout import check_update_numbers
from drpo.recipes import FOLDER
from drpo.rollout.recorder import LogProbRecorder

RECIPES = FOLDER

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Plant = Callable[[Path, pytest.MonkeyPatch], object]


def edit(file: str, **values: Any) -> Plant:
    """Change fields of a JSON file of the model; None takes one away."""

    def plant(here: Path, _: pytest.MonkeyPatch) -> None:
        path = here / "model" / file
        content = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return plant


def no_eos(here: Path, patch: pytest.MonkeyPatch) -> None:
    for file in ("config.json", "generation_config.json"):
        edit(file, eos_token_id=None)(here, patch)
    edit("tokenizer_config.json", eos_token=None)(here, patch)


def template(text: str, **others: Any) -> Plant:
    def plant(here: Path, patch: pytest.MonkeyPatch) -> None:
        (here / "model" / "chat_template.jinja").write_text(text)
        edit("tokenizer_config.json", **others)(here, patch)

    return plant


def rows(*problems: tuple[str, str]) -> Plant:
    def plant(here: Path, _: pytest.MonkeyPatch) -> None:
        text = "".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in problems)
        (here / "train.jsonl").write_text(text)

    return plant


def reward(name: str, score: str) -> Plant:
    """A module with a reward: an expression in the completion ``c`` and the answer ``a``."""

    def plant(here: Path, patch: pytest.MonkeyPatch) -> None:
        line = f"return [{score} for c, a in zip(completions, answer)]"
        (here / f"{name}.py").write_text(f"def score(completions, answer, **_):\n    {line}\n")
        patch.syspath_prepend(here)

    return plant


def record(change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    """Another sampler, whose log-probs are a function of the right ones."""

    def plant(_: Path, patch: pytest.MonkeyPatch) -> None:
        right = LogProbRecorder.log_probs
        patch.setattr(
            LogProbRecorder,
            "log_probs",
            lambda self, lengths: [change(torch.tensor(row)).tolist() for row in right(self, lengths) or []],
        )

    return plant


def install(**versions: str) -> Plant:
    """Other versions of packages."""
    return lambda _, patch: patch.setattr(environment, "version", lambda name: versions.get(name) or version(name))


def fault(name: str, plant: Plant | None, *overrides: str, what: str, fix: str = "", verdict: str = "stop") -> Any:
    return pytest.param(plant, overrides, Finding(verdict, what, fix), id=name)  # type: ignore[arg-type]


SIXTEEN = rows(*[(f"{n}+1=", str(n + 1)) for n in range(16)])
SAME = rows(*[(f"{n}-{n}=", "0") for n in range(16)])
WORDS = rows(*[(f"{n}+1=", "two" if n % 2 else str(n + 1)) for n in range(16)])


def both(first: Plant, second: Plant) -> Plant:
    def plant(here: Path, patch: pytest.MonkeyPatch) -> None:
        first(here, patch)
        second(here, patch)

    return plant


WITHOUT_WEIGHTS = [
    fault("another TRL", install(trl="1.15.0"), what="packages: trl is 1.15.0; expected ==1.16.0", fix="pip install 'trl==1.16.0'"),
    fault("another peft", install(peft="0.1"), verdict="warning", what="packages: peft is 0.1", fix="pip install 'peft"),
    fault("option of no effect", None, "trainer.beta=0.04", what="does not take beta=0.04"),
    fault("misspelt field", None, "learning_rat=0.1", what="unknown field 'learning_rat'; did you mean 'learning_rate'"),
    fault("option that has a field", None, "trainer.fp16=true", what="trainer: has 'fp16'; expected train_precision: fp16 at the top of the recipe"),
    fault("shards of a copy", None, "trainer.fsdp=full_shard", "rollout_lag=2", what="trainer.fsdp: rollout_lag would sample"),
    fault("wide delta", None, "objective.delta=12.5", verdict="warning", what="confines the gradient weight to [0.92, 1.08]", fix="objective.delta: 0.2"),
    fault("one update", None, "updates_per_rollout=1", verdict="warning", what="a trust region has nothing to bound", fix="updates_per_rollout: 4"),
    fault("divided advantages", None, "advantage=mean-std", verdict="warning", what="advantage: mean-std", fix="advantage: mean"),
    fault("uncorrected anchor", None, "objective=ppo", "rollout_precision=bf16", verdict="warning", what="but rollouts are in bf16", fix="correction: token_truncate"),
    fault("old samples", None, "objective=ppo", "rollout_lag=2", verdict="warning", what="samples are 2 rollouts old: nothing makes up", fix="anchor: sampler"),
    fault("deaf audit", None, "audit_threshold=5", verdict="warning", what="audit_threshold 5 nats", fix="at most 0.1"),
    fault("missing model", None, "model=./nowhere", what="model: cannot load './nowhere'"),
    fault("no end", no_eos, what="tokenizer: neither it nor the model has an end-of-sequence token, so every completion runs to its limit; expected eos_token in"),
    fault("few positions", edit("config.json", max_position_embeddings=30), what="are more than the model's 30 positions; expected prompts of at most 10 tokens"),
    fault("template differs", template(CHAT, chat_template="{{ messages[0].content }}"), what="chat_template.jinja and tokenizer_config.json", fix="chat_template.jinja alone"),
    fault("template fails", template("{{ raise_exception('no') }}"), what="chat template: fails on a prompt: no"),
    fault("template without prompt", template("<|user|>"), what="chat template: leaves the prompt out", fix="chat_template of"),
    fault("template without a turn", template("{{ messages[0].content }}"), verdict="warning", what="has no generation prompt", fix="add_generation_prompt"),
    fault("template that ends turns otherwise", template(CHAT.replace("{{ eos_token }}", "<pad>")), verdict="warning",
          what="ends a turn with '<pad>', which ends no completion", fix="eos_token_id: [0, 1] in"),
    fault("template that ends nothing", template(CHAT.replace("{{ eos_token }}", "")), verdict="warning", what="without '<eos>'", fix="{{ eos_token }} after"),
    fault("unread option", template(CHAT), "trainer.chat_template_kwargs={enable_thinking: false}", verdict="warning",
          what="chat template: does not read enable_thinking", fix="no trainer.chat_template_kwargs.enable_thinking"),
    fault("two templates", template(CHAT), "task.template=<eos>{prompt}", what="prompt: has '<eos>' in its text", fix="task.template"),
    fault("two beginnings", edit("tokenizer_config.json", bos_token="<unk>"), "task.template=<unk><unk>{prompt}", what="begins with '<unk>' twice", fix="without <unk>"),
    fault("missing file", None, "task.train=nowhere.jsonl", what="nowhere.jsonl: no such file"),
    fault("few rows", rows(("1+1=", "2")), what="has 1 rows", fix="prompts_per_rollout: 1"),
    fault("duplicates", rows(*[("1+1=", "2")] * 16), verdict="warning", what="16 rows hold 1 distinct prompts", fix="drpo data"),
    fault("not held out", None, "task.heldout=train.jsonl", verdict="warning", what="32 of 32 prompts are in task.train too", fix="drpo data NAME --against"),
    fault("unknown characters", rows(*[(f"é{n}=", str(n)) for n in range(16)]), verdict="warning", what="16 of 16 have characters", fix="without what becomes <unk>"),
    fault("answers in words", WORDS, "reward=gsm8k", verdict="warning", what="gsm8k does not recognize 8 of 16 reference answers as right, the first 'two'", fix="task.answer"),
    *(fault(f"reward for {name} of {of}", both(reward(f"likes_{name}", f"float({test})"), answers), f"reward=likes_{name}:score",
            what="grader: score gives 1 to", fix="a reward that reads them")
      for name, test in (("anything", "True"), ("digits", "any(map(str.isdigit, c))"), ("boxes", "'boxed' in c"))
      for of, answers in (("numbers", SIXTEEN), ("words too", WORDS), ("one number", SAME))),
    fault("reward for a digit", both(reward("likes_ones", "float('1' in c)"), SIXTEEN), "reward=likes_ones:score", what="grader: score gives 1 to", fix="a reward that reads them"),
    *(fault(f"reward of {value}", reward(f"of_{n}", f"float('{value}')"), f"reward=of_{n}:score", what=f"reward score: returned {value} for completion 0, ") for n, value in enumerate(("nan", "inf"))),
    fault("reward that exits", reward("exits", "exit(3)"), "reward=exits:score", what="SystemExit: 3"),
    fault("half a point", reward("half", "0.5 * (c == a)"), "reward=half:score", verdict="warning", what="grader: score gives 0.5 at most", fix="1 for a right answer"),
    *(fault(f"right answers that weigh {weight}", None, f"reward=[{{name: exact_answer, weight: {weight}}}, {{name: format, weight: 0.5}}]",
            what="reward: the sum gives", fix="a weight > 0 for the one") for weight in (0.0, -1.0)),
]  # fmt: skip

IN_ROLLOUTS = [
    fault("module that is missing", None, "lora={target_modules: [q_proj, nonexistent]}", verdict="warning", what="the model has no module 'nonexistent'", fix="without 'nonexistent'"),
    fault("damaged weights", lambda here, _: (here / "model" / "model.safetensors").write_bytes(b"0"), what="model: cannot load"),
    fault("misspelt optimizer schedule", None, "trainer.lr_scheduler_type=cosine_with_min_lr", what="min_lr_rate should be set through the `lr_scheduler_kwargs`"),
    fault("dropout", edit("config.json", attention_dropout=0.2), what="μ against π: mean |log π − log μ|", fix="1. dropout: attention_dropout is above 0"),
    *(fault(f"{name} of generation_config.json", edit("generation_config.json", **{name: value}), what="μ against π", fix=f"{name}={value} changes what is sampled from")
      for name, value in (("min_p", 0.1), ("no_repeat_ngram_size", 3))),
    fault("wrong sampler", record(lambda row: row - 0.5), what="threshold 0.001", fix="chat template or tokeniser"),
    fault("log-probs that are none", record(lambda row: row * float("nan")), what="the sampler's log-prob of token 0 of completion 0 is nan"),
    fault("bf16 log-probs", record(lambda row: row.bfloat16()), "audit_threshold=0.1", what="log-probs: the sampler's are in bf16", fix="in fp32"),
    fault("learning rate", None, "learning_rate=1.0e+30", "seed=1", what="update: ", fix="a smaller learning_rate"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("plant", "overrides", "expected", "rollout"),
    [pytest.param(*p.values, n, id=p.id) for n, table in enumerate((WITHOUT_WEIGHTS, IN_ROLLOUTS)) for p in table],
)
def test_a_planted_fault_is_found_with_its_fix(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    plant: Plant | None,
    overrides: tuple[str, ...],
    expected: Finding,
    rollout: int,
) -> None:
    if plant is not None:
        plant(here, monkeypatch)
    own = ["model=model", "task.train=train.jsonl", "task.heldout=heldout.jsonl", "rollouts=2"]
    findings = examine_recipe(None, [*own, *overrides], rollout=bool(rollout))
    shown = "\n".join(f"{f.verdict} {f.what} | {f.fix}" for f in findings)
    matching = [f for f in findings if expected.what in f.what and f.verdict == expected.verdict]
    assert matching, shown
    assert any((expected.fix or "") in (f.fix or "") for f in matching), shown


@pytest.mark.parametrize(
    ("plant", "overrides"),
    [
        pytest.param(None, ["rollout_lag=2", "rollout_precision=bf16"], id="copy"),
        pytest.param(None, ["trainer.top_p=0.9", "trainer.replay_support=true"], id="filter"),
        pytest.param(None, ["temperature=0.7", "objective=ppo"], id="temperature"),
        pytest.param(None, ["lora={}", "trainer.torch_compile=true"], id="adapters"),
        pytest.param(None, ["reward=[{name: math}, {name: format, weight: 0.1}]"], id="sum of rewards"),
        pytest.param(template(CHAT), [], id="chat template"),
        pytest.param(template(CHAT + "\n", chat_template=CHAT), [], id="a line break at the end of one of two"),
        pytest.param(template(CHAT, chat_template=[{"name": "default", "template": CHAT}]), [], id="a list of one"),
        pytest.param(rows(("1+1=", "2")), ["prompts_per_rollout=1", "rollouts=1"], id="one problem"),
    ],
)
def test_of_healthy_recipes_models_and_data_all_is_well(
    here: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant | None, overrides: list[str]
) -> None:
    if plant is not None:
        plant(here, monkeypatch)
    findings = examine_recipe(None, ["model=model", "task.train=train.jsonl", "rollouts=2", *overrides])
    assert [f for f in findings if f.verdict != "ok"] == []
    assert any(f.what.startswith("μ against π") for f in findings)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_of_a_shipped_recipe_only_data_model_and_engine_are_wanting(
    here: Path, monkeypatch: pytest.MonkeyPatch, recipe: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    findings = examine_recipe(recipe, rollout=False)
    stops = {f.what.split(":")[0] for f in findings if f.verdict == "stop"}
    assert stops <= {"task.train", "task.heldout", "model", "trainer.use_vllm"}
    # The paper's setting has the paper's δ.
    told = "delta = 12.5" if recipe.stem == "qwen3-4b-base-dapo-math" else None
    assert [f.what for f in findings if f.verdict == "warning" and not (told and told in f.what)] == []


@pytest.fixture
def doctor(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Run the command: exit code, standard output, standard error."""
    stdout = os.dup(1)

    def run(*arguments: str) -> tuple[int, str, str]:
        before = sorted(here.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["drpo", "doctor", *arguments])
        # pytest's own does not go by way of file descriptor 1.
        monkeypatch.setattr(sys, "stdout", os.fdopen(1, "w", closefd=False))
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        sys.stdout.flush()
        os.dup2(stdout, 1)
        assert sorted(here.rglob("*")) == before
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    yield run
    os.close(stdout)


@pytest.mark.parametrize(
    ("overrides", "code", "verdicts"),
    [([], 0, {"ok"}), (["objective.delta=12.5"], 0, {"ok", "warning"}), (["audit_threshold=1.0e-12"], 1, {"ok", "stop"})],
    ids=["healthy", "warning", "stop"],
)  # fmt: skip
def test_json_is_all_there_is_on_standard_output_and_a_stop_is_exit_code_1(
    doctor: Any, overrides: list[str], code: int, verdicts: set[str]
) -> None:
    ended, out, _ = doctor("--json", *(part for override in overrides for part in ("--set", override)))
    findings = json.loads(out)
    assert (ended, {finding["verdict"] for finding in findings}) == (code, verdicts)
    for finding in findings:
        assert finding.keys() == {"verdict", "what", "fix"}
        assert finding["what"] and "\n" not in finding["what"]  # noqa: PT018


LOUD = """
import atexit, ctypes, os, subprocess, sys

atexit.register(print, "at exit")


def score(completions, answer, **_):
    print("print")
    os.write(1, b"os.write\\n")
    ctypes.CDLL(None).puts(b"puts")
    subprocess.run(["echo", "a subprocess"])
    return [float(c == a) for c, a in zip(completions, answer)]
"""


def test_what_rewards_their_libraries_and_subprocesses_print_is_on_standard_error(here: Path) -> None:
    (here / "loud.py").write_text(LOUD)
    command = [sys.executable, "-m", "drpo", "doctor", "--json", "--set", "reward=loud:score"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert {row["verdict"] for row in json.loads(ended.stdout)} == {"ok"}
    for printed in ("print", "os.write", "puts", "a subprocess", "at exit"):
        assert f"{printed}\n" in ended.stderr


def test_people_see_a_line_a_finding_and_its_fix_below(doctor: Any) -> None:
    code, out, _ = doctor("--no-rollout", "--set", "updates_per_rollout=1")
    assert code == 0
    assert "ok      hardware: " in out
    assert "warning updates: " in out
    assert "        fix: updates_per_rollout: 4\n" in out
    assert "μ against π" not in out


@pytest.mark.parametrize("text", ["a: [", "", "- 1", "model: arithmetic", "\udcff"])
def test_a_broken_recipe_is_a_stop_after_what_could_be_checked(doctor: Any, here: Path, text: str) -> None:
    (here / "broken.yaml").write_text(text, errors="surrogateescape")
    code, out, _ = doctor("broken.yaml", "--json")
    first, *_, last = json.loads(out)
    assert (code, last["verdict"]) == (1, "stop")
    assert last["what"].startswith("broken.yaml")
    assert "packages" in first["what"]


@pytest.mark.parametrize("name", ["nowhere.yaml", "model", "n" * 300])
def test_what_is_no_file_is_a_mistake_of_the_command_line(doctor: Any, name: str) -> None:
    code, out, err = doctor(name)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {name}: no such file; unknown recipe")
    assert err.count("\n") == 1


def test_a_recipe_and_a_configuration_of_verl_are_one_too_many(doctor: Any) -> None:
    assert doctor("a.yaml", "--verl", "b.yaml") == (2, "", "error: a.yaml and --verl b.yaml: expected one of them\n")


@pytest.mark.parametrize(("overrides", "code"), [([], 0), (["--set", "trainer.use_v1=false"], 1)])
def test_of_verl_too_json_is_all_there_is_and_a_stop_is_exit_code_1(
    doctor: Any, overrides: list[str], code: int
) -> None:
    config = str(RECIPES / "verl" / "qwen3-4b-base.yaml")
    ended, out, _ = doctor("--verl", config, "--no-workers", "--json", *overrides)
    assert ended == code
    assert ("stop" in {finding["verdict"] for finding in json.loads(out)}) == bool(code)


def test_updates_without_a_gradient_say_so() -> None:
    for norm in (0.0, 0.5):
        (finding,) = check_update_numbers([{"loss": 0.0, "grad_norm": norm}] * 2)
        assert finding.verdict == "ok"
        assert ("nothing to train on" in finding.what) == (norm == 0)


def test_on_a_terminal_findings_wrap_at_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "dumb")  # without colors, 80 columns wide
    findings = [Finding("ok", f"{'word ' * 14}and more words", "shorter ones")]
    for file, lines in (
        (
            Terminal(),
            [f"ok      {'word ' * 14}".rstrip(), "        and more words", "        fix: shorter ones"],
        ),
        (io.StringIO(), [f"ok      {findings[0].what}", "        fix: shorter ones"]),
    ):
        show(findings, file)
        assert [line.rstrip() for line in file.getvalue().splitlines()] == lines
