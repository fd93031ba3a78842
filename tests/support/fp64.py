"""Models of Transformers wholly in fp64: they compute norms, softmax and rotations in fp32 whatever their weights are in."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class AllInFP64(TorchFunctionMode):
    """Within this context fp64 takes the place of fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def compute_in_fp64(model: Any) -> None:
    """Let the body of a model with weights in fp64 compute in nothing else."""
    body = model.base_model
    forward = body.forward

    def widened(*args: Any, **kwargs: Any) -> Any:
        with AllInFP64():
            return forward(*args, **kwargs)

    widened.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    body.forward = widened
