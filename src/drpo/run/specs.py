"""The parts of a recipe: a task, what is named with its hyperparameters, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from drpo.errors import UserError
from drpo.objectives import Correction, Objective, make_correction, make_objective
from drpo.rewards import REWARDS, Reward, load_reward, make_reward

Positive = Annotated[int, Field(ge=1, le=10**9)]
Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )  # fmt: skip


class TaskSpec(Strict):
    """Where problems come from, a built-in task or a .jsonl or .parquet file, and how a model is asked them."""

    train: Text
    """`arithmetic` or `addition`, made on the spot, or a file of problems."""
    heldout: Text | None = None
    """The same, for evaluation; none by default."""
    prompt: Text = "prompt"
    """The field of a row that holds the question: text, or the messages of a conversation that ends with the user's."""
    answer: Text = "answer"
    """The field that holds the reference answer."""
    template: Text = "{prompt}"
    """The text the model sees, with `{prompt}` where the question goes."""
    chat_template: bool = True
    """Whether the chat template of the model, if it has one, is put around that; if not, the model goes on with the text, and is saved without one."""
    stop: Text | None = None
    """What ends a completion in place of the model's own end: the text of one token, such as `"\\n"`."""

    @field_validator("train", "heldout")
    @classmethod
    def _absolute(cls, source: str | None) -> str | None:
        # A resolved recipe means the same from any folder.
        return str(Path(source).absolute()) if source and source.endswith((".jsonl", ".parquet")) else source

    @field_validator("template")
    @classmethod
    def _has_placeholder(cls, template: str) -> str:
        if "{prompt}" not in template:
            raise ValueError("expected text with {prompt} in it")
        return template

    def apply(self, tokenizer: Any, *configs: Any) -> None:
        """Have a model asked, and its completions ended, as the task says; saved with both, it is asked so later too.

        Args:
            tokenizer: of the model.
            configs: of the model and its generation.

        Raises:
            UserError: an end that is no token of the model.
        """
        if not self.chat_template:
            tokenizer.chat_template = None
        if self.stop is not None:
            ids = tokenizer(self.stop, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise UserError(f"task.stop: {self.stop!r} is {len(ids)} tokens of the model; expected one")
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0])
            for config in configs:
                config.eos_token_id = ids[0]


class _Named(Strict):
    """A name and, beside it, the hyperparameters of what it names; :meth:`make` makes it."""

    model_config = ConfigDict(extra="allow")

    name: str

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def make(self) -> Any:
        raise NotImplementedError

    @model_validator(mode="after")
    def _exists(self) -> Self:
        self.make()
        return self

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class ObjectiveSpec(_Named):
    """An objective of :data:`drpo.OBJECTIVES`."""

    def make(self) -> Objective:
        return make_objective(self.name, **self.hyperparameters)


class CorrectionSpec(_Named):
    """A correction of :data:`drpo.objectives.CORRECTIONS`."""

    def make(self) -> Correction:
        return make_correction(self.name, **self.hyperparameters)


class RewardSpec(_Named):
    """A reward of :data:`drpo.rewards.REWARDS` or a function as ``module:function``, and its weight in the sum."""

    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0

    def make(self) -> Reward:
        return load_reward(self.name, **self.hyperparameters)

    @model_validator(mode="after")
    def _exists(self) -> Self:
        # A function of the user's is not imported before the whole recipe has been read.
        if self.name in REWARDS:
            make_reward(self.name, **self.hyperparameters)
        return self


class LoRASpec(Strict):
    """Train low-rank adapters (peft) instead of all weights."""

    r: Positive = 16
    alpha: Positive = 32
    target_modules: Text | Annotated[list[Text], Field(min_length=1)] = "all-linear"
