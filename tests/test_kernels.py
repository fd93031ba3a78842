"""The fused loss against all logits at once, differentiated by autograd."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import drpo.kernels.lm_head
from builders import EVERY, objective_of
from drpo import CORRECTIONS, OBJECTIVES, Objective, make_correction, make_objective
from drpo.kernels import PackedTokens, fused_policy_loss
from drpo.kernels.logits import LogitTransform
from drpo.kernels.reference import reference_policy_loss
from drpo.kernels.softmax import _differentiate_blocks
from drpo.objectives import anchored
from support.fused import DEVICE, LEAVES, called, case, differentiated, relative_error


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    """Tensors are made on the GPU if there is one."""
    with torch.device(DEVICE):
        yield


@pytest.fixture
def chunks_of_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(drpo.kernels.lm_head.CHUNK_BYTES, DEVICE, 10 * 101 * 8)


@EVERY
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.usefixtures("chunks_of_ten")
def test_it_equals_the_reference_in_fp64(name: str, tight: bool, softcap: float | None) -> None:
    for seed in range(3):
        objective = objective_of(name, tight)
        anchor = "old" if objective.corrects_mismatch else "sampler"
        given = {**case(seed), "objective": objective, "anchor": anchor, "softcap": softcap}
        fused, reference = (differentiated(f, given) for f in (fused_policy_loss, reference_policy_loss))
        for what, expected in reference.items():
            atol = 1e-12 * expected.abs().max().item()
            torch.testing.assert_close(fused[what], expected, rtol=1e-9, atol=atol, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_error_is_within_the_budget_of_plain_pytorch_in_the_same_dtype(dtype: torch.dtype) -> None:
    """Of 70 random shapes, against fp64 of the same rounded inputs: on average at most half as much again, never far more.

    One shape alone says little: rounding may happen to cancel in one of the two.
    """
    draw = random.Random(0)
    errors: dict[str, list[Tensor]] = {f"by {name}": [] for name in LEAVES}
    for seed in range(70):
        # A mask's jump is no matter of precision: log-probs near it round to either side.
        objective = make_objective(*draw.choice([("drpo",), ("spo",), ("pg",), ("drpo_topk",), ("vespo",), ("sapo",)]))
        tokens, width, vocabulary = draw.choice([1, 2, 7, 64]), draw.choice([1, 8, 33]), draw.choice([1, 2, 31, 1000])
        given = {**case(seed, tokens, width, vocabulary), "objective": objective}
        given |= {name: given[name].to(dtype).double() for name in LEAVES}
        truth = differentiated(reference_policy_loss, given)
        fused, plain = (differentiated(f, given, dtype) for f in (fused_policy_loss, reference_policy_loss))
        for what, pairs in errors.items():
            pair = torch.tensor([relative_error(result[what], truth[what]) for result in (fused, plain)])
            assert pair[0] <= 10 * pair[1] + 20 * torch.finfo(dtype).eps, (what, tokens, width, vocabulary)
            pairs.append(pair)
    for what, pairs in errors.items():
        of_fused, of_plain = torch.stack(pairs).mean(dim=0).tolist()
        assert of_fused <= 1.5 * of_plain, what


@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(256, 512, 32_768), (100, 768, 50_257)])
def test_its_error_at_a_real_size_is_within_the_budget_of_plain_pytorch(
    tokens: int, width: int, vocabulary: int
) -> None:
    """Against fp64 of the same rounded inputs, at most half as much again."""
    given = {**case(0, tokens, width, vocabulary), "objective": make_objective("drpo")}
    given |= {name: given[name].float().double() for name in LEAVES}
    truth = differentiated(reference_policy_loss, given)
    fused, plain = (differentiated(f, given, torch.float32) for f in (fused_policy_loss, reference_policy_loss))
    for name in LEAVES:
        of_fused, of_plain = (relative_error(result[f"by {name}"], truth[f"by {name}"]) for result in (fused, plain))
        assert of_fused <= 1.5 * of_plain, name


def test_it_compiles() -> None:
    given = {**case(0), "objective": make_objective("drpo")}
    eager, compiled = (
        differentiated(function, given, torch.float32)
        for function in (fused_policy_loss, torch.compile(fused_policy_loss))
    )
    for what, expected in eager.items():
        torch.testing.assert_close(compiled[what], expected, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("name", ["drpo", "spo", "pg", "drpo_topk", "drpo_unweighted"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.usefixtures("chunks_of_ten")
def test_it_passes_gradcheck(name: str, softcap: float | None) -> None:
    given = {**case(0, tokens=12, width=4, vocabulary=17), "objective": objective_of(name, True), "softcap": softcap}
    leaves = [given.pop(name).requires_grad_() for name in LEAVES]

    def loss(*leaves: Tensor) -> Tensor:
        return called(fused_policy_loss, {**dict(zip(LEAVES, leaves, strict=True)), **given}).loss

    assert torch.autograd.gradcheck(loss, leaves)


def flops_of_addmm(total: Any, a: torch.Size, b: torch.Size, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def products(given: dict[str, Any], **needs: bool) -> float:
    """Floating-point operations over those of one product of all tokens with the head."""
    tokens, width = given["hidden"].shape
    vocabulary = len(given["lm_head_weight"])
    leaves = {name: given[name].clone().requires_grad_(needs.get(name, True)) for name in LEAVES[:2]}
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: flops_of_addmm}) as counter:
        loss = called(fused_policy_loss, {**given, **leaves, "bias": None}).loss
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops() / (2 * tokens * width * vocabulary)


@pytest.mark.parametrize(
    ("name", "needs", "expected"),
    [
        ("drpo", {}, 3),
        ("drpo", {"lm_head_weight": False}, 2),
        ("drpo", {"hidden": False}, 2),
        ("drpo", {"hidden": False, "lm_head_weight": False}, 1),
        ("gspo", {}, 4),
        ("drpo_topk", {}, 3),
    ],
)
@pytest.mark.usefixtures("chunks_of_ten")
def test_it_takes_the_least_products(name: str, needs: dict[str, bool], expected: int) -> None:
    given = {**case(0), "objective": make_objective(name)}
    given["advantage"] = torch.ones_like(given["advantage"])
    given |= {"anchor": "old", "old_logp": None} if name == "gspo" else {}
    assert products(given, **needs) == pytest.approx(expected)


@pytest.mark.usefixtures("chunks_of_ten")
def test_tokens_without_a_coefficient_cost_one_product() -> None:
    given = {**case(0, tokens=40), "objective": make_objective("drpo")}
    given["advantage"] = torch.where(torch.arange(40) % 4 == 0, 1.0, 0.0)
    assert products(given) == pytest.approx(1 + 2 / 4)
    given["advantage"] = torch.zeros(40)
    assert products(given) == pytest.approx(1)
    given["objective"] = make_objective("drpo_unweighted")
    assert products(given) == pytest.approx(3)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["drpo", "gspo", "drpo_topk"])
@pytest.mark.usefixtures("chunks_of_ten")
def test_no_tensor_grows_with_tokens_times_vocabulary(name: str) -> None:
    given = {**case(0, tokens=700, width=4), "objective": make_objective(name)}
    with LargestTensor() as largest:
        differentiated(fused_policy_loss, given)
    assert largest.elements <= max(10 * 101, 700 * 6, 101 * 4)


@pytest.mark.parametrize("name", ["drpo", "gspo", "drpo_topk"])
def test_no_tokens_are_a_zero_that_can_be_differentiated(name: str) -> None:
    result = differentiated(fused_policy_loss, {**case(0, tokens=0), "objective": make_objective(name)})
    assert result["loss"] == 0
    assert all((result[f"by {leaf}"] == 0).all() for leaf in LEAVES)


def test_without_old_log_probs_the_policy_is_its_own_anchor() -> None:
    given = {**case(0), "objective": make_objective("pg"), "anchor": "old", "old_logp": None}
    result = differentiated(fused_policy_loss, given)
    # The surrogate at r = 1 is −Σ scale · A.
    assert result["loss"].item() == pytest.approx(-(given["scale"] * given["advantage"]).sum().item())
    assert result["by hidden"].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_ratio_beyond_fp16_leaves_finite_gradients(dtype: torch.dtype) -> None:
    given = {**case(0), "objective": make_objective("drpo", delta=0.1)}
    given["behavior_logp"] = given["behavior_logp"] - 30.0
    result = differentiated(fused_policy_loss, {**given, "scale": torch.full((37,), 1e-9)}, dtype)
    assert all(value.isfinite().all() for value in result.values())


def test_under_autocast_gradients_come_in_the_dtype_of_their_tensors() -> None:
    given = {**case(0), "objective": make_objective("drpo")}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        fused = differentiated(fused_policy_loss, given, torch.float32)
    low = differentiated(fused_policy_loss, given, torch.bfloat16)
    assert fused["logp"].dtype == torch.float32
    for name in LEAVES:
        assert fused[f"by {name}"].dtype == torch.float32
        torch.testing.assert_close(fused[f"by {name}"], low[f"by {name}"].float(), rtol=0.02, atol=1e-4)


def test_a_second_backward_gives_the_same_gradients() -> None:
    given = {**case(0), "objective": make_objective("drpo")}
    hidden = given["hidden"].requires_grad_()
    loss = called(fused_policy_loss, given).loss
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(36, 16)}, r"hidden has shape \(36, 16\); expected \(37, D\)"),
        ({"lm_head_weight": torch.zeros(101, 15)}, r"lm_head_weight has shape \(101, 15\); expected \(V, 16\)"),
        ({"token_ids": torch.zeros(1, 37)}, r"token_ids has shape \(1, 37\); expected one dimension"),
        ({"advantage": torch.zeros(36)}, r"advantage has shape \(36,\); expected \(37,\)"),
        ({"top_k_ids": torch.zeros(37, dtype=torch.int64)}, r"top_k_ids has shape \(37,\); expected \(37, K\)"),
        ({"top_k_behavior_logp": None}, "belong together"),
        ({"sequence_ids": -torch.arange(37)}, "sequence_ids decreases"),
        ({"objective": make_objective("gspo"), "sequence_ids": None}, "GSPO looks at whole sequences"),
        (
            {"objective": make_objective("pdm"), "top_k_ids": None, "top_k_behavior_logp": None},
            "PDM looks at the sampler's likeliest tokens",
        ),
        ({"behavior_logp": torch.full((37,), torch.nan)}, "behavior_logp is nan"),
        ({"bias": torch.zeros(1)}, r"bias has shape \(1,\); expected \(101,\)"),
        ({"token_ids": torch.full((37,), 101)}, "token_ids has 101; expected tokens of the vocabulary, 0 to 100"),
        ({"token_ids": torch.full((37,), -100)}, "token_ids has -100; expected tokens"),
        ({"token_ids": torch.zeros(37)}, "token_ids has dtype torch.float32; expected torch.int64"),
        ({"top_k_ids": torch.full((37, 5), 200)}, "top_k_ids has 200; expected tokens"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a number > 0"),
        ({"softcap": -5.0}, "softcap is -5.0; expected a number > 0"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    there = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        called(fused_policy_loss, {**case(0), "objective": make_objective("drpo"), **there})


def corrected() -> Iterator[tuple[str, Objective]]:
    """Every objective by itself, and under each correction that it takes."""
    for name, correction in itertools.product(OBJECTIVES, [None, *CORRECTIONS]):
        with contextlib.suppress(ValueError):
            yield (
                f"{name} {correction or ''}",
                anchored(make_objective(name), None, make_correction(correction) if correction else None),
            )


@pytest.mark.parametrize("objective", [pytest.param(objective, id=name) for name, objective in corrected()])
def test_of_no_tokens_nothing_comes(objective: Objective) -> None:
    """As in an update whose sequences have no advantage, and on a rank that only makes up the number."""
    none, ids = torch.empty(0), torch.empty(0, dtype=torch.long)
    top_k = {"top_k_ids": ids.view(0, 3), "top_k_behavior_logp": none.view(0, 3)} if hasattr(objective, "top_k") else {}
    tokens = PackedTokens(ids, none, none, none, anchor=objective.anchor, sequence_ids=ids, **top_k)
    hidden, head = torch.zeros(0, 4, requires_grad=True), torch.zeros(7, 4, requires_grad=True)
    scored = fused_policy_loss(hidden, head, tokens, objective)
    scored.loss.backward()
    assert scored.loss.item() == 0
    assert head.grad is not None
    assert not head.grad.any()


def test_an_objective_is_an_objective() -> None:
    with pytest.raises(TypeError, match=r"objective is 'drpo'; expected an Objective, as drpo\.make_objective makes"):
        called(fused_policy_loss, {**case(0), "objective": "drpo"})


@pytest.mark.usefixtures("chunks_of_ten")
def test_inference_mode_leaves_nothing_behind_that_training_trips_over() -> None:
    drpo.kernels.lm_head.workspace.cache_clear()
    given = {**case(0), "objective": make_objective("drpo")}
    with torch.inference_mode():
        seen = called(fused_policy_loss, given)
    torch.testing.assert_close(differentiated(fused_policy_loss, given)["logp"], seen.logp, rtol=0, atol=0)


def test_where_nothing_is_differentiated_the_head_is_the_only_product() -> None:
    given = {**case(0), "objective": make_objective("drpo")}
    given["hidden"].requires_grad_()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        called(fused_policy_loss, given)
    assert counter.get_total_flops() == 2 * 37 * 16 * 101


def test_a_graph_of_the_gradient_is_refused() -> None:
    given = {**case(0), "objective": make_objective("drpo")}
    hidden = given["hidden"].requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(called(fused_policy_loss, given).loss, hidden, create_graph=True)


def test_the_scale_of_a_loss_keeps_fp16_gradients_within_their_range() -> None:
    # Of a million tokens each counts 1e-6, below half of whose gradient fp16 has nothing.
    given = {**case(0), "objective": make_objective("drpo"), "scale": torch.full((37,), 1e-6), "bias": None}
    given = {name: value.float() if name in ("advantage", "behavior_logp") else value for name, value in given.items()}
    gradients = []
    for function, dtype in ((fused_policy_loss, torch.float16), (reference_policy_loss, torch.float64)):
        leaves = {name: given[name].to(dtype, copy=True).requires_grad_() for name in ("hidden", "lm_head_weight")}
        (called(function, {**given, **leaves}).loss * 2**16).backward()
        gradients.append([leaf.grad.double() for leaf in leaves.values() if leaf.grad is not None])
    for fused, reference in zip(*gradients, strict=True):
        assert (fused - reference).norm() < 0.01 * reference.norm()


def test_fp16_gradients_of_the_head_add_up_beyond_the_range_of_their_terms() -> None:
    tokens, width, vocabulary = 4096, 4, 7
    hidden = torch.full((tokens, width), 40.0)
    given = {
        "token_ids": torch.full((tokens,), 3),
        "behavior_logp": torch.full((tokens,), -2.0),
        "advantage": torch.ones(tokens),
        "scale": torch.full((tokens,), 1 / tokens),
        "objective": make_objective("pg"),
    }
    weights = {}
    for function, dtype in ((fused_policy_loss, torch.float16), (reference_policy_loss, torch.float64)):
        weight = torch.zeros(vocabulary, width, dtype=dtype, requires_grad=True)
        called(function, {**given, "hidden": hidden.to(dtype), "lm_head_weight": weight}).loss.backward()
        assert weight.grad is not None
        weights[dtype] = weight.grad.double()
    torch.testing.assert_close(weights[torch.float16], weights[torch.float64], rtol=2e-3, atol=1e-3)


def test_the_triton_kernel_takes_strided_ids_and_logits_of_minus_infinity() -> None:
    pytest.importorskip("triton")
    from drpo.kernels.softmax_triton import differentiate_rows

    logits = torch.randn(3, 9000, generator=torch.Generator(DEVICE).manual_seed(0))
    # All of the kernel's first block.
    logits[:, :4096] = -torch.inf
    token_ids = torch.tensor([[5000, 0], [6000, 1], [7000, 2]])[:, 0]
    logp, entropy, gradient = torch.empty(3), torch.empty(3), torch.empty(3, 9000)
    differentiate_rows(logits, token_ids, LogitTransform(), logp, entropy, gradient)
    expected = logits[:, 4096:].log_softmax(dim=1)
    torch.testing.assert_close(logp, expected.gather(1, token_ids.unsqueeze(1) - 4096).squeeze(1))
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(dim=1))
    assert not gradient[:, :4096].any()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocabulary", [1, 5, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_triton_kernel_agrees_with_pytorch(dtype: torch.dtype, vocabulary: int, softcap: float | None) -> None:
    """On a GPU if there is one, else under Triton's interpreter (conftest.py); in place, and into another dtype."""
    pytest.importorskip("triton")
    from drpo.kernels.softmax_triton import differentiate_rows

    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = 3 * torch.randn(3, vocabulary, generator=generator).to(dtype)
    token_ids = torch.randint(vocabulary, (3,), generator=generator)
    transform = LogitTransform(softcap=softcap, temperature=0.7, scale=1.3)

    def by(function: Any, in_place: bool) -> tuple[Tensor, ...]:
        given = logits.clone()
        logp, entropy = torch.empty(3), torch.empty(3)
        gradient = given if in_place else torch.empty_like(given, dtype=torch.float32)
        function(given, token_ids, transform, logp, entropy, gradient)
        return logp, entropy, gradient.float()

    for in_place in (True, False):
        for value, expected in zip(by(differentiate_rows, in_place), by(_differentiate_blocks, in_place), strict=True):
            coarse = in_place and value.dim() == 2
            torch.testing.assert_close(value, expected, rtol=torch.finfo(dtype).eps if coarse else 2e-5, atol=2e-5)


def test_what_lies_between_the_rows_of_a_chunk_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU's bf16 products may multiply it by 0, which makes NaN of a NaN that memory was left with.
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype: empty(*size, dtype=dtype).fill_(torch.nan))
    chunk = drpo.kernels.lm_head._apart(3, 99, torch.bfloat16)
    whole = chunk.as_strided((3, chunk.stride(0)), chunk.stride())
    assert chunk.isnan().all()
    assert chunk.stride(0) > 99
    assert (whole[:, 99:] == 0).all()
