"""vLLM over pipes: answers requests, a line of JSON each, on standard output; run by the Python of vLLM's environment.

{"generate": {"prompt_ids": [[5, 6]], "stop_ids": [1], "temperature": 1.0, "max_tokens": 20, "seed": 0, "top_p": 1.0, "top_k": 0}}
    → {"completion_ids": [[7, 1]], "logprobs": [[-0.3, -0.1]], "sampling_mask": [[[7, 2], [1]]]}, the last under a filter alone
{"version": {}} → {"version": "0.32.0"}
{"load": "FOLDER"} → {}, having taken the weights that Transformers saved there
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ |= {
    # The engine in this process: no workers to be left behind.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import vllm
from vllm import LLM, SamplingParams


class Server:
    def __init__(self, model: str, dtype: str) -> None:
        self._llm = LLM(
            model,
            dtype=dtype,
            # Those of what is sampled from, after the temperature.
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            skip_tokenizer_init=True,
            # What was computed with other weights is not to be used again.
            enable_prefix_caching=False,
            enforce_eager=True,
            max_model_len=256,
            max_logprobs=-1,
        )

    def generate(
        self,
        prompt_ids: list[list[int]],
        stop_ids: list[int],
        temperature: float,
        max_tokens: int,
        seed: int,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> dict[str, Any]:
        is_filtered = top_p < 1 or top_k > 0
        params = [
            SamplingParams(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                max_tokens=max_tokens,
                seed=seed + row,
                stop_token_ids=stop_ids,
                # Of all tokens: those that were filtered out have -inf. vLLM's own mask needs Triton.
                logprobs=-1 if is_filtered else 0,
                detokenize=False,
            )
            for row in range(len(prompt_ids))
        ]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        outputs = [output.outputs[0] for output in self._llm.generate(prompts, params, use_tqdm=False)]
        answer: dict[str, Any] = {
            "completion_ids": [list(output.token_ids) for output in outputs],
            "logprobs": [
                [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
                for output in outputs
            ],
        }
        if is_filtered:
            answer["sampling_mask"] = [
                [[token for token, one in step.items() if one.logprob > -math.inf] for step in output.logprobs]
                for output in outputs
            ]
        return answer

    def load(self, folder: str) -> dict[str, Any]:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._llm.apply_model(_pack_head)
        return {}


def _pack_head(model: Any) -> None:
    # The LM head computes with a packed copy of its weights, which is not made anew where they are the embedding's:
    # half of the policy would stay as it was.
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def main() -> None:
    # Libraries print; what they print goes to the log.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    server = Server(*sys.argv[1:])
    methods: dict[str, Callable[..., dict[str, Any]]] = {
        "generate": lambda request: server.generate(**request),
        "load": server.load,
        "version": lambda _: {"version": vllm.__version__},
    }
    for line in sys.stdin:
        ((method, request),) = json.loads(line).items()
        print(json.dumps(methods[method](request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
