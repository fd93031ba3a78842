"""drpo doctor: what it finds in recipes, model folders, data and installations with one thing wrong, and in those with nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from drpo.doctor import Finding, environment, memory
from drpo.doctor.environment import check_packages
from drpo.doctor.examine import examine
from drpo.rollout.recorder import LogProbRecorder

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Plant = Callable[[Path, pytest.MonkeyPatch], None]


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


def no_padding(here: Path, patch: pytest.MonkeyPatch) -> None:
    edit("tokenizer_config.json", pad_token=None)(here, patch)
    edit("tokenizer.json", padding=None)(here, patch)


def template(text: str, **others: Any) -> Plant:
    def plant(here: Path, patch: pytest.MonkeyPatch) -> None:
        (here / "model" / "chat_template.jinja").write_text(text)
        edit("tokenizer_config.json", **others)(here, patch)

    return plant


def rows(name: str, *problems: tuple[str, str]) -> Plant:
    def plant(here: Path, _: pytest.MonkeyPatch) -> None:
        text = "".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in problems)
        (here / name).write_text(text)

    return plant


def module(name: str, text: str) -> Plant:
    def plant(here: Path, patch: pytest.MonkeyPatch) -> None:
        (here / f"{name}.py").write_text(text)
        patch.syspath_prepend(here)

    return plant


def without(module: str) -> Plant:
    """A module that cannot be imported."""
    return lambda _, patch: patch.setattr(
        environment, "find_spec", lambda name: None if name == module else find_spec(name)
    )


def installed(**versions: str | None) -> Plant:
    """Other versions of packages, or none of them."""

    def found(name: str) -> str:
        if name not in versions:
            return version(name)
        if (other := versions[name]) is None:
            raise PackageNotFoundError(name)
        return other

    return lambda _, patch: patch.setattr(environment, "version", found)


def recorded(change: Callable[[list[list[float]]], Any]) -> Plant:
    """Another sampler, whose log-probs are a function of the right ones."""

    def plant(_: Path, patch: pytest.MonkeyPatch) -> None:
        right = LogProbRecorder.log_probs
        patch.setattr(LogProbRecorder, "log_probs", lambda self, lengths: change(right(self, lengths) or []))

    return plant


def gpt2(here: Path, _: pytest.MonkeyPatch) -> None:
    GPT2Config(
        vocab_size=99, n_positions=64, n_embd=8, n_layer=1, n_head=1, eos_token_id=1, bos_token_id=1
    ).save_pretrained(here / "model")


def truncated(here: Path, _: pytest.MonkeyPatch) -> None:
    weights = here / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def small(size: int) -> Plant:
    return lambda _, patch: patch.setattr(memory, "available", lambda: size)


def bf16(rows: list[list[float]]) -> list[list[float]]:
    return [torch.tensor(row).bfloat16().tolist() for row in rows]


def fault(
    name: str,
    plant: Plant | list[Plant] | None = None,
    *overrides: str,
    what: str,
    fix: str,
    verdict: str = "stop",
    rollout: bool = False,
) -> Any:
    return pytest.param(plant, overrides, rollout, Finding(verdict, what, fix), id=name)  # type: ignore[arg-type]


IN_RECIPES = [
    fault("temperature", None, "trainer.generation_kwargs={temperature: 0.7}",
          what="sampling: temperature: tokens are sampled at 0.7 and scored at 1", fix="temperature at the top of the recipe"),
    fault("top-k", None, "trainer.top_k=20", what="top_k=20 would have no effect", fix="no trainer.top_k, or trainer.replay_support: true"),
    fault("top-p", None, "trainer.top_p=0.9", what="top_p=0.9 would have no effect", fix="no trainer.top_p, or trainer.replay_support: true"),
    fault("repetition penalty", None, "trainer.generation_kwargs={repetition_penalty: 1.1}",
          what="repetition_penalty", fix="no trainer.generation_kwargs.repetition_penalty"),
    fault("no log-probs", None, "trainer.use_transformers_continuous_batching=true",
          what="it returns no log-probs", fix="no trainer.use_transformers_continuous_batching"),
    fault("KL penalty", None, "trainer.beta=0.04", what="beta=0.04 would have no effect", fix="no trainer.beta"),
    fault("four numbers", None, "trainer.steps_per_generation=3",
          what="steps_per_generation=3 contradicts updates_per_rollout=4", fix="no trainer.steps_per_generation"),
    fault("misplaced", None, "trainer.num_generations=4", what="has 'num_generations'", fix="num_generations at the top of the recipe"),
    fault("misspelt field", None, "learning_rat=0.1", what="unknown field 'learning_rat'", fix="'learning_rate'"),
    fault("misspelt objective", None, "objective=dropo", what="unknown objective 'dropo'", fix="'drpo'"),
    fault("negative delta", None, "objective.delta=-1", what="delta is -1", fix="a finite number > 0"),
    fault("wide delta", None, "objective.delta=12.5", verdict="warning",
          what="objective: delta = 12.5 confines the gradient weight to [0.92, 1.08]", fix="objective.delta: 0.2"),
    fault("odd updates", None, "updates_per_rollout=3", what="128 samples, updates_per_rollout 3", fix="a divisor of 128"),
    fault("one update", None, "updates_per_rollout=1", verdict="warning",
          what="a trust region has nothing to bound", fix="updates_per_rollout: 4"),
    fault("one completion", None, "num_generations=1", what="num_generations: got 1", fix="greater than or equal to 2"),
    fault("divided advantages", None, "advantage=mean-std", verdict="warning", what="advantage: mean-std", fix="advantage: mean"),
    fault("uncorrected anchor", None, "objective=ppo", "rollout_precision=bf16", verdict="warning",
          what="anchor: the trainer's old policy, π_old, scored once more when a rollout begins, but rollouts are in bf16",
          fix="correction: token_truncate"),
    fault("old samples", None, "objective=ppo", "rollout_lag=2", verdict="warning",
          what="samples are 2 rollouts old: nothing makes up for π_old/μ", fix="anchor: sampler"),
    fault("deaf audit", None, "audit_threshold=5", verdict="warning", what="audit_threshold 5 nats", fix="at most 0.1"),
    fault("adapters that a copy lacks", None, "lora={}", "rollout_precision=bf16", what="lora: rollout_precision would sample from a copy", fix="no rollout_precision, or no lora"),
    fault("adapters of another time", None, "lora={}", "rollout_lag=2", what="lora: rollout_lag would sample from a copy", fix="no rollout_lag, or no lora"),
    fault("module that is missing", None, "lora={target_modules: [q_proj, nonexistent]}", verdict="warning",
          what="lora: the model has no module 'nonexistent'", fix="without 'nonexistent'"),
    fault("shards", None, "trainer.fsdp=true", verdict="warning", what="trainer.fsdp: shards over several processes", fix="accelerate launch"),
    fault("shards of a copy", None, "trainer.fsdp=full_shard", "rollout_lag=2", what="trainer.fsdp: rollout_lag would sample", fix="no rollout_lag, or no trainer.fsdp"),
    fault("no DeepSpeed", without("deepspeed"), "trainer.deepspeed={}", "trainer.deepspeed.zero_optimization={stage: 2}",
          what="trainer.deepspeed: deepspeed is not installed", fix="pip install deepspeed"),
    fault("no Liger", without("liger_kernel"), "trainer.use_liger_kernel=true", what="liger-kernel is not installed", fix="pip install liger-kernel"),
    fault("answers taken away", None, "trainer.remove_unused_columns=true", what="takes the reference answers away", fix="no trainer.remove_unused_columns"),
    fault("completions by another name", None, "trainer.num_return_sequences=4", what="num_generations at the top of the recipe is for that",
          fix="num_generations at the top of the recipe, and no trainer.num_return_sequences"),
    fault("stop strings", None, "trainer.generation_kwargs={stop_strings: [x]}", what="needs a tokenizer that TRL does not give", fix="no trainer.generation_kwargs.stop_strings"),
    fault("token healing", None, "trainer.generation_kwargs={token_healing: true}", what="generation_kwargs has 'token_healing'", fix="no trainer.generation_kwargs.token_healing"),
    fault("PPO with a filter", None, "objective=ppo", "trainer.top_p=0.9", "trainer.replay_support=true", what="needs π_old too", fix="anchor: sampler"),
    fault("fp16", None, "trainer.fp16=true", what="fp16 is none of the precisions", fix="train_precision: bf16 at the top of the recipe, and no trainer.fp16"),
    fault("bf16", None, "trainer.bf16=true", what="bf16 follows from the recipe", fix="train_precision: bf16 at the top of the recipe, and no trainer.bf16"),
    fault("GRPO's clip", None, "trainer.epsilon=0.3", what="epsilon=0.3 would have no effect", fix="objective: {name: ppo, clip_low: 0.2}, and no trainer.epsilon"),
    fault("options of a loaded model", None, "trainer.model_init_kwargs={dtype: bfloat16}", what="would have no effect", fix="no trainer.model_init_kwargs"),
    fault("weights of rewards", None, "trainer.reward_weights=[1.0, 2.0]", what="trainer: reward_weights", fix="no trainer.reward_weights"),
    fault("misspelt optimizer", None, "trainer.optim=adamm", what="adamm is not a valid OptimizerNames", fix="'adamw_torch'"),
    fault("half a schedule", None, "trainer.lr_scheduler_type=cosine_with_min_lr", what="should be set through", fix="trainer.lr_scheduler_kwargs: {min_lr_rate: 0.1}", rollout=True),
    fault("options that are no JSON", None, "trainer.chat_template_kwargs='{a: 1}'", what="trainer.chat_template_kwargs: got", fix="trainer.chat_template_kwargs: a mapping"),
    fault("audit of rounding", None, "audit_threshold=1.0e-9", verdict="warning", what="audit_threshold 1e-09 nats is less than rounding", fix="at least 1e-05"),
    fault("no engine", None, "trainer.use_vllm=true", "trainer.vllm_mode=colocate",
          what="trainer.use_vllm: vllm is not installed", fix="pip install 'trl[vllm]'"),
    fault("no server", None, "trainer.use_vllm=true", "trainer.vllm_mode=server", "trainer.vllm_server_port=9",
          what="trainer.use_vllm: no server answers at http://0.0.0.0:9", fix="trl vllm-serve --model"),
    fault("no reporter", None, "trainer.report_to=trackio", what="trainer.report_to: trackio is not installed", fix="pip install trackio"),
    fault("misspelt compiler", None, "trainer.torch_compile_backend=indctor", what="trainer.torch_compile_backend: unknown backend", fix="'inductor'"),
    fault("misspelt mode of the compiler", None, "trainer.torch_compile_mode=max-autotun", what="trainer.torch_compile_mode: unknown mode", fix="'max-autotune'"),
    fault("misspelt reporter", None, "trainer.report_to=wandbb", what="unknown reporter 'wandbb'", fix="'wandb'"),
    fault("unknown adapters", None, "lora={target_modules: nonexistent}", what="lora: Target modules", fix="all-linear"),
]  # fmt: skip

IN_ENVIRONMENTS = [
    fault("missing package", installed(filelock=None), what="packages: filelock is not installed", fix="pip install 'filelock>=3.13'"),
    fault("other TRL", installed(trl="1.15.0"), what="packages: trl is 1.15.0; expected ==1.16.0", fix="pip install 'trl==1.16.0'"),
    fault("missing extra", installed(peft=None), "lora={}", what="lora: peft is not installed", fix="pip install 'drpo[lora]'"),
    fault("missing torchao", installed(torchao=None), "rollout_precision=int8",
          what="rollout_precision: int8: torchao is not installed", fix="pip install 'drpo[low-precision]'"),
    fault("no extra, and some of what belongs to it", installed(verl=None, nvtx=None), verdict="ok", what="not installed: verl", fix=""),
    fault("half an extra", installed(nvtx=None), verdict="warning",
          what="packages: nvtx is not installed (extra verl)", fix="pip install 'drpo[verl]'"),
    fault("plug-in off", lambda _, patch: patch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none"), verdict="warning",
          what="plug-ins: verl does not load the entry point of this library", fix="VERL_USE_EXTERNAL_PLUGINS=auto"),
    fault("no room for weights", small(2**20), what="memory: about", fix="lora: {}"),
    fault("no room for activations", small(20 * 2**20), verdict="warning", what="memory: about", fix="tokens_per_micro_batch"),
]  # fmt: skip

IN_MODELS = [
    fault("adapters alone", lambda here, _: (here / "model" / "config.json").rename(here / "model" / "adapter_config.json"),
          what="has adapters and no model", fix="merge_and_unload()"),
    fault("missing model", None, "model=./nowhere", what="model: cannot load './nowhere'", fix="a folder saved by Transformers"),
    fault("dropout", edit("config.json", attention_dropout=0.1), what="dropout: attention_dropout=0.1", fix="attention_dropout: 0.0 in"),
    fault("dropout modules", gpt2, what="dropout: ", fix="resid_pdrop: 0.0"),
    fault("no end", no_eos, what="tokenizer: neither it nor the model has an end-of-sequence token", fix="eos_token in"),
    fault("no padding", no_padding, verdict="warning", what="tokenizer: has no padding token", fix="pad_token in"),
    fault("another tokenizer", edit("config.json", vocab_size=50),
          what="tokenizer: has token 98, and the model's embedding 50 rows", fix="the tokenizer that the model was trained with"),
    fault("eos out of range", edit("generation_config.json", eos_token_id=[1, 200]),
          what="tokenizer: eos_token_id 200 is none of 99 tokens", fix="eos_token_id in"),
    fault("min-p left on", edit("generation_config.json", min_p=0.1),
          what="sampling: generation_config.json of the model has min_p=0.1", fix="no min_p in"),
    fault("n-grams left out", edit("generation_config.json", no_repeat_ngram_size=3),
          what="has no_repeat_ngram_size=3", fix="no no_repeat_ngram_size in"),
    fault("quantised", edit("config.json", quantization_config={"quant_method": "awq", "bits": 4}),
          what="is quantised (awq)", fix="the model that it was made from"),
    fault("few positions", edit("config.json", max_position_embeddings=30),
          what="of the model's 30 positions", fix="max_completion_length: 1"),
    fault("template differs", template(CHAT, chat_template="{{ messages[0].content }}"),
          what="chat template: chat_template.jinja and tokenizer_config.json", fix="chat_template.jinja alone"),
    fault("template fails", template("{{ raise_exception('no') }}"), what="chat template: fails on a prompt", fix="that takes one message"),
    fault("template without prompt", template("<|user|>"), what="chat template: leaves the prompt out", fix="chat_template in"),
    fault("template without a turn", template("{{ messages[0].content }}"), verdict="warning",
          what="chat template: has no generation prompt", fix="add_generation_prompt"),
    fault("template without an end", template(CHAT.replace("{{ eos_token }}", "<pad>")), verdict="warning",
          what="chat template: ends a turn with '<pad>', which ends no completion", fix="eos_token_id: [0, 1] in"),
    fault("template that ends nothing", template(CHAT.replace("{{ eos_token }}", "")), verdict="warning",
          what="chat template: ends no turn", fix="{{ eos_token }} after the content"),
    fault("template that ends with text", template(CHAT.replace("{{ eos_token }}", "+")), verdict="warning",
          what="chat template: ends an answer with '+', without '<eos>'", fix="{{ eos_token }} after the content"),
    fault("unread option", template(CHAT), "trainer.chat_template_kwargs={enable_thinking: false}", verdict="warning",
          what="chat template: does not read enable_thinking", fix="no trainer.chat_template_kwargs.enable_thinking"),
    fault("unread option in JSON", template(CHAT), """trainer.chat_template_kwargs='{"enable_thinking": false}'""", verdict="warning",
          what="chat template: does not read enable_thinking", fix="no trainer.chat_template_kwargs.enable_thinking"),
    fault("two templates", template(CHAT), "task.template=<eos>{prompt}",
          what="prompt: has '<eos>' in its text, and the chat template is put around it", fix="task.template"),
    fault("two beginnings", edit("tokenizer_config.json", bos_token="<unk>"), "task.template=<unk><unk>{prompt}",
          what="prompt: begins with '<unk>' twice", fix="task.template without <unk>"),
    fault("missing weights", edit("config.json", num_hidden_layers=9, layer_types=["full_attention"] * 9),
          what="of the weights that its config.json asks for, model.layers.", fix="the config.json that belongs to them", rollout=True),
    fault("damaged weights", truncated, what="weights: ", fix="model.safetensors copied or downloaded once more"),
    fault("no weights", lambda here, _: (here / "model" / "model.safetensors").unlink(), what="weights: there are none in", fix="model.safetensors in"),
    fault("a shard that is missing", lambda here, _: (here / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
          what="names b.safetensors, not in the folder", fix="b.safetensors copied"),
    fault("settings that are no JSON", lambda here, _: (here / "model" / "generation_config.json").write_text("{"),
          what="generation_config.json cannot be read", fix="valid JSON in"),
    fault("no vocabulary", lambda here, _: [file.unlink() for file in (here / "model").glob("tokenizer*")],
          what="tokenizer: makes no tokens of text", fix="such as tokenizer.json"),
    fault("code in the folder", edit("config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}),
          what="contains custom code", fix="none is run from its folder"),
    fault("weights of another shape", edit("config.json", intermediate_size=99), rollout=True,
          what="model: cannot load", fix="the config.json that belongs to the weights"),
    fault("stop strings of the model", edit("generation_config.json", stop_strings=["="]), rollout=True,
          what="generation_config.json of the model has stop_strings=['=']", fix="no stop_strings in"),
    fault("completions a prompt of the model", edit("generation_config.json", num_return_sequences=2), rollout=True,
          what="has num_return_sequences=2", fix="no num_return_sequences in"),
]  # fmt: skip

IN_DATA = [
    fault("missing file", None, "task.train=nowhere.jsonl", what="nowhere.jsonl: no such file", fix="task.train: a .jsonl file"),
    fault("missing field", None, "task.answer=solution", what="unknown field 'solution'", fix="one of prompt, answer"),
    fault("empty file", rows("train.jsonl"), what="train.jsonl: has no rows", fix="one JSON object a line"),
    fault("few rows", rows("train.jsonl", ("1+1=", "2")), what="has 1 rows", fix="prompts_per_rollout: 1"),
    fault("duplicates", rows("train.jsonl", *[("1+1=", "2")] * 16), verdict="warning",
          what="task.train: 16 rows hold 1 distinct prompts", fix="drpo data"),
    fault("not held out", None, "task.heldout=train.jsonl", verdict="warning",
          what="task.heldout: 32 of 32 prompts are in task.train too", fix="drpo data NAME --against"),
    fault("answers in words", rows("train.jsonl", *[(f"{n}+1=", "two" if n % 2 else str(n + 1)) for n in range(16)]), "reward=gsm8k",
          verdict="warning", what="gsm8k does not recognise 8 of 16 reference answers as right, the first 'two'", fix="task.answer"),
    *(fault(f"reward for {what} of {of}", [module(f"sloppy_{name}", f"def score(completions, **_):\n    return [float({test}) for c in completions]\n"), answers],
            f"reward=sloppy_{name}:score", "prompts_per_rollout=1", what="grader: score gives 1 to", fix="a reward that reads them")
      for name, what, test in (("any", "anything", "True"), ("digit", "digits", "any(map(str.isdigit, c))"), ("box", "a box", "'boxed' in c"))
      for of, answers in (("different answers", rows("train.jsonl", *[(f"{n}+1=", str(n + 1)) for n in range(16)])),
                          ("numbers and words", rows("train.jsonl", *[(f"{n}+1=", "two" if n % 2 else str(n + 1)) for n in range(16)])),
                          ("the same answer", rows("train.jsonl", *[(f"{n}-{n}=", "0") for n in range(16)])),
                          ("one problem", rows("train.jsonl", ("1+1=", "2"))),
                          ("pairs", rows("train.jsonl", *[(f"{n}+1-{n % 2}=", str(n + 1 - n % 2)) for n in range(16)])))),
    fault("reward for a digit", [module("ones", "def score(completions, **_):\n    return [float('1' in c) for c in completions]\n"),
                                 rows("train.jsonl", *[(f"{n}+1=", str(n + 1)) for n in range(16)])], "reward=ones:score",
          what="grader: score gives 1 to", fix="a reward that reads them"),
    *(fault(f"reward of {value}", module(f"of_{name}", f"def score(completions, **_):\n    return [float('{value}')] * len(completions)\n"), f"reward=of_{name}:score",
            what=f"grader: score gives {value} to", fix="a finite number from score, or None") for name, value in (("nan", "nan"), ("inf", "inf"), ("minus_inf", "-inf"))),
    fault("reward of nan for wrong answers", module("nan_if_wrong", "def score(completions, answer, **_):\n    return [1.0 if c == a else float('nan') for c, a in zip(completions, answer)]\n"),
          "reward=nan_if_wrong:score", what="grader: score gives nan to", fix="a finite number from score, or None"),
    fault("reward that raises", module("raises", "def no(completions, **_):\n    raise OSError('disk')\n"), "reward=raises:no",
          what="grader: no fails on", fix="returns a number or None for each completion"),
    fault("reward of another length", module("short", "def one(completions, **_):\n    return [1.0]\n"), "reward=short:one",
          what="returned 1 scores for 32 completions", fix="a number or None for each"),
    *(fault(f"right answers that weigh {weight}", None, f"reward=[{{name: exact_answer, weight: {weight}}}, {{name: format, weight: 0.5}}]",
            what="reward: the sum gives", fix="a weight > 0 for the one") for weight in (0.0, -1.0)),
    fault("half a point", module("half", "def score(completions, answer, **_):\n    return [0.5 * (c == a) for c, a in zip(completions, answer)]\n"), "reward=half:score",
          verdict="warning", what="grader: score gives 0.5 at most", fix="1 for a right answer"),
    fault("reward that exits", module("exits", "def score(completions, answer, **_):\n    raise SystemExit(3)\n"), "reward=exits:score",
          what="grader: score fails on", fix="returns a number or None"),
    fault("class for a reward", module("classes", "class Score:\n    pass\n"), "reward=classes:Score", what="'classes:Score' is a class", fix="a function"),
    fault("unknown characters", rows("train.jsonl", *[(f"é{n}=", str(n)) for n in range(16)]), verdict="warning",
          what="prompt: 16 of 16 have characters that the tokenizer does not know", fix="without what becomes <unk>"),
    fault("byte order mark", lambda here, _: (here / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "1+1=", "answer": "2"}'),
          what="is not JSON in UTF-8", fix="without a byte order mark"),
    fault("missing reward", None, "reward=nowhere:score", what="reward: cannot load 'nowhere:score'", fix="a module nowhere that imports"),
    fault("misspelt reward", None, "reward=exact_anwser", what="unknown reward 'exact_anwser'", fix="'exact_answer'"),
]  # fmt: skip

IN_ROLLOUTS = [
    fault("dropout in a rollout", edit("config.json", attention_dropout=0.2), rollout=True,
          what="μ against π: mean |log π − log μ|", fix="1. dropout: attention_dropout is above 0"),
    fault("wrong sampler", recorded(lambda rows: [[p - 0.5 for p in row] for row in rows]), rollout=True,
          what="threshold 0.001", fix="chat template or tokeniser"),
    fault("rollout without log-probs", recorded(lambda _: None), rollout=True,
          what="rollout: the rollout returned no log-probs", fix="let Transformers or vLLM generate"),
    fault("log-probs that are none", recorded(lambda rows: [[float("nan")] * len(row) for row in rows]), rollout=True,
          what="the sampler's log-prob of token 0 of completion 0 is nan", fix="finite"),
    fault("bf16 log-probs", recorded(bf16), "audit_threshold=0.1", rollout=True,
          what="log-probs: the sampler's are in bf16", fix="in fp32"),
    fault("n-grams in a rollout", edit("generation_config.json", no_repeat_ngram_size=3), rollout=True,
          what="μ against π", fix="no_repeat_ngram_size=3 changes what is sampled from"),
    fault("reward of inf in a rollout", module("at_times", "def score(completions, answer, **_):\n    return [float('inf') if len(completions) == 8 else float(c == a) for c, a in zip(completions, answer)]\n"),
          "reward=at_times:score", rollout=True, what="rollout: reward of completion", fix="a finite number from the reward"),
    fault("learning rate", None, "learning_rate=1.0e+30", rollout=True, what="update: ", fix="a smaller learning_rate"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("plant", "overrides", "rollout", "expected"),
    [*IN_RECIPES, *IN_ENVIRONMENTS, *IN_MODELS, *IN_DATA, *IN_ROLLOUTS],
)
def test_a_planted_fault_is_found_with_its_fix(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    plant: Plant | list[Plant] | None,
    overrides: tuple[str, ...],
    rollout: bool,
    expected: Finding,
) -> None:
    for one in plant if isinstance(plant, list) else [plant] if plant else []:
        one(here, monkeypatch)
    own = ["model=model", "task.train=train.jsonl", "task.heldout=heldout.jsonl", "rollouts=2"]
    findings = examine(None, [*own, *overrides], rollout=rollout)
    said = "\n".join(f"{f.verdict} {f.what} | {f.fix}" for f in findings)
    found = [f for f in findings if expected.what in f.what and f.verdict == expected.verdict]
    assert found, said
    assert any((expected.fix or "") in (f.fix or "") for f in found), said
    # The checks that could go on did.
    assert len(findings) >= 5, said


def test_of_the_built_in_recipe_all_is_well(here: Path) -> None:
    findings = examine()
    assert {f.verdict for f in findings} == {"ok"}, findings
    said = "\n".join(f.what for f in findings)
    for check in (
        "packages",
        "extras",
        "plug-ins",
        "anchor",
        "updates",
        "dropout",
        "sampling",
        "memory",
        "grader",
        "μ against π",
    ):
        assert f"{check}: " in said
    assert "16 prompts x 8 = 128 samples a rollout, 4 updates of 32" in said


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout_lag=2", "rollout_precision=bf16"],
        ["train_precision=bf16"],
        ["trainer.top_p=0.9", "trainer.replay_support=true"],
        ["temperature=0.7"],
        ["lora={}"],
        ["objective=ppo"],
        ["updates_per_rollout=16"],
        ["trainer.torch_compile=true"],
        ["trainer.disable_dropout='true'"],
        ["reward=[{name: math}, {name: format, weight: 0.1}]"],
    ],
    ids=" ".join,
)
def test_of_other_healthy_recipes_too(here: Path, overrides: list[str]) -> None:
    began = time.monotonic()
    assert [f for f in examine(None, overrides) if f.verdict != "ok"] == []
    assert time.monotonic() - began < 30


SAME = '{"enable_thinking": true}'


@pytest.mark.parametrize(
    ("plant", "overrides"),
    [
        pytest.param(template(CHAT), (), id="one template"),
        pytest.param(template(CHAT + "\n", chat_template=CHAT), (), id="a line break at the end of one of two"),
        pytest.param(template(CHAT, chat_template=[{"name": "default", "template": CHAT}]), (), id="a list of one"),
        pytest.param(template(CHAT + "{% if enable_thinking %}{% endif %}"), (f"trainer.chat_template_kwargs='{SAME}'",), id="options in JSON"),
        pytest.param(rows("train.jsonl", ("1+1=", "2")), ("prompts_per_rollout=1", "rollouts=1"), id="one problem"),
    ],
)  # fmt: skip
def test_of_models_and_data_that_are_unusual_and_right_all_is_well(
    here: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant, overrides: tuple[str, ...]
) -> None:
    plant(here, monkeypatch)
    findings = examine(None, ["model=model", "task.train=train.jsonl", "rollouts=2", *overrides])
    assert [f for f in findings if f.verdict != "ok"] == []


@pytest.mark.parametrize(
    ("broken", "fix", "mended"),
    [
        (["lora={}", "rollout_lag=2"], "no rollout_lag", ["lora={}"]),
        (["objective=ppo", "trainer.top_p=0.9", "trainer.replay_support=true"], "anchor: sampler",
         ["objective=ppo", "trainer.top_p=0.9", "trainer.replay_support=true", "anchor=sampler"]),
        (["objective=drpo_topk", "trainer.top_p=0.9", "trainer.replay_support=true"], "objective: {name: drpo, delta: 0.2}",
         ["objective={name: drpo, delta: 0.2}", "trainer.top_p=0.9", "trainer.replay_support=true"]),
        (["trainer.top_k=20"], "trainer.replay_support: true", ["trainer.top_k=20", "trainer.replay_support=true"]),
        (["trainer.epsilon=0.3"], "objective: {name: ppo, clip_low: 0.2}", ["objective={name: ppo, clip_low: 0.2}"]),
        (["trainer.fp16=true"], "train_precision: bf16", ["train_precision=bf16"]),
        (["trainer.lr_scheduler_type=cosine_with_min_lr"], "trainer.lr_scheduler_kwargs: {min_lr_rate: 0.1}",
         ["trainer.lr_scheduler_type=cosine_with_min_lr", "trainer.lr_scheduler_kwargs={min_lr_rate: 0.1}"]),
        (["trainer.optim=adamm"], "'adamw_torch'", ["trainer.optim=adamw_torch"]),
        (["trainer.torch_compile_backend=indctor"], "'inductor'", ["trainer.torch_compile_backend=inductor"]),
        (["trainer.num_return_sequences=4"], "num_generations at the top", ["num_generations=4"]),
        (["updates_per_rollout=3"], "a divisor of 128", ["updates_per_rollout=2"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_fix_that_is_applied_leaves_nothing_to_mend(
    here: Path, broken: list[str], fix: str, mended: list[str]
) -> None:
    first, *_ = [f for f in examine(None, broken) if f.verdict == "stop"]
    assert fix in (first.fix or "")
    assert [f for f in examine(None, mended) if f.verdict != "ok"] == []


@pytest.mark.parametrize(
    ("answer", "temperature", "verdict", "what", "fix"),
    [
        ((200, "raw_logprobs"), 0.7, "stop", "returns raw_logprobs, log-probs at temperature 1, and tokens are drawn at 0.7", "trl vllm-serve --model"),
        ((200, "raw_logprobs"), 1, None, "", ""),
        ((200, "processed_logprobs"), 0.7, None, "", ""),
        ((404, ""), 1, "stop", "does not say how it is set up (/server_info: 404)", "trl vllm-serve --model"),
        ((200, None), 1, "warning", "is no vLLM server that TRL knows", "trl vllm-serve --model"),
    ],
    ids=["before the temperature", "temperature 1", "after the temperature", "no development endpoints", "another server"],
)  # fmt: skip
def test_a_server_is_asked_what_log_probs_it_returns(
    here: Path, answer: tuple[int, str | None], temperature: float, verdict: str | None, what: str, fix: str
) -> None:
    status, mode = answer
    said = {"vllm_config": {"model_config": {"logprobs_mode": mode}}} if mode else {}

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/server_info?config_format=json"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"trainer.vllm_server_base_url=http://127.0.0.1:{server.server_port}"
        options = ["trainer.use_vllm=true", "trainer.vllm_mode=server", address, f"temperature={temperature}"]
        found = [f for f in examine(None, options, rollout=False) if f.what.startswith("trainer.use_vllm: ")]
        server.shutdown()
    missing, *others = found
    assert missing.what == "trainer.use_vllm: vllm is not installed"
    assert [f.verdict for f in others] == ([verdict] if verdict else [])
    assert all(what in f.what and fix in (f.fix or "") for f in others)


def test_packages_that_are_declared_are_all_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(torch="1.0", rich=None)(Path(), monkeypatch)
    assert [f.fix for f in check_packages()] == ["pip install 'rich>=13.0'", "pip install 'torch>=2.8'"]
