"""Nested Python state in one safetensors file: tensors as they are, all else as JSON in its header. Nothing is pickled."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

_KEY = "state"
_TENSOR, _ARRAY, _TUPLE, _ITEMS = "$tensor", "$array", "$tuple", "$items"


def save_state(path: Path, state: Any) -> None:
    """Write dicts, lists, tuples, numbers, texts, None, tensors and numpy arrays.

    Raises:
        TypeError: the state holds something else; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()

    def add(tensor: Tensor, kind: str) -> dict[str, str]:
        name = str(len(tensors))
        content = tensor.detach().cpu().contiguous()
        if content.untyped_storage().data_ptr() in storages:
            # The format holds no tensors that share memory, as those of a rollout's batches do.
            content = content.clone()
        storages.add(content.untyped_storage().data_ptr())
        tensors[name] = content
        return {kind: name}

    structure = _encode(state, add, "state")
    save_file(tensors, path, metadata={_KEY: json.dumps(structure)})


def load_state(path: Path, device: torch.device | str = "cpu") -> Any:
    """What :func:`save_state` wrote, with its tensors on ``device``."""
    with safe_open(path, framework="pt") as file:
        structure = json.loads(file.metadata()[_KEY])
        return _decode(structure, lambda name: file.get_tensor(name).to(device))


def _encode(value: Any, add: Callable[[Tensor, str], dict[str, str]], where: str) -> Any:
    # Other tensors, such as those of quantized optimizers, are more than their numbers.
    if type(value) in (Tensor, Parameter):
        return add(value, _TENSOR)
    if isinstance(value, np.ndarray):
        return add(torch.from_numpy(value.copy()), _ARRAY)
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(item, add, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(item, add, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        # Pairs, since a key may be a number, as in an optimizer's state.
        return {_ITEMS: [[key, _encode(item, add, f"{where}[{key!r}]")] for key, item in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold without pickling it")


def _decode(value: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensor_of) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _TENSOR:
        return tensor_of(content)
    if kind == _ARRAY:
        return tensor_of(content).cpu().numpy()
    if kind == _TUPLE:
        return tuple(_decode(content, tensor_of))
    return {key: _decode(item, tensor_of) for key, item in content}


def rng_state(device: torch.device) -> dict[str, Any]:
    """The random number generators of this process: Python's, NumPy's, PyTorch's on the CPU and on ``device``."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def set_rng_state(states: dict[str, Any], device: torch.device) -> None:
    """Put the generators of this process into the states of :func:`rng_state`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"].cpu())
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"].cpu())
