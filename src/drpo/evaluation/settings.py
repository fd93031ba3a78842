"""What decides the numbers of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ENGINE_NAMES = ("transformers", "vllm")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of an evaluation.

    Args:
        model: a run folder, a built-in model, a folder or a name on the hub.
        data: .jsonl and .parquet files, or a built-in task.
        samples: completions of each problem.
        problems: at most so many of each file; None for all.
        asked_as: a run folder, a recipe or its name, after whose task the model is asked: ``template``,
            ``chat_template_kwargs``, ``chat_template`` and ``stop``; None for the run that trained the model, if there is one.
        template: the text the model sees, with ``{prompt}`` where the problem goes; None for that of the recipe, else
            the problem alone.
        chat_template_kwargs: what the chat template is told; None for what the recipe tells it.
        chat_template: whether the model's chat template is put around that, as the recipe says.
        stop: what ends a completion in place of the model's own end, as the recipe says.
        max_tokens: of a completion.
        batch_size: completions generated at once.
    """

    model: str
    data: tuple[str, ...]
    samples: int = 1
    problems: int | None = None
    reward: str = "math"
    asked_as: str | None = None
    template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: bool = True
    stop: str | None = None
    temperature: float = 1.0
    max_tokens: int = 2048
    batch_size: int = 64
    seed: int = 0
    engine: str = "transformers"
    precision: str = "fp32"


PROMPTING = ("template", "chat_template_kwargs", "chat_template", "stop")
"""What decides what a model is asked."""
