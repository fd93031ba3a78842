"""One small rollout by the recipe's own trainer, and what it says of μ and π."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from drpo.data.problems import Problem
from drpo.doctor.findings import Finding
from drpo.precision import BF16_PAYS, time_in_bf16
from drpo.rewards import Reward
from drpo.rollout.audit import AuditError
from drpo.run.build import make_trainer
from drpo.run.recipe import Recipe
from drpo.trainer.token_log import TokenLog

PROMPTS, GENERATIONS, TOKENS = 2, 4, 24
"""Of the rollout: at most so many prompts, the recipe's shortest, completions of each, tokens of each at most."""

SET_ASIDE = (
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("deepspeed", "fsdp", "fsdp_config"),
)
"""Options of the trainer that make the same numbers, slowly at first or in several processes."""


def cut_down(recipe: Recipe, prompts: int) -> Recipe:
    """The recipe with one rollout of a few short completions by one process, that is not compiled and tells nobody."""
    trainer = {name: value for name, value in recipe.trainer.items() if name not in SET_ASIDE}
    return recipe.model_copy(
        update={
            "rollouts": 1,
            "prompts_per_rollout": prompts,
            "num_generations": GENERATIONS,
            "updates_per_rollout": min(2, recipe.updates_per_rollout),
            "micro_batch_size": None,
            "max_completion_length": min(TOKENS, recipe.max_completion_length),
            "trainer": {**trainer, "report_to": "none"},
        }
    )


def check_rollout(recipe: Recipe, reward: Reward, problems: Sequence[Problem], scratch: str) -> Iterator[Finding]:
    """Sample, audit and update once, by the trainer that ``drpo train`` makes.

    Raises:
        UserError: there is no such trainer.
    """
    few = sorted(problems, key=lambda problem: len(problem.prompt))[:PROMPTS]
    trainer = make_trainer(cut_down(recipe, len(few)), reward, few, [], scratch, processes=1)
    trainer.args.save_strategy = "no"
    trainer.token_log = TokenLog(trainer.processing_class)
    yield from _check_adapters(recipe, trainer.model)
    if recipe.train_precision == "fp32":
        share = time_in_bf16(trainer.policy)
        pays = share <= BF16_PAYS
        yield Finding(
            "ok",
            f"precision: a pass takes {share:.2f} times as long in bf16 as in fp32 here",
            "train_precision: auto" if pays else None,
        )
    causes = ""
    try:
        trainer.train()
    except AuditError as error:
        causes = "; ".join(" ".join(cause.split()) for cause in str(error).split("\n")[1:])
    audit = trainer.audit
    if audit is None:
        yield Finding("stop", "rollout: has no token that counts", "a larger max_completion_length")
        return
    yield Finding(
        "ok" if audit.passed else "stop",
        f"μ against π: mean |log π − log μ| {audit.mean:.2g} over {audit.tokens} tokens, threshold {audit.threshold:g}",
        causes or None,
    )
    yield from _check_log_probs(trainer.token_log.take())
    yield from check_update_numbers([row for row in trainer.state.log_history if "loss" in row])


def _check_adapters(recipe: Recipe, model: Any) -> Iterator[Finding]:
    """Whether each of several names of modules is one; peft is content with the first."""
    targets = recipe.lora.target_modules if recipe.lora is not None else ()
    modules = [name for name, _ in model.named_modules()]
    for target in targets if isinstance(targets, list) else ():
        if not any(name.endswith(f".{target}") for name in modules):
            yield Finding(
                "warning", f"lora: the model has no module {target!r}", f"lora.target_modules without {target!r}"
            )


def _check_log_probs(rows: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Rounding to bf16 moves a log-prob of −10 by up to 0.03, which looks like a ratio off 1."""
    for column, whose in (("behavior_logp", "the sampler's"), ("logp", "the trainer's")):
        values = torch.tensor([value for row in rows for value in row[column]])
        values = values[values < -1e-3]
        if len(values) >= 8 and torch.equal(values.bfloat16().float(), values):
            step = 2.0 ** (math.floor(math.log2(values.abs().max().item())) - 7)
            yield Finding(
                "stop",
                f"log-probs: {whose} are in bf16, a step of up to {step:.2g} nats",
                "the log-softmax, and what it is computed from, in fp32",
            )


def check_update_numbers(logs: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """What the log's rows of the updates say, with ``loss`` and ``grad_norm`` each."""
    wrong = next((f"{n} is {row[n]}" for row in logs for n in ("loss", "grad_norm") if not math.isfinite(row[n])), None)
    if wrong:
        yield Finding("stop", f"update: {wrong}", "a smaller learning_rate, or train_precision: fp32")
    elif logs:
        moved = logs[-1].get("divergence/mean")
        yield Finding(
            "ok",
            f"update: {len(logs)} made, gradient norm {logs[0]['grad_norm']:.2g}"
            + ("" if any(row["grad_norm"] for row in logs) else " (so small a rollout had nothing to train on)")
            + (f", |π − μ| {moved:.2g} at the last" if moved is not None else ""),
        )
