"""What a recipe asks for, as numbers that can be judged: objective, anchor, updates, thresholds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from drpo.doctor.findings import Finding
from drpo.rollout.audit import APPROXIMATE_THRESHOLD
from drpo.run.recipe import Recipe
from drpo.trainer.config import DRPOConfig

_ANCHORS = {
    "sampler": "the sampler, μ: its log-probs as the tokens were drawn",
    "old": "the trainer's old policy, π_old, scored once more when a rollout begins",
}


_ROUNDING = 1e-5
"""Nats; ten times what two computations of one log-prob in fp32 differ by."""


def check_objective(recipe: Recipe) -> Iterator[Finding]:
    """Which objective, and whether its trust region has an edge."""
    objective = recipe.objective.make()
    values = ", ".join(f"{name} = {value:g}" for name, value in asdict(objective).items())
    delta = getattr(objective, "delta", 0)
    if recipe.objective.name in ("drpo", "mask_drpo") and delta >= 1:
        low, high = objective.weight_bounds
        yield Finding(
            "warning",
            f"objective: delta = {delta:g} confines the gradient weight to [{low:.3g}, {high:.3g}]: it never turns corrective",
            "objective.delta: 0.2, if the edge of the trust region is to be reached",
        )
    else:
        yield Finding("ok", f"objective: {type(objective).__name__}({values})")
    if recipe.advantage == "mean-std":
        yield Finding(
            "warning",
            "advantage: mean-std divides advantages by their group's standard deviation; the paper centres them only",
            "advantage: mean",
        )


def check_anchor(recipe: Recipe, config: DRPOConfig | None) -> Iterator[Finding]:
    """What the ratio is taken against, and whether anything makes up for what that leaves out."""
    anchor = recipe.anchor or recipe.objective.make().anchor
    lower = recipe.rollout_precision not in (None, recipe.train_precision)
    gaps = [
        what
        for applies, what in (
            (lower, f"rollouts are in {recipe.rollout_precision}"),
            (config is not None and config.use_vllm, "vLLM samples"),
            (recipe.rollout_lag, f"samples are {recipe.rollout_lag} rollouts old"),
        )
        if applies
    ]
    if anchor == "old" and gaps and recipe.correction is None:
        yield Finding(
            "warning",
            f"anchor: {_ANCHORS[anchor]}, but {' and '.join(gaps)}: nothing makes up for π_old/μ",
            "correction: token_truncate, or anchor: sampler",
        )
    else:
        correction = f", times {recipe.correction.name} of π_old/μ" if recipe.correction else ""
        yield Finding("ok", f"anchor: {_ANCHORS[anchor]}{correction}")


def check_updates(recipe: Recipe, config: DRPOConfig) -> Iterator[Finding]:
    """How far off-policy a rollout gets, with the numbers that TRL derives it from."""
    prompts, samples = recipe.prompts_per_rollout, recipe.prompts_per_rollout * recipe.num_generations
    update = samples // recipe.updates_per_rollout
    said = (
        f"updates: {prompts} prompts x {recipe.num_generations} = {samples} samples a rollout, {recipe.updates_per_rollout} "
        f"updates of {update} (TRL: per_device_train_batch_size {config.per_device_train_batch_size} x "
        f"gradient_accumulation_steps {config.gradient_accumulation_steps}, steps_per_generation {config.steps_per_generation})"
    )
    if recipe.updates_per_rollout == 1 and not recipe.rollout_lag:
        yield Finding(
            "warning",
            f"{said}: π is what sampled, up to rounding, and a trust region has nothing to bound",
            f"updates_per_rollout: {next(n for n in (4, 2, samples) if samples % n == 0)}",
        )
    else:
        yield Finding("ok", said)


def check_threshold(recipe: Recipe) -> Iterator[Finding]:
    """Whether the audit of the run itself can fail, and can pass."""
    threshold = recipe.audit_threshold
    if threshold is None:
        return
    if threshold > APPROXIMATE_THRESHOLD:
        yield Finding(
            "warning",
            f"audit: audit_threshold {threshold:g} nats lets a wrong sampler pass; bf16 engines differ by 0.01 to 0.03",
            f"no audit_threshold, or at most {APPROXIMATE_THRESHOLD:g}",
        )
    elif threshold < _ROUNDING:
        yield Finding(
            "warning",
            f"audit: audit_threshold {threshold:g} nats is less than rounding in fp32, about 1e-6",
            f"no audit_threshold, or at least {_ROUNDING:g}",
        )
