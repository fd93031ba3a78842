"""Sampling engines: each draws a completion from a seed of its own, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import transformers

from drpo.errors import UserError
from drpo.kernels.attention import use_cpu_sdpa
from drpo.pretrained import load_pretrained
from drpo.rollout.decoding import record_log_probs
from drpo.rollout.sampling import neutral_sampling
from drpo.run.checks import end_tokens
from drpo.run.specs import TaskSpec


@dataclass(frozen=True)
class Completion:
    """A sampled text.

    Args:
        ids: its tokens, the end token included.
        truncated: whether it was cut at the limit.
    """

    text: str
    ids: list[int]
    truncated: bool


class Engine(Protocol):
    """What samples completions."""

    tokenizer: Any

    @property
    def description(self) -> dict[str, str]:
        """Name, version and precision, as they go into the result."""
        ...

    def ask_as(self, task: TaskSpec) -> None:
        """Ask the model, and end its completions, as a task says, with or without a chat template."""
        ...

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        """Draw a completion of each prompt, which is token ids, from the seed beside it."""
        ...


class TransformersEngine:
    """Transformers' ``generate``.

    Args:
        model: a folder or a name on the hub.
        max_tokens: of a completion.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(self, model: str, max_tokens: int, temperature: float, precision: str) -> None:
        self._max_tokens, self._temperature, self._precision = max_tokens, temperature, precision
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        loaded, self.tokenizer = load_pretrained(model, dtype, field="MODEL", expected="a run folder")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        self._model = loaded.to(device).eval()
        use_cpu_sdpa(self._model)

    @property
    def description(self) -> dict[str, str]:
        return {
            "name": "transformers",
            "version": version("transformers"),
            "torch": torch.__version__,
            "precision": self._precision,
            "device": self._model.device.type,
        }

    def ask_as(self, task: TaskSpec) -> None:
        task.apply(self.tokenizer, self._model.generation_config)

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        inputs = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self._model.device)
        ends = end_tokens(self.tokenizer, self._model.generation_config)
        with neutral_sampling(self._model.generation_config), record_log_probs(self._model, seeds=seeds):
            generated = self._model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=self._temperature,
                max_new_tokens=self._max_tokens,
                eos_token_id=ends,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return [self._completion(row.tolist(), ends) for row in generated[:, inputs["input_ids"].shape[1] :]]

    def _completion(self, ids: list[int], ends: list[int]) -> Completion:
        length = next((place + 1 for place, token in enumerate(ids) if token in ends), None)
        text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
        return Completion(text, ids[:length], truncated=length is None)


class VLLMEngine:
    """vLLM, offline.

    Args:
        model: a folder or a name on the hub.
        max_tokens: of a completion.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(self, model: str, max_tokens: int, temperature: float, precision: str) -> None:
        if find_spec("vllm") is None:
            raise UserError("--engine vllm: vllm is not installed; pip install vllm, or --engine transformers")
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

        self._precision = precision
        neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}
        self._ends: dict[str, Any] = {}
        self._parameters = lambda seed: SamplingParams(
            temperature=temperature, max_tokens=max_tokens, seed=seed, **neutral, **self._ends
        )
        try:
            self._engine = LLM(model, dtype={"fp32": "float32", "bf16": "bfloat16"}[precision])
        except Exception as error:
            raise UserError(f"MODEL: vLLM cannot load {model!r} ({str(error)[:200]})") from error
        self.tokenizer: Any = self._engine.get_tokenizer()

    @property
    def description(self) -> dict[str, str]:
        return {"name": "vllm", "version": version("vllm"), "torch": torch.__version__, "precision": self._precision}

    def ask_as(self, task: TaskSpec) -> None:
        task.apply(self.tokenizer)
        if task.stop is not None:
            # vLLM knows the end from the model's files, in whose place this one is.
            self._ends = {"stop_token_ids": [self.tokenizer.eos_token_id], "ignore_eos": True}

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._engine.generate(inputs, [self._parameters(seed) for seed in seeds], use_tqdm=False)
        firsts = [output.outputs[0] for output in outputs]
        return [Completion(first.text, list(first.token_ids), first.finish_reason == "length") for first in firsts]


ENGINES: dict[str, type[TransformersEngine] | type[VLLMEngine]] = {
    "transformers": TransformersEngine,
    "vllm": VLLMEngine,
}
