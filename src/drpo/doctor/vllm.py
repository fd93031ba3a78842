"""Whether vLLM is there to sample, and returns the log-probs that its tokens were drawn at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from urllib.error import HTTPError
from urllib.request import urlopen

import torch

from drpo.doctor.findings import Finding
from drpo.run.recipe import Recipe
from drpo.trainer.config import DRPOConfig

_PATIENCE = 2
"""Seconds to wait for a server's answer."""


def check_vllm(recipe: Recipe, config: DRPOConfig) -> Iterator[Finding]:
    """Of a run whose rollouts vLLM samples: the package, and a GPU or a server that TRL can use."""
    if find_spec("vllm") is None:
        yield Finding(
            "stop",
            "trainer.use_vllm: vllm is not installed",
            "pip install 'trl[vllm]', or trainer.use_vllm: false to sample with Transformers",
        )
    if config.vllm_mode == "server":
        yield from _server(recipe, config)
    elif not torch.cuda.is_available():
        yield Finding(
            "stop", "trainer.use_vllm: vLLM beside the trainer needs a GPU", "trainer.use_vllm: false, or a GPU"
        )


def _server(recipe: Recipe, config: DRPOConfig) -> Iterator[Finding]:
    # It serves in the way that TRL needs: with the endpoints for weights, and log-probs after the temperature.
    serve = f"trl vllm-serve --model {recipe.model} in another process"
    base = config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"
    try:
        with urlopen(f"{base.rstrip('/')}/server_info?config_format=json", timeout=_PATIENCE) as answer:
            mode = json.load(answer)["vllm_config"]["model_config"]["logprobs_mode"]
    except HTTPError as error:
        # What TRL sends new weights through is behind the same switch.
        yield Finding(
            "stop",
            f"trainer.use_vllm: the server at {base} does not say how it is set up (/server_info: {error.code}); TRL needs "
            "its development endpoints",
            serve,
        )
    except OSError as error:
        yield Finding(
            "stop",
            f"trainer.use_vllm: no server answers at {base} ({getattr(error, 'reason', error)})",
            f"{serve}, or trainer.vllm_mode: colocate",
        )
    except (ValueError, LookupError, TypeError) as error:
        yield Finding(
            "warning",
            f"trainer.use_vllm: what answers at {base} is no vLLM server that TRL knows ({type(error).__name__}: {error})",
            serve,
        )
    else:
        if mode != "processed_logprobs" and config.temperature != 1:
            yield Finding(
                "stop",
                f"trainer.use_vllm: the server at {base} returns {mode}, log-probs at temperature 1, and tokens are drawn at "
                f"{config.temperature:g}",
                serve,
            )
