"""Time to a held-out accuracy: DRPOTrainer against TRL's GRPOTrainer with the same settings.

The built-in model to 0.9 on the built-in task; and, where SMOLLM2 names its folder, SmolLM2-135M-Instruct to 0.7 on
sums (three seeds: one of TRL's takes ten minutes), in bf16 where that is faster on this machine. Model, problems,
rollouts, learning rate and updates per rollout are the recipe's for both; each has its own loss (DRPO with δ = 0.2;
TRL's default). Seconds are those of training, evaluations left out; accuracy is sampled, every few rollouts, and read
between two by a straight line.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import track
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks import tables
from drpo.recipes import recipe_paths
from drpo.run.build import load_problems, make_trainer, settle_precision
from drpo.run.recipe import BUILTIN_RECIPE, Recipe, load_recipe

PACKAGES = ("torch", "transformers", "trl")
KINDS = ("TRL", "drpo")


@dataclass(frozen=True)
class Task:
    """A recipe, the accuracy whose time is taken, after how many rollouts it is looked for each time, and seeds of training."""

    recipe: Path
    target: float
    every: int
    seeds: tuple[int, ...]
    settings: tuple[str, ...] = ()


def tasks() -> dict[str, Task]:
    """By the name of the model."""
    folder = os.environ.get("SMOLLM2")
    sums = Task(recipe_paths()["smollm2-addition"], 0.7, 3, (0, 1, 2), (f"model={folder}", "train_precision=auto"))
    return {"built-in": Task(BUILTIN_RECIPE, 0.9, 5, (0, 1, 2, 3, 4))} | ({"SmolLM2-135M": sums} if folder else {})


class Clock(TrainerCallback):
    """Seconds of training so far and held-out accuracy, every few updates; ends at the target."""

    def __init__(self, accuracy: Any, every: int, target: float) -> None:
        self.curve: list[tuple[float, float]] = []
        self._accuracy, self._every, self._target = accuracy, every, target
        self._seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._measure(0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._every == 0:
            self._measure(self._seconds + time.perf_counter() - self._began)
            control.should_training_stop = self.curve[-1][1] >= self._target

    def _measure(self, seconds: float) -> None:
        self._seconds = seconds
        self.curve.append((seconds, self._accuracy()))
        self._began = time.perf_counter()


def accuracy_of(model: Any, tokenizer: Any, problems: list[Any], reward: Any, recipe: Recipe) -> float:
    """As sampled by Transformers, the same for both trainers; the random numbers of training stay as they were."""
    asked = [problem for problem in problems for _ in range(recipe.heldout_samples)]
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(recipe.seed)
        inputs = tokenizer(
            [problem.prompt for problem in asked], return_tensors="pt", padding=True, padding_side="left"
        )
        sequences = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=recipe.max_completion_length
        )
    model.train()
    texts = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = reward(prompts=None, completions=texts, answer=[problem.answer for problem in asked])
    return sum(score >= 1 for score in scores) / len(scores)


def curve(task: Task, recipe: Recipe, kind: str) -> list[tuple[float, float]]:
    """(seconds, accuracy) over one run."""
    reward = recipe.make_reward()
    problems = load_problems(recipe, "train", recipe.rollouts * recipe.prompts_per_rollout)
    heldout = load_problems(recipe, "heldout", recipe.heldout_problems)
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = make_trainer(recipe, reward, problems, [], folder, 1)
        if kind == "TRL":
            trainer = _trl(trainer, reward, folder)
        clock = Clock(
            lambda: accuracy_of(trainer.model, trainer.processing_class, heldout, reward, recipe),
            task.every * recipe.updates_per_rollout,
            task.target,
        )
        trainer.add_callback(clock)
        trainer.train()
    return clock.curve


def _trl(ours: Any, reward: Any, folder: str) -> GRPOTrainer:
    """TRL's trainer with our trainer's model, data and settings."""
    names = (
        "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_generations",
        "max_completion_length", "max_steps", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm",
        "seed", "bf16", "gradient_checkpointing", "logging_steps", "report_to", "use_cpu", "disable_tqdm", "adam_beta2",
        "shuffle_dataset", "save_strategy", "warmup_steps", "optim",
    )  # fmt: skip
    settings = {name: getattr(ours.args, name) for name in names}
    return GRPOTrainer(
        model=ours.model,
        reward_funcs=reward,
        args=GRPOConfig(str(Path(folder) / "trl"), **settings),
        train_dataset=ours.train_dataset,
        processing_class=ours.processing_class,
    )


def seconds_to(target: float, points: list[tuple[float, float]]) -> float | None:
    for (before, low), (after, high) in pairwise(points):
        if high >= target:
            return before + (after - before) * (target - low) / (high - low)
    return None


def run(command: str) -> list[dict[str, Any]]:
    provenance = tables.provenance(command, PACKAGES)
    rows = []
    for name, task in tasks().items():
        settled = settle_precision(load_recipe(task.recipe, list(task.settings)))
        for seed, kind in track(list(product(task.seeds, KINDS)), description=f"{name} to {task.target}"):
            points = curve(task, settled.model_copy(update={"seed": seed}), kind)
            reached = seconds_to(task.target, points)
            rows += [
                {
                    "model": name,
                    "target": task.target,
                    "precision": settled.train_precision,
                    "trainer": kind,
                    "seed": seed,
                    "seconds": f"{seconds:.2f}",
                    "accuracy": accuracy,
                    "seconds_to_target": "" if reached is None else f"{reached:.2f}",
                    **provenance,
                }
                for seconds, accuracy in points
            ]
    return rows


def ratios(rows: Sequence[dict[str, str]]) -> list[float]:
    """TRL's time to the target over ours, for each seed in which both reach it."""
    reached = {(row["trainer"], row["seed"]): row["seconds_to_target"] for row in rows}
    pairs = [[reached[kind, seed] for kind in KINDS] for seed in dict.fromkeys(row["seed"] for row in rows)]
    return [float(trl) / float(ours) for trl, ours in pairs if trl and ours]


def plot(rows: list[dict[str, str]]) -> Figure:
    """Accuracy over seconds, a panel a model and a line a run."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(6.5 * len(models), 3.4), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        of_model = [row for row in rows if row["model"] == model]
        for kind, style, color in zip(KINDS, ("--", "o-"), ("black", "#2b5c8a"), strict=True):
            for number, seed in enumerate(dict.fromkeys(row["seed"] for row in of_model)):
                line = [row for row in of_model if row["trainer"] == kind and row["seed"] == seed]
                points = [[float(row[name]) for row in line] for name in ("seconds", "accuracy")]
                axis.plot(*points, style, color=color, markersize=3, label=None if number else kind)
        target, times = of_model[0]["target"], ratios(of_model)
        axis.axhline(float(target), color="grey", linewidth=0.8)
        axis.set(xlabel="seconds of training", ylabel="held-out accuracy")
        axis.set_title(
            f"{model} to {target}: {statistics.median(times):.2f} times sooner (median of {len(times)} seeds)"
        )
        axis.legend()
    return figure
