"""One small rollout by the recipe's own trainer, and what it says of μ and π."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from drpo.data.problems import Problem
from drpo.doctor.findings import Finding
from drpo.doctor.fixes import fix_of
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


class _Logs(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.rows.append(logs)


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
    trainer = make_trainer(cut_down(recipe, len(few)), reward, few, scratch, processes=1)
    trainer.args.save_strategy = "no"
    trainer.token_log = TokenLog()
    logs = _Logs()
    trainer.add_callback(logs)
    stopped: AuditError | None = None
    try:
        trainer.train()
    except AuditError as error:
        stopped = error
    except ValueError as error:
        # A rollout without log-probs, or with some that are none, or a reward's: the trainer's own words.
        said = " ".join(f"rollout: {error}".split())
        yield Finding("stop", said, _fix_of(str(error)) or fix_of(error, said))
        return
    audit = trainer.audit
    if audit is None:
        yield Finding("stop", "rollout: has no token that counts", "a larger max_completion_length")
        return
    said = (
        f"μ against π: mean |log π − log μ| {audit.mean:.2g} over {audit.tokens} tokens, threshold {audit.threshold:g}"
    )
    if stopped is None:
        yield Finding("ok", said)
    else:
        _, *causes = str(stopped).split("\n")
        yield Finding("stop", said, "; ".join(" ".join(cause.split()) for cause in causes))
    rows = trainer.token_log.take()
    yield from _log_probs(rows)
    yield from _updates(logs.rows)


def _fix_of(message: str) -> str | None:
    if message.startswith("reward of"):
        return "a finite number from the reward for every completion, or None for one that cannot be scored"
    if "the sampler's log-prob" in message:
        return "a sampler whose log-probs are finite numbers"
    return message.rpartition("; ")[2] if "no log-probs" in message else None


def _log_probs(rows: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Rounding to bf16 moves a log-prob of −10 by up to 0.03, which looks like a ratio off 1."""
    found = False
    for column, whose in (("behavior_logp", "the sampler's"), ("logp", "the trainer's")):
        values = torch.tensor([value for row in rows for value in row[column]])
        values = values[values < -1e-3]
        if len(values) >= 8 and torch.equal(values.bfloat16().float(), values):
            found = True
            yield Finding(
                "stop",
                f"log-probs: {whose} are in bf16, a step of up to {_bf16_step(values):.2g} nats",
                "the log-softmax, and what it is computed from, in fp32",
            )
    if rows and not found:
        yield Finding("ok", "log-probs: recorded by the sampler for every token, in fp32 on both sides")


def _bf16_step(values: torch.Tensor) -> float:
    return 2.0 ** (math.floor(math.log2(values.abs().max().item())) - 7)


def _updates(logs: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    if not logs:
        return
    for name in ("loss", "grad_norm"):
        for row in logs:
            if not math.isfinite(float(row.get(name, 0.0))):
                yield Finding(
                    "stop", f"update: {name} is {row[name]}", "a smaller learning_rate, or train_precision: fp32"
                )
                return
    divergence = logs[-1].get("divergence/mean")
    yield Finding(
        "ok",
        f"update: {len(logs)} made, gradient norm {float(logs[0].get('grad_norm', 0)):.2g}"
        + (f", |π − μ| {divergence:.2g} at the last" if divergence is not None else ""),
    )
