"""A rollout backend that samples with Transformers: a server actor, the replica that starts it, the trainer's way to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from drpo.rollout.decoding import record_log_probs

GATHERED = 0.05
"""Seconds for which requests are gathered, to be sampled as one batch."""


def _name(replica_rank: int) -> str:
    return f"transformers_server_{replica_rank}"


@ray.remote
class Server:
    """Holds a model and completes prompts with it, requests that arrive together as one batch."""

    def __init__(self, path: str, max_tokens: int, seed: int) -> None:
        torch.manual_seed(seed)
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._max_tokens = max_tokens
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._waiting: dict[float, list[tuple[list[int], asyncio.Future]]] = {}
        self._steps: int | None = None

    async def generate(self, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        done = asyncio.get_running_loop().create_future()
        temperature = float(sampling_params["temperature"])
        waiting = self._waiting.setdefault(temperature, [])
        waiting.append((list(prompt_ids), done))
        if len(waiting) == 1:
            await asyncio.sleep(GATHERED)
            self._sample(temperature, self._waiting.pop(temperature))
        return await done

    def _sample(self, temperature: float, requests: list[tuple[list[int], asyncio.Future]]) -> None:
        longest = max(len(ids) for ids, _ in requests)
        pad = self._model.generation_config.pad_token_id
        # What stands before a prompt is masked.
        pad = next(iter(self._ends)) if pad is None else pad
        # Left padding, as Transformers wants it.
        missing = [longest - len(ids) for ids, _ in requests]
        input_ids = torch.tensor([[pad] * n + ids for n, (ids, _) in zip(missing, requests, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in missing])
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode(), record_log_probs(self._model) as recorder:
            output = self._model.generate(
                input_ids=input_ids, attention_mask=mask, max_new_tokens=self._max_tokens, pad_token_id=pad,
                **(drawn if temperature > 0 else {"do_sample": False}),
            )  # fmt: skip
        completions = [self._until_end(row) for row in output[:, longest:].tolist()]
        log_probs = recorder.log_probs([len(ids) for ids in completions]) or []
        for (_, done), ids, row in zip(requests, completions, log_probs, strict=True):
            done.set_result(
                TokenOutput(
                    token_ids=ids, log_probs=row, stop_reason="completed", extra_fields={"global_steps": self._steps}
                )
            )

    def _until_end(self, ids: list[int]) -> list[int]:
        length = next((place for place, token in enumerate(ids, 1) if token in self._ends), len(ids))
        return ids[:length]

    async def load(self, weights: dict[str, torch.Tensor], global_steps: int | None) -> None:
        self._model.load_state_dict(weights, strict=False)
        self._model.tie_weights()
        self._steps = global_steps

    async def nothing(self, *_: Any, **__: Any) -> None:
        """There is no memory to release and no cache to clear."""

    wake_up = sleep = abort_all_requests = resume_generation = nothing
    clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = nothing


class Replica(RolloutReplica):
    servers: list[Any]
    _server_handle: Any

    async def launch_servers(self) -> None:
        config = self.config
        actor: Any = Server
        server = actor.options(name=_name(self.replica_rank), num_cpus=1, max_concurrency=self.max_concurrency).remote(
            self.model_config.path, config.response_length, config.seed + self.replica_rank
        )
        await server.nothing.remote()
        self.servers, self._server_handle = [server], server
        self._server_address = _name(self.replica_rank)


class Adapter(BaseRollout):
    """What a training worker sends its weights through; the first of each replica's ranks has the server."""

    async def update_weights(
        self, weights: Any, wire_format: str = "named_tensors", global_steps: int | None = None, **kwargs: Any
    ) -> None:
        # Every rank takes part in gathering the shards.
        full = {name: tensor.detach().clone() async for name, tensor in _as_async(weights)}
        rank = torch.distributed.get_rank()
        per_replica = self.config.tensor_model_parallel_size
        if rank % per_replica == 0:
            server: Any = ray.get_actor(_name(rank // per_replica))
            await server.load.remote(full, global_steps)

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...


async def _as_async(items: Any) -> AsyncIterator[tuple[str, torch.Tensor]]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
