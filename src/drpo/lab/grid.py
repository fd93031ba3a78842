"""Which runs answer which question: settings, arms, learning rates and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drpo.errors import UserError
from drpo.lab.models import Architecture, ProblemSet
from drpo.lab.tasks import TASKS
from drpo.registry import unknown_name
from drpo.run.recipe import Recipe


@dataclass(frozen=True)
class Setting:
    """What a comparison is made in: a base model, a task and the precisions of rollout and training.

    Args:
        name: short, for tables.
        description: which of the paper's settings it mirrors.
        architecture: of the base model.
        task: of :data:`drpo.lab.tasks.TASKS`.
        train_precision: as in a recipe.
        rollout_precision: as in a recipe; None samples as training computes.
        prompts: of a rollout, each with 8 completions.
        train: which of the base model's problems are trained on.
        heldout: on which of them accuracy is measured.
    """

    name: str
    description: str
    architecture: Architecture = "dense"
    task: str = "arithmetic"
    train_precision: str = "fp32"
    rollout_precision: str | None = None
    prompts: int = 32
    train: ProblemSet = "train"
    heldout: ProblemSet = "heldout"

    @property
    def base(self) -> str:
        """The name of the base model, which settings may share."""
        return f"{self.architecture}-{self.task}"


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("fp32", "a dense model, sampler and trainer alike to rounding"),
        Setting("bf16", "paper setting 1: a dense model in BF16", train_precision="bf16"),
        Setting("fp8-rollout", "FP8 rollout, BF16 training, dense", train_precision="bf16", rollout_precision="fp8"),
        Setting("moe-bf16", "paper setting 2: a mixture of experts in BF16", "moe", train_precision="bf16"),
        Setting(
            "moe-fp8-rollout",
            "paper setting 3: the same with FP8 rollout",
            "moe",
            train_precision="bf16",
            rollout_precision="fp8",
        ),
        Setting("moe-fp8", "paper setting 4: the same with FP8 rollout and training", "moe", train_precision="fp8"),
        Setting(
            "sanity",
            "paper setting 6: problems that the base model solves now and then, measured on themselves",
            train_precision="bf16",
            train="solvable",
            heldout="solvable",
        ),
        Setting("sorting", "fp32 on longer solutions", task="sorting"),
        Setting("smollm2", "a real model of 135 million parameters in FP32", "smollm2", task="addition", prompts=16),
    )
}


@dataclass(frozen=True)
class Arm:
    """An objective with its hyperparameters, under one name."""

    name: str
    objective: str
    hyperparameters: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def _drpo(delta: float) -> Arm:
    return Arm(f"drpo({delta:g})", "drpo", {"delta": delta})


def _dppo(delta: float) -> Arm:
    return Arm(f"dppo_tv({delta:g})", "dppo_tv", {"delta": delta})


PENALTIES = ("drpo_kl", "drpo_tv", "drpo_k3")
"""Of whom β takes the place of 1/δ."""

DELTAS = (0.05, 0.1, 0.15, 0.2, 0.4, 1.0, 2.5, 12.5)

ARMS = {
    arm.name: arm
    for arm in (
        Arm("pg", "pg"),
        Arm("ppo", "ppo", {"clip_low": 0.2, "clip_high": 0.28}),
        Arm("spo", "spo", {"epsilon": 12.5}),
        *map(_dppo, DELTAS),
        *map(_drpo, DELTAS),
        Arm("mask_drpo", "mask_drpo", {"delta": 0.15}),
        Arm("cispo", "cispo"),
        Arm("gspo", "gspo", options={"aggregation": "seq-mean-token-mean"}),
        Arm("drpo_unweighted", "drpo_unweighted", {"delta": 0.2}),
        *(Arm(f"{name}({beta:g})", name, {"beta": beta}) for name in PENALTIES for beta in (1 / 12.5, 1 / 0.2)),
        Arm("dppo_tv(0.15), anchor old", "dppo_tv", {"delta": 0.15}, {"anchor": "old"}),
        Arm("drpo(0.2), anchor old", "drpo", {"delta": 0.2}, {"anchor": "old"}),
    )
}

CORE = ("pg", "ppo", "spo", "dppo_tv(0.15)", "drpo(0.05)", "drpo(0.2)", "drpo(12.5)")
LEARNING_RATES = (5e-5, 1e-4, 1.4e-4, 2e-4, 3e-4)
UPDATES = (4, 16, 32)
REAL_RATES = (1e-5, 3e-5)
"""Of the real model, whose weights are larger in number and smaller."""


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    Args:
        setting: of :data:`SETTINGS`.
        arm: of :data:`ARMS`.
        learning_rate: constant.
        updates: optimizer steps a rollout, on disjoint parts of it.
        lag: rollouts between the weights that sample and those that train.
        seed: of everything that is drawn.
        rollouts: how long it is.
    """

    setting: str
    arm: str
    learning_rate: float
    updates: int = 16
    lag: int = 0
    seed: int = 0
    rollouts: int = 60

    def recipe(self, folder: Path) -> Recipe:
        """The recipe of the run.

        Args:
            folder: of the lab, with the base models and their problems.
        """
        setting, arm = SETTINGS[self.setting], ARMS[self.arm]
        base = folder / "models" / setting.base
        fields: dict[str, Any] = {
            "model": str(base / "model"),
            "task": {"train": str(base / f"{setting.train}.jsonl"), "heldout": str(base / f"{setting.heldout}.jsonl")},
            "reward": "exact_answer",
            "objective": {"name": arm.objective, **arm.hyperparameters},
            "rollouts": self.rollouts,
            "prompts_per_rollout": setting.prompts,
            "num_generations": 8,
            "updates_per_rollout": self.updates,
            "learning_rate": self.learning_rate,
            "max_completion_length": TASKS[setting.task].longest,
            "train_precision": setting.train_precision,
            "rollout_precision": setting.rollout_precision,
            "rollout_lag": self.lag,
            "evaluate_every": max(1, self.rollouts // 12),
            "checkpoint_every": self.rollouts,
            "heldout_problems": 100,
            "heldout_samples": 2,
            "seed": self.seed,
            "audit_threshold": 1.0,
            "trainer": {"gradient_checkpointing": False},
            **arm.options,
        }
        return Recipe.model_validate(fields)


def grid(
    settings: Iterable[str],
    arms: Iterable[str],
    learning_rates: Iterable[float],
    updates: Iterable[int] = (16,),
    lags: Iterable[int] = (0,),
    seeds: Iterable[int] = range(3),
    rollouts: int = 60,
) -> list[Run]:
    """Every combination, a seed of all of them before the next: what is cut short is still balanced."""
    return [
        Run(setting, arm, learning_rate, count, lag, seed, rollouts)
        for seed, setting, learning_rate, count, lag, arm in itertools.product(
            seeds, settings, learning_rates, updates, lags, arms
        )
    ]


PAPER_SETTINGS = ("bf16", "moe-bf16", "moe-fp8-rollout", "moe-fp8", "sanity", "sorting")
TUNING_RATES = (5e-5, 1e-4, 2e-4)
COMPARED = tuple(name for name in CORE if name != "drpo(0.05)")
BESIDE = ("drpo(0.05)", "mask_drpo", "cispo", "gspo")
"""Arms that the comparison gives fewer seeds."""
CONTROLS = ("ppo", "dppo_tv(0.15)", "drpo(0.2)")
ABLATIONS = (
    *("mask_drpo", "cispo", "gspo", "drpo_unweighted"),
    *(f"{name}({beta:g})" for name in PENALTIES for beta in (0.08, 5)),
)

Areas = Mapping[Run, float]
"""The mean accuracy over each run that there is; 0 of one that failed."""
Plan = Callable[[Areas], Sequence[Run]]


def tuned(setting: str, areas: Areas) -> list[Run]:
    """A comparison of arms, each at the learning rate that suits it.

    Seed 0 of every arm runs at each of the same learning rates. Once it has, other seeds, which had no part in the
    choice, run at the best of them: five of the arms compared, three of those beside.

    Args:
        setting: of :data:`SETTINGS`.
        areas: of what has run so far.
    """
    runs = grid((setting,), (*COMPARED, *BESIDE), TUNING_RATES, seeds=range(1))
    for arm in (*COMPARED, *BESIDE):
        rate = best_rate(setting, arm, areas)
        if rate is not None:
            runs += grid((setting,), (arm,), (rate,), seeds=range(1, 6 if arm in COMPARED else 4))
    return sorted(runs, key=lambda run: run.seed)


def best_rate(setting: str, arm: str, areas: Areas) -> float | None:
    """The learning rate at which seed 0 of an arm had the highest mean accuracy; None until it has run at each."""
    candidates = grid((setting,), (arm,), TUNING_RATES, seeds=range(1))
    if not all(run in areas for run in candidates):
        return None
    return max(candidates, key=areas.__getitem__).learning_rate


def _every_setting(areas: Areas) -> list[Run]:
    return [run for setting in PAPER_SETTINGS for run in tuned(setting, areas)]


def _paper(areas: Areas) -> list[Run]:
    return list(dict.fromkeys(itertools.chain(*(PRESETS[name](areas) for name in QUESTIONS))))


PRESETS: dict[str, Plan] = {
    "smoke": lambda _: grid(("fp32", "bf16"), ("pg", "ppo", "drpo(0.2)"), (2e-4,), seeds=range(2), rollouts=24),
    "demo": lambda _: grid(("fp32",), ("pg", "drpo(0.2)"), (2e-4,), seeds=range(1), rollouts=30),
    "core": lambda _: grid(("fp32",), CORE, LEARNING_RATES[1:4], seeds=range(5)),
    "settings": _every_setting,
    "map": lambda _: grid(("bf16",), CORE, LEARNING_RATES, UPDATES),
    "map-low-precision": lambda _: grid(("moe-fp8-rollout",), CORE, LEARNING_RATES, UPDATES),
    "real": lambda _: grid(
        ("smollm2",), ("pg", "ppo", "dppo_tv(0.15)", "drpo(0.2)", "drpo(12.5)"), REAL_RATES, updates=(8,), rollouts=24
    ),
    # Seeds of their own: a base model is taught again where there is none, and differs between kinds of CPU, so that the
    # controls have to run beside the ablations.
    "arms": lambda _: grid(("fp32",), (*CONTROLS, *ABLATIONS), LEARNING_RATES[2:4], seeds=range(10, 13)),
    # In fp32 the two anchors are one to rounding.
    "anchors": lambda _: grid(
        ("fp8-rollout",),
        [f"{arm}{anchor}" for arm in CONTROLS[1:] for anchor in ("", ", anchor old")],
        LEARNING_RATES[2:4],
        seeds=range(10, 13),
    ),
    "delta": lambda _: grid(
        ("fp32",), [f"{kind}({delta:g})" for kind in ("dppo_tv", "drpo") for delta in DELTAS], (1.4e-4,), seeds=range(5)
    ),
    "staleness": lambda _: [
        *grid(("bf16",), CORE, (1e-4,), (1, 2, 4, 8, 16, 32)),
        *grid(("bf16",), CORE, (1e-4,), (4,), lags=(1, 4, 16)),
    ],
    "paper": _paper,
}
QUESTIONS = ("core", "settings", "map", "delta", "arms", "anchors", "staleness", "real", "map-low-precision")
"""The presets that ``paper`` is made of, in the order in which they run."""


def plan_of(preset: str) -> Plan:
    """The runs of a preset, given the results so far.

    Raises:
        UserError: no preset of that name.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset: {unknown_name('preset', preset, PRESETS)}")
    return PRESETS[preset]


def only(settings: Sequence[str], plan: Plan) -> Plan:
    """A plan without the runs of other settings.

    Raises:
        UserError: no setting of a name.
    """
    for name in settings:
        if name not in SETTINGS:
            raise UserError(f"--setting: {unknown_name('setting', name, SETTINGS)}")
    return lambda areas: [run for run in plan(areas) if run.setting in settings]
