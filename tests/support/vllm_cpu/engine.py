"""The trainer's side: a vLLM process as the ``rollout_func`` of a trainer."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PYTHON = Path(__file__).parents[3] / ".venv-vllm" / "bin" / "python"
"""Of the environment that ``make .venv-vllm/installed`` makes."""

SERVER = Path(__file__).with_name("server.py")

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""What vLLM calls the precisions that it runs in here."""


class Engine:
    """vLLM in a process of its own environment; its :meth:`rollout` samples for a trainer, by the trainer's weights of now.

    Args:
        model: a folder that Transformers saved.
        dtype: of weights and activations, ``float32`` or ``bfloat16``.
        syncs: whether it takes the trainer's weights before each rollout; without, it samples by those it began with.
    """

    def __init__(self, model: str, dtype: str = "float32", syncs: bool = True) -> None:
        self._syncs = syncs
        self._rollouts = 0
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [PYTHON, SERVER, model, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()
        self._log.close()

    def ask(self, method: str, request: Any) -> dict[str, Any]:
        """The server's answer.

        Raises:
            RuntimeError: it has died; with the end of what it said.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({method: request}), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"vLLM has died:\n{self._log.read()[-3000:]}") from error

    @property
    def version(self) -> str:
        """Of vLLM."""
        return self.ask("version", {})["version"]

    def load(self, model: Any) -> None:
        """Take a model's weights."""
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self.ask("load", folder)

    def rollout(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """What TRL wants of a ``rollout_func``: ids of prompts and completions, and log-probs as sampled."""
        if self._syncs:
            self.load(trainer.accelerator.unwrap_model(trainer.model))
        tokenizer, args = trainer.processing_class, trainer.args
        prompt_ids = tokenizer(prompts)["input_ids"]
        # Each rollout's rows have seeds of their own.
        seed = args.seed + self._rollouts * len(prompts)
        self._rollouts += 1
        asked = {
            "prompt_ids": prompt_ids,
            "stop_ids": [tokenizer.eos_token_id],
            "temperature": args.temperature,
            "max_tokens": args.max_completion_length,
            "seed": seed,
            "top_p": args.top_p,
            "top_k": args.top_k,
        }
        return {"prompt_ids": prompt_ids, **self.ask("generate", asked)}
