"""A recipe: everything a run is made of, in one YAML file, validated as a whole before anything else happens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, ValidationError, field_validator, model_validator

from drpo.advantage import Advantage
from drpo.aggregation import Aggregation
from drpo.data.problems import BUILTIN_MODELS
from drpo.errors import UserError
from drpo.objectives import Anchor, anchored
from drpo.precision import RolloutPrecision, TrainPrecision
from drpo.recipes import find_recipe, recipe_paths
from drpo.redact import find_secret
from drpo.rewards import REWARD_TIMEOUT, Reward, Weighted
from drpo.run.mistakes import first_mistake
from drpo.run.options import REFUSED
from drpo.run.specs import CorrectionSpec, LoRASpec, ObjectiveSpec, Positive, RewardSpec, Strict, TaskSpec, Text
from drpo.run.yaml import dump, parse

BUILTIN_RECIPE = recipe_paths()["arithmetic"]

LARGEST = 100_000
"""Bytes of a recipe. The longest here has 2,000; more is another file, which would be parsed for minutes."""


def _as_list(value: Any) -> Any:
    if not isinstance(value, (str, dict, list)):
        raise ValueError(f"got {value!r}; expected a name, a mapping with name and options, or a list of them")
    return value if isinstance(value, list) else [value]


class Recipe(Strict):
    """A training run.

    Fields without a default have to be in the recipe; those that are None leave the choice to
    :class:`drpo.DRPOConfig`, any other option of which can be given in ``trainer``.
    """

    model: Text
    """The built-in `arithmetic`, a folder with a model, or a name on the hub."""
    task: TaskSpec
    """Problems to train on and held-out ones; see the fields of a task."""
    reward: Annotated[list[RewardSpec], Field(min_length=1), BeforeValidator(_as_list)]
    """A name, a mapping with `name` and options, `module:function`, or a list of them with weights."""
    objective: ObjectiveSpec
    """A name of `drpo objectives`, or a mapping with `name` and its hyperparameters."""
    rollouts: Positive
    """How many rollouts the run has."""
    prompts_per_rollout: Positive
    """Prompts sampled from in a rollout."""
    num_generations: Annotated[int, Field(ge=2, le=10**9)]
    """Completions of each prompt: its group."""
    updates_per_rollout: Positive
    """Optimizer steps on each rollout, on disjoint parts of it."""
    learning_rate: Annotated[float, Field(gt=0, le=1e38)]
    """The optimizer's, constant unless `trainer.lr_scheduler_type` says otherwise."""
    max_completion_length: Positive
    """Longest completion, in tokens."""
    micro_batch_size: Positive | None = None
    """Samples of a forward pass and process; the whole update by default."""
    temperature: Annotated[float, Field(ge=1e-3, le=1000)] | None = None
    """Sampling temperature; log-probs are of the logits divided by it."""
    aggregation: Aggregation | None = None
    """How token losses become one number: verl's names, or `prompt-mean`, the mean over the tokens of a prompt's completions, averaged over prompts."""
    horizon: Positive | None = None
    """The length that `seq-mean-token-sum-norm` divides by, in tokens."""
    advantage: Advantage | None = None
    """How rewards become advantages within a group."""
    anchor: Anchor | None = None
    """The policy that the ratio is taken against; the objective's own by default."""
    correction: CorrectionSpec | None = None
    """A weight by π_old/μ, for an objective anchored on the old policy, or a mask, for any."""
    audit_threshold: Annotated[float, Field(gt=0)] | None = None
    """The mean |log π − log μ| before the first update, in nats, above which training stops."""
    train_precision: TrainPrecision | Literal["auto"] = "fp32"
    """The precision of the training forward and backward pass; weights stay in fp32. `auto` is bf16 where a pass of the model is measured to be faster in it by a tenth, else fp32; the run's folder says which."""
    rollout_precision: RolloutPrecision | None = None
    """The precision that samples; the training precision by default."""
    rollout_lag: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Rollouts between the weights that sample and those that train."""
    reward_timeout: Annotated[float, Field(gt=0, le=10**9)] | None = REWARD_TIMEOUT
    """Seconds that a call of the reward may take; training stops at one that takes longer. No limit if null."""
    lora: LoRASpec | None = None
    """Low-rank adapters (`r`, `alpha`, `target_modules`) instead of all weights."""
    evaluate_every: Positive = 10
    """Rollouts between held-out evaluations."""
    checkpoint_every: Positive = 25
    """Rollouts between checkpoints."""
    stop_on_collapse: Positive | None = None
    """Rollouts in a row with a reward below half of its best (if that is above 0), after which training stops; the checkpoint with the best reward before it is kept."""
    record_rollouts: bool = False
    """Whether `rollouts.jsonl` is written."""
    heldout_problems: Annotated[int, Field(ge=1, le=100_000)] = 250
    """Held-out problems of an evaluation, at most."""
    heldout_samples: Positive = 1
    """Completions of each held-out problem."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed of everything that is drawn."""
    trainer: dict[str, JsonValue] = Field(default_factory=dict)
    """Any further option of `DRPOConfig`, TRL's and Transformers' among them."""

    def make_reward(self) -> Reward:
        """The reward of the run: the only one, or the weighted sum of several.

        Raises:
            UserError: a function that cannot be loaded.
        """
        if len(self.reward) == 1 and self.reward[0].weight == 1:
            return self.reward[0].make()
        return Weighted([(spec.make(), spec.weight) for spec in self.reward])

    @field_validator("model")
    @classmethod
    def _absolute_folder(cls, model: str) -> str:
        is_folder = model not in BUILTIN_MODELS and "\0" not in model and os.path.isdir(model)
        return str(Path(model).absolute()) if is_folder else model

    @field_validator("trainer")
    @classmethod
    def _not_ours(cls, trainer: dict[str, Any]) -> dict[str, Any]:
        for name in trainer:
            if name in cls.model_fields:
                raise ValueError(f"has {name!r}, which belongs at the top of the recipe")
            if name in REFUSED:
                raise ValueError(f"has {name!r}; {REFUSED[name]}")
        return trainer

    @model_validator(mode="before")
    @classmethod
    def _holds_no_secret(cls, document: Any) -> Any:
        if field := find_secret(document):
            raise ValueError(
                f"{field}: holds a secret, which would be written to the run folder; expected a token in the environment "
                "(HF_TOKEN), a URL's password in ~/.netrc"
            )
        return document

    @model_validator(mode="after")
    def _is_anchored(self) -> Self:
        anchored(self.objective.make(), self.anchor, self.correction and self.correction.make())
        return self

    @model_validator(mode="after")
    def _copies_a_whole_policy(self) -> Self:
        is_exact = self.rollout_precision == self.train_precision == "fp32"
        copying = {"rollout_precision": self.rollout_precision and not is_exact, "rollout_lag": self.rollout_lag}
        names = [name for name, is_set in copying.items() if is_set]
        for field, is_used, what in (
            ("lora", self.lora is not None, "adapters"),
            ("trainer.fsdp", self.trainer.get("fsdp"), "weights that are sharded over processes"),
        ):
            if names and is_used:
                raise ValueError(
                    f"{field}: {' and '.join(names)} would sample from a copy of the policy, which does not work with "
                    f"{what}; expected no {' and no '.join(names)}, or no {field}"
                )
        return self

    @model_validator(mode="after")
    def _divides(self) -> Self:
        samples = self.prompts_per_rollout * self.num_generations
        arithmetic = (
            f"prompts_per_rollout {self.prompts_per_rollout} x num_generations {self.num_generations} = {samples} samples, "
            f"updates_per_rollout {self.updates_per_rollout}"
        )
        if samples % self.updates_per_rollout:
            raise ValueError(f"updates_per_rollout: {arithmetic}: expected a divisor of {samples}")
        update = samples // self.updates_per_rollout
        if self.micro_batch_size is not None and update % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: {arithmetic} = {update} samples an update: expected a divisor of {update}, got {self.micro_batch_size}"
            )
        if (self.horizon is not None) != (self.aggregation == "seq-mean-token-sum-norm"):
            raise ValueError("horizon: expected with aggregation seq-mean-token-sum-norm, and only with it")
        return self


def _override(document: dict[str, Any], assignment: str) -> None:
    path, separator, text = assignment.partition("=")
    if not separator or not path:
        raise UserError(f"--set {assignment}: expected key=value")
    value = parse(text, f"--set {assignment}")
    *parents, last = path.split(".")
    for parent in parents:
        if parent in ("objective", "correction", "reward") and isinstance(document.get(parent), str):
            document[parent] = {"name": document[parent]}
        document = document.setdefault(parent, {})
        if not isinstance(document, dict):
            raise UserError(f"--set {assignment}: {parent} has no fields of its own")
    document[last] = value


def load_recipe(path: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file, or the name of a recipe that comes with the package; the built-in recipe by default.
        overrides: ``key=value``, where a dotted key reaches into a mapping; they win over the file.

    Raises:
        UserError: naming the file and the field, the value, and what was expected.
    """
    where = str(path or "the built-in recipe")
    try:
        with (find_recipe(path) if path else BUILTIN_RECIPE).open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"{where}: has more than {LARGEST:,} bytes; expected a recipe")
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({error})") from error
    document = parse(text, where)
    if not isinstance(document, dict):
        raise UserError(
            f"{where}: is {'empty' if document is None else type(document).__name__}; expected a mapping of fields"
        )
    for assignment in overrides:
        _override(document, assignment)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        known = {"": Recipe.model_fields, "task": TaskSpec.model_fields, "lora": LoRASpec.model_fields}
        raise UserError(f"{where}: {first_mistake(error, known)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that :func:`load_recipe` reads back."""
    return dump(recipe.model_dump(mode="json"))
