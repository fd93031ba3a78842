"""Base models of the lab: the built-in one with a long-tailed vocabulary, taught a task whose steps it gets wrong now and then; and a real one."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from drpo.data.arithmetic import MODEL_PATH
from drpo.data.problems import Problem
from drpo.data.split import split_of
from drpo.files import write_json
from drpo.lab.tasks import FILLERS, Task, TaughtTask
from drpo.pretrained import load_pretrained
from drpo.rewards import exact_answer
from drpo.rollout.decoding import record_log_probs

Taught = Literal["dense", "moe"]
Architecture = Literal[Taught, "smollm2"]
ProblemSet = Literal["train", "heldout", "solvable"]
"""Problems of a base model; ``solvable`` are those of ``train`` that it solves in some of its samples, not in all."""

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
LINE_FEED = "Ċ"
"""How byte-level vocabularies spell the token that ends a line."""

EXPERTS, EXPERTS_PER_TOKEN = 8, 2

MADE = "made.json"
"""Written last: what a base model is, and what it can do."""


def make_base_model(
    folder: Path, task: TaughtTask, architecture: Taught, *, steps: int, error_rate: float, seed: int = 0
) -> None:
    """Train a base model and write it with its tokenizer.

    Args:
        folder: where it goes.
        task: what it is taught.
        architecture: ``dense`` is the built-in Qwen3; ``moe`` is a Qwen3-MoE whose experts begin as its MLP.
        steps: batches of 128 solutions, of which the last two fifths are noisy.
        error_rate: the share of wrong steps in a noisy solution.
        seed: of everything that is drawn.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH, padding_side="left")
    tokenizer.add_tokens(FILLERS)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    if architecture == "moe":
        model = _mixture_of_experts(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    for step in track(range(steps), description=f"teaching {architecture} {task.name}"):
        ids, targets = _batch(task, tokenizer, rng, size=128, error_rate=error_rate if step >= 0.6 * steps else 0.0)
        logits = model(input_ids=ids[:, :-1]).logits
        cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    taught = {"architecture": architecture, "steps": steps, "error_rate": error_rate, "seed": seed}
    _write(folder, model, tokenizer, task, taught)


def copy_smollm2(folder: Path, task: Task, source: str) -> None:
    """Write a copy of a real model whose completions end with their line.

    Args:
        folder: where it goes.
        task: on which its accuracy is measured.
        source: a folder, or a name on the hub.

    Raises:
        UserError: it cannot be loaded.
    """
    expected = f"a folder with a copy of {SMOLLM2}, as scripts/smollm2.py makes"
    model, tokenizer = load_pretrained(source, torch.float32, field="setting smollm2", expected=expected)
    tokenizer.eos_token = LINE_FEED
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    _write(folder, model, tokenizer, task, {"architecture": "smollm2"})


def _write(folder: Path, model: Any, tokenizer: Any, task: Task, made: dict[str, Any]) -> None:
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    measured = measure(model, tokenizer, task)
    write_json(folder / MADE, {"task": task.name, **made, "parameters": model.num_parameters(), **measured})


def measure(model: Any, tokenizer: Any, task: Task, problems: int = 500) -> dict[str, float]:
    """Accuracy on held-out problems, sampled once each at temperature 1, and the share of sampled tokens with μ ≤ 0.01."""
    heldout = task.problems("heldout", problems, seed=1)
    with record_log_probs(model) as recorder:
        completions, rewards = _sample(model, tokenizer, task, heldout)
        lengths = (completions != tokenizer.pad_token_id).sum(dim=1).tolist()
        log_probs = torch.tensor([log_prob for row in recorder.log_probs(lengths) or [] for log_prob in row])
    return {"accuracy": sum(rewards) / problems, "rare_tokens": (log_probs <= math.log(0.01)).float().mean().item()}


def solvable(model: Any, tokenizer: Any, task: Task, problems: Sequence[Problem], samples: int = 8) -> list[Problem]:
    """The problems that a model solves in some of its samples at temperature 1, and not in all."""
    repeated = [problem for problem in problems for _ in range(samples)]
    with record_log_probs(model):
        _, rewards = _sample(model, tokenizer, task, repeated)
    solved = torch.tensor(rewards).view(-1, samples).mean(dim=1).tolist()
    return [problem for problem, share in zip(problems, solved, strict=True) if 0 < share < 1]


def _sample(model: Any, tokenizer: Any, task: Task, problems: Sequence[Problem]) -> tuple[Tensor, list[float]]:
    """The ids [B, T] of a completion of each problem, the same each time, and their rewards."""
    inputs = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(**inputs, max_new_tokens=task.longest, do_sample=True, top_k=0)
    completions = ids[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return completions, exact_answer(texts, [problem.answer for problem in problems])


def _mixture_of_experts(dense: Any) -> Any:
    """A mixture whose experts are all the dense model's MLP, so that it computes the same before it is trained."""
    config = dense.config.to_dict()
    for name in ("architectures", "model_type", "layer_types", "intermediate_size"):
        config.pop(name, None)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **config,
            intermediate_size=dense.config.intermediate_size,
            moe_intermediate_size=dense.config.intermediate_size,
            num_experts=EXPERTS,
            num_experts_per_tok=EXPERTS_PER_TOKEN,
            norm_topk_prob=True,
            router_aux_loss_coef=0.001,
        )
    )
    weights = dense.state_dict()
    for name, tensor in model.state_dict().items():
        if name in weights:
            tensor.copy_(weights[name])
    layers: Any = model.model.layers
    for ours, theirs in zip(layers, dense.model.layers, strict=True):
        experts, mlp = ours.mlp.experts, theirs.mlp
        experts.gate_up_proj.data.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).expand(EXPERTS, -1, -1))
        experts.down_proj.data.copy_(mlp.down_proj.weight.expand(EXPERTS, -1, -1))
    model.generation_config = dense.generation_config
    return model


def _batch(task: TaughtTask, tokenizer: Any, rng: random.Random, size: int, error_rate: float) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] of training problems with their solutions, and the same with −100 outside of solutions."""
    prompts, solutions = [], []
    while len(prompts) < size:
        exercise = task.sample(rng)
        if split_of(exercise.prompt) == "train":
            prompts.append(tokenizer(exercise.prompt)["input_ids"])
            solutions.append([*tokenizer(task.write(exercise, rng, error_rate))["input_ids"], tokenizer.eos_token_id])
    length = max(len(prompt) + len(solution) for prompt, solution in zip(prompts, solutions, strict=True))
    ids = torch.full((size, length), tokenizer.pad_token_id)
    targets = torch.full((size, length), -100)
    for row, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        end = len(prompt) + len(solution)
        ids[row, :end] = torch.tensor([*prompt, *solution])
        targets[row, len(prompt) : end] = torch.tensor(solution)
    return ids, targets
