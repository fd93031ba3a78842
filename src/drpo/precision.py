"""Models in lower precision: BF16, FP16, and by torchao INT8, FP8, MXFP8 and NVFP4."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
import types
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

TrainPrecision = Literal["fp32", "bf16", "fp16", "fp8"]
RolloutPrecision = Literal["fp32", "bf16", "fp16", "fp8", "int8", "mxfp8", "nvfp4"]

BY_TORCHAO = ("fp8", "int8", "mxfp8", "nvfp4")

_BLOCKS = {"mxfp8": 32, "nvfp4": 16}
"""Neighboring numbers of a row that have a scale of their own."""

HOPELESS = 8
"""A first pass in bf16 that takes so many times as long as one in fp32 is not repeated."""

BF16_PAYS = 0.9
"""Share of the time of a pass in fp32 up to which ``auto`` takes bf16."""


def require_torchao(precision: str | None) -> None:
    """Raise an ImportError that says what to install, if this precision needs torchao and there is none."""
    if precision in BY_TORCHAO and find_spec("torchao") is None:
        raise ImportError(f"precision {precision!r} needs torchao; pip install 'drpo[low-precision]'")


def require_fp32_weights(model: nn.Module, precision: TrainPrecision) -> None:
    """Check that the model has the weights which training in this precision keeps.

    Trained weights are fp32 in every precision; frozen ones, as those beneath adapters, in fp32 alone, where nothing casts them.

    Raises:
        ValueError: a weight in another precision.
    """
    for name, parameter in model.named_parameters():
        must_be = parameter.requires_grad or precision == "fp32"
        if must_be and parameter.is_floating_point() and parameter.dtype != torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"train_precision={precision!r} keeps weights in fp32, and the model has {name} in {dtype}; "
                "load it with dtype=torch.float32, or leave train_precision out"
            )


def time_in_bf16(model: Any) -> float:
    """How long a forward and backward pass takes in bf16 (autocast) over how long it takes in fp32, of a few tokens on the model's device; some seconds for 135 million parameters on a CPU."""
    ids = torch.arange(128, device=model.device).view(4, 32) % model.config.get_text_config().vocab_size
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def seconds(is_bf16: bool) -> float:
        began = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=is_bf16):
            logits = model(input_ids=ids, use_cache=False).logits
        gradients = torch.autograd.grad(logits.float().logsumexp(dim=-1).sum(), parameters, allow_unused=True)
        # Reading a number waits for a GPU.
        next(gradient for gradient in gradients if gradient is not None).flatten()[0].item()
        return time.perf_counter() - began

    # The first of each prepares what the others find there.
    in_fp32 = [seconds(False) for _ in range(2)][-1]
    prepared_in = seconds(True)
    if prepared_in > HOPELESS * in_fp32:
        return prepared_in / in_fp32
    return statistics.median(seconds(True) / seconds(False) for _ in range(3))


def multiply_in_fp8(model: nn.Module) -> None:
    """Let the model's linear layers, all but the LM head, and its experts multiply in FP8 (e4m3), forward and backward.

    Scales are dynamic, one a row of activations and one a row of weights: what a token's activations
    become does not depend on the batch it is in. Weights stay as they are, so that the optimizer
    and checkpoints do not change. Where the hardware has no FP8 it is emulated.

    Raises:
        ValueError: experts of a mixture whose weights are in no layout that is known here.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe: Any = Float8LinearConfig.from_recipe_name("rowwise")
    config = dataclasses.replace(recipe, emulate=not has_fp8())
    convert_to_float8_training(model, config=config, module_filter_fn=_is_converted)
    if experts := find_experts(model):
        # What a token's gradient is summed over is as many tokens as an expert gets.
        _multiply_experts_in_fp8(experts, dataclasses.replace(config, pad_inner_dim=True))


def find_experts(model: nn.Module) -> list[Any]:
    """The modules that hold the weights of a mixture's experts as one tensor, which is no linear layer."""
    return [module for module in model.modules() if getattr(getattr(module, "down_proj", None), "ndim", 0) == 3]


def _multiply_experts_in_fp8(experts: Sequence[Any], config: Any) -> None:
    from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args

    for module in experts:
        if not module.has_gate or module.has_bias or module.is_transposed:
            raise ValueError(
                f"fp8 does not know the layout of {type(module).__name__}; expected experts with gate_up_proj and down_proj, "
                "without biases, such as Qwen3-MoE's"
            )
    products = Float8Linear.from_float(nn.Linear(16, 16, bias=False), config).linear_mm_config

    def linear(states: Tensor, weight: Tensor) -> Tensor:
        return matmul_with_hp_or_float8_args.apply(states, weight.t(), products, config)

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As Transformers' eager experts, which are a loop over those that have tokens."""
        outputs = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, places = (top_k_index == expert).nonzero(as_tuple=True)
            states = self._apply_gate(linear(hidden_states[tokens], self.gate_up_proj[expert]))
            states = linear(states, self.down_proj[expert]) * top_k_weights[tokens, places, None]
            outputs.index_add_(0, tokens, states.to(outputs.dtype))
        return outputs

    for module in experts:
        module.forward = types.MethodType(forward, module)


def make_rollout_model(model: nn.Module, precision: RolloutPrecision) -> nn.Module:
    """A model with weights of its own to load the policy's into, which :func:`quantized` makes ready to sample.

    Raises:
        ValueError: a mixture of experts whose experts this precision leaves out.
    """
    if precision in ("int8", *_BLOCKS) and find_experts(model):
        raise ValueError(
            f"rollout_precision={precision!r} quantizes linear layers, which a mixture's experts are not; take fp8 or bf16"
        )
    made = copy.deepcopy(model).requires_grad_(False).eval()
    # A forward that was put on the instance, as TRL does, is the original's.
    vars(made).pop("forward", None)
    if precision != "fp32":
        made.to(torch.float16 if precision == "fp16" else torch.bfloat16)
    if precision == "fp8":
        multiply_in_fp8(made)
    return made


def quantized(model: nn.Module, precision: RolloutPrecision) -> nn.Module:
    """The model of :func:`make_rollout_model` as it samples with the weights that it has now.

    FP8 quantizes them in each forward pass; INT8, MXFP8 and NVFP4 make a quantized copy.
    """
    if precision not in ("int8", *_BLOCKS):
        return model
    made = copy.deepcopy(model)
    if precision == "int8":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(made, Int8DynamicActivationInt8WeightConfig(), filter_fn=_is_converted)
    else:
        _round_products(made, precision)
    return made


def _round_products(model: nn.Module, precision: str) -> None:
    """Round what linear layers multiply, but for the LM head, to numbers of a block format; the products are those of the model's dtype.

    Hardware that multiplies these formats adds products up in fp32, as bf16 products are.
    """

    def round_activations(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (round_in_blocks(inputs[0], precision), *inputs[1:])

    for name, module in model.named_modules():
        if (
            _is_converted(module, name)
            and isinstance(module, nn.Linear)
            and not module.in_features % _BLOCKS[precision]
        ):
            module.weight.data = round_in_blocks(module.weight, precision, scaled_as_a_whole=True)
            module.register_forward_pre_hook(round_activations)


def round_in_blocks(tensor: Tensor, precision: str, *, scaled_as_a_whole: bool = False) -> Tensor:
    """The tensor [..., K] rounded to MXFP8 (e4m3, a power of two for each 32 numbers) or NVFP4 (e2m1, an e4m3 scale for each 16), by torchao; in its own dtype.

    Args:
        tensor: weights or activations.
        precision: ``mxfp8`` or ``nvfp4``.
        scaled_as_a_whole: whether NVFP4 has its second scale, one of the tensor, as for weights; with one of activations
            what becomes of a token would depend on its batch.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    if precision == "mxfp8":
        from torchao.prototype.mx_formats import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        rounded: Any = MXTensor.to_mx(rows, torch.float8_e4m3fn, _BLOCKS[precision], ScaleCalculationMode.RCEIL)
    else:
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

        scale = per_tensor_amax_to_scale(rows.abs().max()) if scaled_as_a_whole else None
        rounded = NVFP4Tensor.to_nvfp4(rows, per_tensor_scale=scale)
    return rounded.dequantize(tensor.dtype).view_as(tensor)


def _is_converted(module: nn.Module, name: str) -> bool:
    # As inference engines do, the LM head is left as it is. Matrix units want multiples of 16.
    return (
        type(module) is nn.Linear
        and name.split(".")[-1] != "lm_head"
        and not (module.in_features % 16 or module.out_features % 16)
    )


def has_fp8() -> bool:
    """Whether this machine's GPU multiplies FP8 numbers itself."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
