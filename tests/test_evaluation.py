"""Sampled evaluations: the statistics against direct computation, and runs that end the same whatever happens to them."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationMixin

from drpo.data.problems import Problem, tokenize_prompt
from drpo.errors import UserError
from drpo.evaluation.engines import TransformersEngine, VLLMEngine
from drpo.evaluation.evaluate import load, sample_and_score
from drpo.evaluation.folder import EvaluationFolder
from drpo.evaluation.settings import Settings
from drpo.evaluation.statistics import estimate, majority, paired, pass_at_k
from drpo.evaluation.summary import compare, summarise
from drpo.rollout.sampling import NEUTRAL
from support.rollouts import load_model
from test_cli import drpo, here, make_run, refusal  # noqa: F401


class TestStatistics:
    @pytest.mark.parametrize("samples", [1, 2, 5, 8])
    def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(self, samples):
        for correct in range(samples + 1):
            right = [n < correct for n in range(samples)]
            for k in range(1, samples + 1):
                subsets = list(combinations(right, k))
                assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)

    def test_pass_at_k_of_many_samples_is_exact(self):
        # One right of 1,024: the chance that it is among k of them is k / 1024.
        assert pass_at_k(1024, 1, 256) == 0.25
        assert pass_at_k(1024, 1024, 1) == 1.0

    @pytest.mark.parametrize(
        ("answers", "correct", "expected"),
        [
            (["1", "1", "2"], [True, True, False], 1.0),
            (["2", "2", "1"], [False, False, True], 0.0),
            (["1", "2"], [True, False], 0.5),
            (["1", "2", "3", None, None, None], [True, False, False, False, False, False], 1 / 3),
            ([None, None], [False, False], 0.0),
            # Two spellings of one answer, of which the grader took one.
            (["1", "1", "2"], [True, False, False], 0.5),
        ],
    )
    def test_majority_is_the_answer_with_most_votes(self, answers, correct, expected):
        assert majority(answers, correct) == pytest.approx(expected)

    def test_an_interval_is_that_of_the_bootstrap_distribution(self):
        # The mean of n resampled bits is binomial: for 64 of 256 its 2.5 % and 97.5 % quantiles are 51 and 78 of 256.
        found = estimate([1.0] * 64 + [0.0] * 192)
        assert found["mean"] == 0.25
        cumulative = [0.0]
        for n in range(257):
            cumulative.append(cumulative[-1] + math.comb(256, n) * 0.25**n * 0.75 ** (256 - n))
        low, high = (next(n for n in range(257) if cumulative[n + 1] >= level) for level in (0.025, 0.975))
        assert found["low"] * 256 == pytest.approx(low, abs=1)
        assert found["high"] * 256 == pytest.approx(high, abs=1)

    def test_an_interval_holds_the_truth_as_often_as_it_says(self):
        generator = torch.Generator().manual_seed(0)
        held = 0
        for _ in range(100):
            rates = torch.rand(60, generator=generator, dtype=torch.float64)
            found = estimate(rates.tolist())
            held += found["low"] <= 0.5 <= found["high"]
        assert 88 <= held <= 100

    def test_a_paired_interval_sees_what_two_single_ones_do_not(self):
        first = [n / 50 for n in range(50)]
        second = [rate + 0.02 for rate in first]
        difference = paired(first, second)
        assert difference["low"] == pytest.approx(0.02) == difference["high"]
        assert estimate(first)["high"] > estimate(second)["low"]

    def test_the_summary_counts_what_the_samples_say(self):
        problems = [Problem("p", "1", "a"), Problem("q", "2", "b")]
        rows = [
            {"status": status, "stated": stated, "tokens": 4, "truncated": truncated}
            for status, stated, truncated in (
                ("correct", "1", False), ("wrong", "3", False), ("no_answer", None, True), ("correct", "1", False),
                ("wrong", "1", False), ("wrong", "1", True), ("timeout", "9", False), ("correct", "2", False),
            )
        ]  # fmt: skip
        found = summarise(4, problems, rows)
        assert found["average"]["mean"] == (2 / 4 + 1 / 4) / 2
        assert {source: one["mean"] for source, one in found["average_by_source"].items()} == {"a": 0.5, "b": 0.25}
        # 1 - C(2, 2) / C(4, 2) = 5/6 and 1 - C(3, 2) / C(4, 2) = 1/2
        assert found["pass_at"]["2"]["mean"] == pytest.approx((5 / 6 + 1 / 2) / 2)
        assert found["pass_at"]["4"]["mean"] == 1.0
        assert found["majority"]["mean"] == 0.5
        assert (found["truncated"], found["no_answer"]) == (2 / 8, 1 / 8)
        assert found["statuses"] == {"correct": 3, "wrong": 3, "no_answer": 1, "timeout": 1, "error": 0}

    def test_right_answers_vote_together_however_they_are_spelt(self):
        stated = [("correct", "84/2"), ("correct", None), ("correct", "42"), ("wrong", "41"), ("wrong", "41")]
        rows = [{"status": s, "stated": vote, "tokens": 1, "truncated": False} for s, vote in stated]
        assert summarise(5, [Problem("p", "42", "a")], rows)["majority"]["mean"] == 1.0


class TestSampling:
    def test_at_a_temperature_near_zero_is_the_likeliest_completion(self):
        model, tokenizer = load_model()
        inputs = tokenizer(["17+25-8+34-5=", "1+2="], return_tensors="pt", padding=True)
        greedy = model.generate(**inputs, do_sample=False, max_new_tokens=20)[:, inputs["input_ids"].shape[1] :]
        prompts = tokenizer(["17+25-8+34-5=", "1+2="])["input_ids"]
        cold = TransformersEngine(model.config.name_or_path, 20, 1e-4, "fp32").sample(prompts, [1, 2])
        assert [completion.text for completion in cold] == tokenizer.batch_decode(greedy, skip_special_tokens=True)

    def test_of_one_completion_does_not_depend_on_the_others(self):
        engine = TransformersEngine(load_model()[0].config.name_or_path, 20, 1.0, "fp32")
        prompts = engine.tokenizer(["17+25-8+34-5=", "1+2=", "10+34-6+29-38="])["input_ids"]
        together = engine.sample(prompts, [1, 2, 3])
        assert [engine.sample([prompt], [seed])[0] for prompt, seed in zip(prompts, (1, 2, 3), strict=True)] == together
        assert engine.sample(prompts[::-1], [3, 2, 1]) == together[::-1]
        assert engine.sample(prompts, [4, 5, 6]) != together

    def test_says_where_it_was_cut(self):
        engine = TransformersEngine(load_model()[0].config.name_or_path, 3, 1.0, "fp32")
        [completion] = engine.sample(engine.tokenizer(["17+25-8+34-5="])["input_ids"], [0])
        assert (len(completion.ids), completion.truncated) == (3, True)


BOS_IN_TEMPLATE = (
    "{{ bos_token }}{{ messages[0]['content'] }}{% if enable_thinking is defined and not enable_thinking %}+{% endif %}"
)


def save_model(path: Path, chat_template: str | None = None, **generation: Any) -> Path:
    """The built-in model with a BOS token that its tokenizer adds, a chat template and sampling settings of its own."""
    model, tokenizer = load_model()
    model.generation_config.update(**generation)
    model.save_pretrained(path)
    tokenizer.add_special_tokens({"bos_token": "~"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="~ $A", special_tokens=[("~", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def vllm(monkeypatch) -> list[dict[str, Any]]:
    """vLLM in name, with the built-in model's tokenizer; the requests that it got."""
    requests: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, model: str, dtype: str) -> None:
            self.tokenizer = AutoTokenizer.from_pretrained(model)

        def get_tokenizer(self) -> Any:
            return self.tokenizer

        def generate(self, prompts: list[Any], sampling: list[dict[str, Any]], use_tqdm: bool) -> list[Any]:
            requests.extend({"prompt": prompt} | params for prompt, params in zip(prompts, sampling, strict=True))
            completion = SimpleNamespace(text="3", token_ids=[1, 2], finish_reason="stop")
            return [SimpleNamespace(outputs=[completion]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    monkeypatch.setattr("drpo.evaluation.engines.find_spec", lambda _: True)
    monkeypatch.setattr(VLLMEngine, "description", {"name": "vllm"})
    return requests


@pytest.mark.parametrize("chat_template", [None, BOS_IN_TEMPLATE], ids=["text", "chat"])
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_prompt_has_one_bos_in_either_engine(tmp_path, vllm, monkeypatch, engine, chat_template):
    prompts = []
    generate = GenerationMixin.generate
    monkeypatch.setattr(
        GenerationMixin,
        "generate",
        lambda self, **how: prompts.extend(how["input_ids"].tolist()) or generate(self, **how),
    )
    model = save_model(tmp_path / "model", chat_template)
    run(tmp_path / "out", replace(ARITHMETIC, model=str(model), engine=engine, samples=1, problems=1))
    prompts += [request["prompt"]["prompt_token_ids"] for request in vllm]
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert prompts == [tokenizer(problem.prompt)["input_ids"] for problem in load(replace(ARITHMETIC, problems=1))]
    assert prompts[0].count(tokenizer.bos_token_id) == 1


def test_vllm_is_told_neutral_sampling_settings(tmp_path, vllm):
    run(tmp_path / "out", replace(ARITHMETIC, engine="vllm", samples=1, problems=1))
    sampling = {name: value for name, value in vllm[0].items() if name in NEUTRAL}
    assert sampling.keys() == {"top_p", "top_k", "min_p", "repetition_penalty"}
    assert all(value in NEUTRAL[name] for name, value in sampling.items())


@pytest.mark.parametrize(
    "setting",
    [{"repetition_penalty": 1.5}, {"suppress_tokens": [77]}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 18}],
    ids=str,
)
def test_sampling_settings_that_the_model_brings_along_change_no_completion(tmp_path, setting):
    completions = []
    for name, brought in (("plain", {}), ("changed", setting)):
        engine = TransformersEngine(str(save_model(tmp_path / name, **brought)), 20, 1.0, "fp32")
        completions.append(engine.sample(engine.tokenizer(["17+25-8+34-5="] * 4)["input_ids"], range(4)))
    assert completions[0] == completions[1]


@pytest.mark.parametrize(
    ("chosen", "trained", "expected"),
    [
        (None, None, {}),
        ('{"enable_thinking": false}', None, {"enable_thinking": False}),
        (None, "{enable_thinking: false}", {"enable_thinking": False}),
        (None, """'{"enable_thinking": false}'""", {"enable_thinking": False}),
        ('{"enable_thinking": true}', "{enable_thinking: false}", {"enable_thinking": True}),
        ("{}", "{enable_thinking: false}", {}),
    ],
)
def test_the_chat_template_is_told_what_it_was_in_training(here, drpo, chosen, trained, expected):  # noqa: F811
    folder = make_run(here / "run", *([f"trainer.chat_template_kwargs={trained}"] if trained else []))
    save_model(folder.model, BOS_IN_TEMPLATE)
    options = ["--chat-template-kwargs", chosen] if chosen else []
    settings = ["--problems", "1", "--max-tokens", "2", "--reward", "exact_answer"]
    code, _, err = drpo("eval", "run", "--data", "arithmetic", *settings, *options)
    assert (code, err) == (0, "")
    recorded = json.loads((folder.evaluated / "arithmetic" / "settings.json").read_text())
    assert recorded["chat_template_kwargs"] == expected


@pytest.mark.parametrize(
    ("chosen", "trained", "expected"),
    [
        (None, None, "{prompt}"),
        (None, "Q: {prompt}", "Q: {prompt}"),
        ("A: {prompt}", "Q: {prompt}", "A: {prompt}"),
    ],
)
def test_the_template_is_that_of_training(here, drpo, chosen, trained, expected):  # noqa: F811
    folder = make_run(here / "run", *([f"task.template='{trained}'"] if trained else []))
    save_model(folder.model)
    (here / "problems.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n')
    options = ["--template", chosen] if chosen else []
    code, _, err = drpo(
        "eval", "run", "--data", "problems.jsonl", "--max-tokens", "2", "--reward", "exact_answer", *options
    )
    assert (code, err) == (0, "")
    assert json.loads((folder.evaluated / "problems" / "settings.json").read_text())["template"] == expected
    result = json.loads((folder.evaluated / "problems" / "evaluation.json").read_text())
    assert result["problems_table"][0]["prompt"] == expected.replace("{prompt}", "1+2=")


@pytest.mark.parametrize("source", ["recipe.yaml", "run"])
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_base_model_is_asked_as_the_run_that_it_is_compared_with(here, drpo, vllm, engine, source):  # noqa: F811
    folder = make_run(here / "run", "task.chat_template=false", "task.stop=','")
    (here / "recipe.yaml").write_text(folder.recipe.read_text())
    save_model(here / "base", BOS_IN_TEMPLATE)
    settings = ["--data", "arithmetic", "--problems", "4", "--reward", "exact_answer", "--engine", engine]
    for name, more in (("plain", []), ("asked", ["--as", source])):
        assert drpo("eval", "base", *settings, "--out", name, *more)[0] == 0
    of_asked = json.loads((here / "asked" / "evaluation.json").read_text())
    assert [of_asked[name] for name in ("chat_template", "stop")] == [False, ","]
    if engine == "vllm":
        tokenizer = AutoTokenizer.from_pretrained(here / "base")
        comma = tokenizer.convert_tokens_to_ids(",")
        assert [request.get("stop_token_ids") for request in vllm] == [None] * 4 + [[comma]] * 4
        assert all(request["ignore_eos"] for request in vllm[4:])
    else:
        completions = [json.loads(line)["completion"] for line in (here / "asked" / "samples.jsonl").open()]
        assert all(completion.endswith(",") and completion.count(",") == 1 for completion in completions)
    assert drpo("compare", "plain", "asked")[2].splitlines() == [
        "the models were not asked the same: chat_template is True and False",
        "the models were not asked the same: stop is None and ','",
    ]


def test_what_the_chat_template_is_told_changes_the_prompt(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path, BOS_IN_TEMPLATE))
    assert tokenizer.decode(tokenize_prompt(Problem("1=", "1"), tokenizer)) == "~1="
    assert tokenizer.decode(tokenize_prompt(Problem("1=", "1"), tokenizer, enable_thinking=False)) == "~1=+"


ARITHMETIC = Settings(
    "arithmetic", ("arithmetic",), samples=4, problems=30, reward="exact_answer", max_tokens=20, batch_size=32
)


def run(path: Path, settings: Settings = ARITHMETIC, **how: bool) -> dict:
    sample_and_score(settings, EvaluationFolder(path), **how)
    return json.loads((path / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("evaluation") / "whole"
    return path, run(path)


class TestEvaluation:
    def test_has_the_averages_of_its_own_samples(self, whole):
        path, result = whole
        rows = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
        table = result["problems_table"]
        assert len(rows) == 120
        distinct = [len({row["completion"] for row in rows if row["problem"] == n}) for n in range(30)]
        assert sum(distinct) > 60
        right = [
            [row["completion"].rpartition(",")[2] == table[n]["answer"] for row in rows if row["problem"] == n]
            for n in range(30)
        ]
        assert result["average"]["mean"] == pytest.approx(sum(map(sum, right)) / 120)
        # With K of K samples taken there is one subset, so pass@K is whether any sample is right.
        assert result["pass_at"]["4"]["mean"] == pytest.approx(sum(map(any, right)) / 30)
        assert result["pass_at"]["1"] == result["average"]
        assert 0.1 < result["average"]["mean"] < 0.4
        assert result["engine_description"]["name"] == "transformers"
        assert result["versions"]["torch"]

    def test_is_the_same_when_interrupted_anywhere_and_resumed(self, whole, tmp_path, monkeypatch):
        path, _ = whole
        sample = TransformersEngine.sample
        for batches in (0, 1, 3):
            target, left = tmp_path / str(batches), [batches]

            def interrupted(self, prompts, seeds, left=left):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                return sample(self, prompts, seeds)

            monkeypatch.setattr(TransformersEngine, "sample", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(target)
            monkeypatch.setattr(TransformersEngine, "sample", sample)
            if batches:
                # Killed in the middle of writing a batch, and of a line.
                samples = target / "samples.jsonl"
                samples.write_text(samples.read_text()[:-50])
            run(target, resume=True)
            for name in ("evaluation.json", "samples.jsonl"):
                assert (target / name).read_bytes() == (path / name).read_bytes()

    def test_of_another_seed_differs_within_the_intervals(self, whole, tmp_path):
        _, result = whole
        other = run(tmp_path / "other", Settings(**{**vars(ARITHMETIC), "seed": 1}))
        assert other["problems_table"] != result["problems_table"]
        assert other["average"]["low"] < result["average"]["high"]
        assert result["average"]["low"] < other["average"]["high"]

    def test_of_a_better_sampler_is_found_better(self, whole, tmp_path):
        path, _ = whole
        run(tmp_path / "sharper", Settings(**{**vars(ARITHMETIC), "temperature": 0.2}))
        found = compare(path, tmp_path / "sharper")
        assert found["difference"]["low"] > 0
        assert compare(tmp_path / "sharper", path)["difference"]["high"] < 0
        assert compare(path, path)["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}

    def test_takes_a_file_and_the_grader(self, tmp_path):
        rows = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "4+5=", "answer": "9"}]
        (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = Settings("arithmetic", (str(tmp_path / "sums.jsonl"),), samples=2, max_tokens=20)
        result = run(tmp_path / "out", settings)
        assert sum(result["statuses"].values()) == 4
        assert list(result["average_by_source"]) == ["sums"]

    def test_tells_files_of_one_name_apart(self, tmp_path):
        files = [tmp_path / folder / "sums.jsonl" for folder in ("a", "b")]
        for file in files:
            file.parent.mkdir()
            file.write_text('{"prompt": "1+1=", "answer": "2"}\n')
        data = (*map(str, files), "arithmetic")
        assert [problem.source for problem in load(Settings("arithmetic", data, problems=1))] == list(data)

    def test_believes_a_reward_of_the_user_s_whatever_the_completions_look_like(self, tmp_path, rewards):
        result = run(tmp_path / "out", replace(ARITHMETIC, samples=2, problems=3, reward=f"{rewards}:right"))
        assert result["average"]["mean"] == 1.0
        assert result["statuses"]["correct"] == 6

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("raises", "ZeroDivisionError: division by zero"),
            ("exits", "SystemExit: 3"),
            ("short", "returned 1 scores; expected a list of 6"),
            ("nan", "returned nan for completion 0, "),
            ("words", "returned 'yes' for completion 0, "),
            ("number", "returned a float; expected a list of 6"),
        ],
    )
    def test_stops_at_a_reward_that_gives_no_scores(self, tmp_path, rewards, function, message):
        settings = replace(ARITHMETIC, samples=2, problems=3, reward=f"{rewards}:{function}")
        with pytest.raises(UserError, match=f"reward {function}: {message}"):
            run(tmp_path / "out", settings)

    def test_is_written_by_one_process(self, tmp_path):
        folder = EvaluationFolder(tmp_path / "out")
        with (
            folder.locked(),
            pytest.raises(UserError, match="another process is writing this evaluation"),
            EvaluationFolder(tmp_path / "out").locked(),
        ):
            pass
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("damage", ["a row lost", "a row garbled", "settings garbled"])
    def test_that_is_damaged_is_not_resumed(self, whole, tmp_path, damage):
        path, _ = whole
        shutil.copytree(path, tmp_path / "out")
        file = tmp_path / "out" / ("settings.json" if damage == "settings garbled" else "samples.jsonl")
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:4] + lines[5:]) if damage == "a row lost" else "[]\n" + "".join(lines[1:]))
        with pytest.raises(UserError, match=r"out.*is damaged"):
            run(tmp_path / "out", resume=True)


@pytest.fixture
def rewards(tmp_path, monkeypatch) -> str:
    """A module of reward functions, of which one is fit for use."""
    name = f"rewards_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "def right(completions, **_): return [1.0 for _ in completions]\n"
        "def raises(**_): 1 / 0\n"
        "def exits(**_): raise SystemExit(3)\n"
        "def short(**_): return [1.0]\n"
        "def nan(completions, **_): return [float('nan') for _ in completions]\n"
        "def words(completions, **_): return ['yes' for _ in completions]\n"
        "def number(**_): return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "arithmetic", "--data", "missing.jsonl"], "--data missing.jsonl: no such file"),
        (["eval", "arithmetic", "--data", "arithmetic", "--engine", "vlm"], "--engine: unknown engine 'vlm'; did you"),
        (["eval", "arithmetic", "--data", "arithmetic", "--precision", "fp8"], "--precision: unknown precision 'fp8'"),
        (["eval", "arithmetic", "--data", "arithmetic", "--reward", "maths"], "reward: unknown reward 'maths'; did"),
        (["eval", "arithmetic", "--data", "arithmetic", "--template", "Q"], "--template 'Q': expected text with {prompt}"),
        (["eval", "arithmetic", "--data", "arithmetic", "--chat-template-kwargs", "[1]"], "--chat-template-kwargs [1]: expected a JSON object"),
        (["eval", "arithmetic", "--data", "arithmetic", "--chat-template-kwargs", "{a"], "--chat-template-kwargs {a: expected a JSON object"),
        (["eval", "arithmetic", "--data", "bad.jsonl"], "bad.jsonl, row 1: is not JSON"),
        (["eval", "arithmetic", "--data", "arithmetic", "--as", "smollm2-adition"], "smollm2-adition: "),
        (["eval", "./missing", "--data", "arithmetic"], "MODEL: cannot load './missing'"),
        (["eval", "arithmetic", "--data", "arithmetic", "--out", "mine"], "--out mine: is not an evaluation"),
        (["eval", "arithmetic", "--data", "arithmetic", "--out", "bad.jsonl"], "--out bad.jsonl: is a file"),
        (["eval", "arithmetic", "--data", "arithmetic", "--out", "new", "--resume"], "--out new: holds no evaluation"),
        (["compare", "mine", "mine"], "mine/evaluation.json: no such file"),
        (["compare", "bad.jsonl", "mine"], "bad.jsonl: is not an evaluation"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_line(here, refusal, arguments, expected):  # noqa: F811
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").write_text("mine")
    (here / "bad.jsonl").write_text("{\n")
    assert refusal(*arguments).startswith(expected)


def test_without_vllm_its_engine_is_refused():
    from importlib.util import find_spec

    if find_spec("vllm") is not None:
        pytest.skip("vllm is installed")
    with pytest.raises(Exception, match="vllm is not installed; pip install vllm, or --engine transformers"):
        VLLMEngine("arithmetic", 1, 1.0, "fp32")


def test_the_commands_evaluate_resume_refuse_and_compare(here, drpo, refusal):  # noqa: F811
    arguments = [
        "eval",
        "arithmetic",
        "--data",
        "arithmetic",
        "--problems",
        "8",
        "--samples",
        "2",
        "--max-tokens",
        "20",
    ]
    arguments += ["--reward", "exact_answer"]
    code, out, err = drpo(*arguments)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["average@2", "pass@2", "majority@2", "truncated"]
    assert out.endswith("evals/arithmetic-arithmetic\n")
    assert "already exists; choose another, or give --resume or --overwrite" in refusal(*arguments)
    assert refusal(*arguments, "--seed", "3", "--resume").startswith("--resume: seed is 3, but evals/arith")
    assert drpo(*arguments, "--resume")[1] == out
    drpo(*arguments, "--seed", "3", "--out", "second")
    code, out, _ = drpo("compare", "evals/arithmetic-arithmetic", "second")
    assert code == 0
    assert "8 problems, better on" in out
    drpo(*arguments, "--problems", "4", "--out", "third")
    assert "problem 5 differs; expected evaluations of the same problems" in refusal("compare", "second", "third")


def test_problems_are_filtered_by_pass_rate(here, drpo):  # noqa: F811
    rows = [{"prompt": f"{n}+{n}-1+2-1=", "answer": f"{2 * n}", "source": "made", "id": str(n)} for n in range(10, 22)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["data", "filter", "rows.jsonl", "--model", "arithmetic", "--samples", "4", "--reward", "exact_answer"]
    code, out, err = drpo(*arguments, "--max-tokens", "20", "--min", "0.25", "--max", "0.75", "--out", "kept.jsonl")
    assert (code, err) == (0, "")
    table = json.loads((here / "kept.evaluation" / "evaluation.json").read_text())["problems_table"]
    kept = [json.loads(line) for line in (here / "kept.jsonl").read_text().splitlines()]
    assert kept == [row for row, found in zip(rows, table, strict=True) if 1 <= found["correct"] <= 3]
    assert 0 < len(kept) < 12
    assert out == f"{len(kept)} of 12 problems kept, kept.jsonl\n"


def test_a_run_folder_is_evaluated_by_its_model_and_keeps_the_result(here, drpo):  # noqa: F811
    model, tokenizer = load_model()
    folder = make_run(here / "run")
    model.save_pretrained(folder.model)
    tokenizer.save_pretrained(folder.model)
    code, out, err = drpo(
        "eval", "run", "--data", "arithmetic", "--problems", "4", "--max-tokens", "20", "--reward", "exact_answer"
    )
    assert (code, err) == (0, "")
    assert out.endswith("run/evaluations/arithmetic\n")
    assert (folder.evaluated / "arithmetic" / "evaluation.json").is_file()
