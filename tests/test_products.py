"""The LM head's products where oneDNN computes them: as PyTorch's, for a bounded number of shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import drpo.kernels.lm_head
import drpo.kernels.matmul
from drpo import make_objective
from drpo.kernels import fused_policy_loss
from drpo.kernels.reference import reference_policy_loss
from support.fused import LEAVES, case, differentiated, relative_error

on_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="oneDNN is for CPUs with AVX-512"
)


@pytest.fixture
def onednn_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ONEDNN_FROM", "ONEDNN_OUTER_ROWS"):
        monkeypatch.setattr(drpo.kernels.matmul, name, 0)


class OneDNN(TorchDispatchMode):
    """Counts the products of oneDNN, none of which has a stride between rows, and their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.shapes: set[tuple[torch.Size, torch.Size]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "mkldnn::_linear_pointwise":
            a, b = args[:2]
            assert a.is_contiguous()
            assert b.is_contiguous() or b.t().is_contiguous()
            self.products += 1
            self.shapes.add((a.shape, b.shape))
        return func(*args, **(kwargs or {}))


@on_avx512
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("block", [1, 30, 101])
@pytest.mark.usefixtures("onednn_for_all")
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(37, 16, 101), (1, 1, 1), (20, 7, 2), (0, 3, 5)])
def test_onednn_multiplies_as_pytorch_does(
    tokens: int, width: int, vocabulary: int, block: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drpo.kernels.matmul, "BLOCK_NUMBERS", 16 * block)
    monkeypatch.setitem(drpo.kernels.lm_head.CHUNK_BYTES, "cpu", 10 * vocabulary * 4)
    given = {**case(0, tokens, width, vocabulary), "objective": make_objective("drpo"), "softcap": 1.5}
    given |= {name: given[name].float().double() for name in LEAVES} | {"advantage": torch.ones(tokens)}
    if not biased:
        given["bias"] = None
    truth = differentiated(reference_policy_loss, given)
    with OneDNN() as onednn:
        fused = differentiated(fused_policy_loss, given, torch.float32)
    assert onednn.products == 3 * math.ceil(tokens / 10) * math.ceil(vocabulary / block)
    for what, expected in truth.items():
        torch.testing.assert_close(
            fused[what].double(), expected, rtol=1e-5, atol=3e-6, msg=lambda m, w=what: f"{w}: {m}"
        )


@on_avx512
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(256, 512, 32_768), (100, 768, 50_257)])
def test_its_error_at_a_real_size_is_within_the_budget_of_plain_pytorch(
    tokens: int, width: int, vocabulary: int
) -> None:
    """Against fp64 of the same rounded inputs, at most half as much again."""
    given = {**case(0, tokens, width, vocabulary), "objective": make_objective("drpo")}
    given |= {name: given[name].float().double() for name in LEAVES}
    truth = differentiated(reference_policy_loss, given)
    with OneDNN() as onednn:
        fused = differentiated(fused_policy_loss, given, torch.float32)
    assert onednn.products
    plain = differentiated(reference_policy_loss, given, torch.float32)
    for name in LEAVES:
        of_fused, of_plain = (relative_error(result[f"by {name}"], truth[f"by {name}"]) for result in (fused, plain))
        assert of_fused <= 1.5 * of_plain, name


@on_avx512
@pytest.mark.usefixtures("onednn_for_all")
def test_onednn_meets_few_shapes_however_many_tokens_there_are() -> None:
    """It keeps code for each: up to 256 tokens sixteen numbers of rows, then eight a doubling, of three products."""
    with OneDNN() as onednn:
        for tokens in range(1, 385):
            given = {**case(0, tokens, 3, 5), "objective": make_objective("drpo"), "advantage": torch.ones(tokens)}
            differentiated(fused_policy_loss, given, torch.float32)
    assert onednn.products == 3 * 384
    assert len(onednn.shapes) == 3 * (16 + 4)


@pytest.mark.usefixtures("onednn_for_all")
def test_it_compiles() -> None:
    given = {**case(0), "objective": make_objective("drpo")}
    eager, compiled = (
        differentiated(function, given, torch.float32)
        for function in (fused_policy_loss, torch.compile(fused_policy_loss))
    )
    for what, expected in eager.items():
        torch.testing.assert_close(compiled[what], expected, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.usefixtures("onednn_for_all")
def test_a_head_that_is_a_view_goes_to_pytorch() -> None:
    given = {**case(0), "objective": make_objective("drpo")}
    given |= {name: given[name].float() for name in LEAVES}
    wide = torch.cat([given["lm_head_weight"]] * 2, dim=1)
    whole = fused_policy_loss(**given)
    with OneDNN():
        view = fused_policy_loss(**{**given, "lm_head_weight": wide[:, :16]})
    torch.testing.assert_close(view.logp, whole.logp)
