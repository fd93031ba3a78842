"""What a recipe asks for, as numbers that can be judged: objective, anchor, updates, audit, problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from drpo.data.problems import Problem
from drpo.doctor.findings import Finding
from drpo.rollout.audit import APPROXIMATE_THRESHOLD
from drpo.run.checks import describe_overlap
from drpo.run.recipe import Recipe

if TYPE_CHECKING:
    from drpo.trainer.config import DRPOConfig

ANCHORS = {"sampler": "the sampler, μ", "old": "the trainer's old policy, π_old, scored when a rollout begins"}


def check_objective(recipe: Recipe) -> Iterator[Finding]:
    """Which objective, and whether its trust region has an edge."""
    yield from describe_objective(recipe.objective.make(), "objective: ", "objective.delta: 0.2")
    if recipe.advantage == "mean-std":
        yield Finding(
            "warning",
            "advantage: mean-std divides advantages by their group's standard deviation; the paper centers them only",
            "advantage: mean",
        )


def describe_objective(objective: Any, where: str, smaller: str) -> Iterator[Finding]:
    """An objective with its hyperparameters; a warning where δ leaves its trust region without an edge."""
    values = ", ".join(f"{name} = {value:g}" for name, value in asdict(objective).items())
    yield Finding("ok", f"{where}{type(objective).__name__}({values})")
    if type(objective).__name__ in ("DRPO", "MaskDRPO", "MaskDRPORegion") and objective.delta >= 1:
        low, high = objective.weight_bounds
        yield Finding(
            "warning",
            f"{where}delta = {objective.delta:g} confines the gradient weight to [{low:.3g}, {high:.3g}]: it never turns "
            "corrective",
            f"{smaller}, if the edge of the trust region is to be reached",
        )


def check_anchor(recipe: Recipe, config: DRPOConfig) -> Iterator[Finding]:
    """What the ratio is taken against, and whether anything makes up for what that leaves out."""
    anchor = recipe.anchor or recipe.objective.make().anchor
    reasons = (
        (recipe.rollout_precision not in (None, recipe.train_precision), f"rollouts are in {recipe.rollout_precision}"),
        (config.use_vllm, "vLLM samples"),
        (recipe.rollout_lag, f"samples are {recipe.rollout_lag} rollouts old"),
    )
    gaps = [reason for applies, reason in reasons if applies]
    if anchor == "old" and gaps and recipe.correction is None:
        yield Finding(
            "warning",
            f"anchor: {ANCHORS[anchor]}, but {' and '.join(gaps)}: nothing makes up for π_old/μ",
            "correction: token_truncate, or anchor: sampler",
        )
    else:
        correction = f", under {recipe.correction.name}" if recipe.correction else ""
        yield Finding("ok", f"anchor: {ANCHORS[anchor]}{correction}")


def check_off_policy(recipe: Recipe) -> Iterator[Finding]:
    """How far off-policy a rollout gets, and whether the run's own audit can fail."""
    samples = recipe.prompts_per_rollout * recipe.num_generations
    updates = recipe.updates_per_rollout
    yield Finding(
        "ok",
        f"updates: {recipe.prompts_per_rollout} prompts x {recipe.num_generations} = {samples} samples a rollout, {updates} "
        f"updates of {samples // updates}",
    )
    if updates == 1 and not recipe.rollout_lag:
        yield Finding(
            "warning",
            "updates: one a rollout: π is what sampled, up to rounding, and a trust region has nothing to bound",
            f"updates_per_rollout: {next(n for n in (4, 2, samples) if samples % n == 0)}",
        )
    if recipe.audit_threshold is not None and recipe.audit_threshold > APPROXIMATE_THRESHOLD:
        yield Finding(
            "warning",
            f"audit: audit_threshold {recipe.audit_threshold:g} nats lets a wrong sampler pass; bf16 engines differ by 0.01 "
            "to 0.03",
            f"no audit_threshold, or at most {APPROXIMATE_THRESHOLD:g}",
        )


def check_problems(recipe: Recipe, train: Sequence[Problem], heldout: Sequence[Problem]) -> Iterator[Finding]:
    """How many problems there are, and whether they are distinct and held out."""
    distinct = {problem.prompt for problem in train}
    yield Finding("ok", f"task: {len(train):,} problems, {len(heldout):,} held out")
    if len(distinct) < 0.9 * len(train):
        yield Finding(
            "warning",
            f"task.train: {len(train):,} rows hold {len(distinct):,} distinct prompts",
            "drpo data, which de-duplicates",
        )
    if overlap := describe_overlap(train, heldout):
        yield Finding(
            "warning",
            overlap,
            f"drpo data NAME --against {recipe.task.heldout}, which leaves them out",
        )
