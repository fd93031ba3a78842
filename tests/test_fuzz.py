"""10,000 random token batches against a reference in numpy and fp64 that shares no code with the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from drpo import OBJECTIVES, TokenBatch, aggregate, make_objective

Array = NDArray[np.float64]

BATCHES = 10_000
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
GARBAGE = np.array([np.nan, np.inf, -np.inf, 1e4, -1e4, 1e30])


@dataclass
class Expected:
    """Per token: the terms that add up to the loss and to the weight, and where rounding may pick either branch.

    No loss where only its gradient says something."""

    loss: list[Array] | None
    weight: list[Array]
    at_kink: Array | bool = False


def _drpo(r: Array, mu: Array, a: Array, delta: float) -> Expected:
    return Expected(
        loss=[-r * a, np.abs(a) * mu * (r - 1) ** 2 / (2 * delta)],
        weight=[np.ones_like(r), -np.sign(a * (r - 1)) * mu * np.abs(r - 1) / delta],
    )


def _spo(r: Array, mu: Array, a: Array, epsilon: float) -> Expected:
    return Expected(
        loss=[-r * a, np.abs(a) * (r - 1) ** 2 / (2 * epsilon)],
        weight=[np.ones_like(r), -np.sign(a * (r - 1)) * np.abs(r - 1) / epsilon],
    )


def _dppo_tv(r: Array, mu: Array, a: Array, delta: float) -> Expected:
    divergence = np.abs(mu * r - mu)
    kept = np.where((a * (r - 1) > 0) & (divergence > delta), 0.0, 1.0)
    return Expected(loss=[-kept * r * a], weight=[kept], at_kink=np.isclose(divergence, delta, rtol=1e-4, atol=0))


def _ppo(r: Array, mu: Array, a: Array, clip_low: float, clip_high: float) -> Expected:
    low, high = 1 - clip_low, 1 + clip_high
    kept = np.where(((a > 0) & (r > high)) | ((a < 0) & (r < low)), 0.0, 1.0)
    at_kink = np.isclose(r, low, rtol=1e-4, atol=0) | np.isclose(r, high, rtol=1e-4, atol=0)
    return Expected(loss=[-np.minimum(r * a, np.clip(r, low, high) * a)], weight=[kept], at_kink=at_kink)


def _mask_drpo(r: Array, mu: Array, a: Array, delta: float) -> Expected:
    divergence = np.abs(mu * r - mu)
    outside = np.where((a * (r - 1) > 0) & (divergence > delta), 1.0, 0.0)
    return Expected(
        loss=[-r * a, outside * np.abs(a) * mu * (r - 1) ** 2 / (2 * delta)],
        weight=[np.ones_like(r), -outside * divergence / delta],
        at_kink=np.isclose(divergence, delta, rtol=1e-4, atol=0),
    )


def _dppo_kl(r: Array, mu: Array, a: Array, delta: float) -> Expected:
    pi = np.minimum(mu * r, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = -mu * np.log(r) + np.where(mu < 1, (1 - mu) * np.log((1 - mu) / (1 - pi)), 0)
    kept = np.where((a * (r - 1) > 0) & (divergence > delta), 0.0, 1.0)
    # Within rounding of 1 a probability's complement has no digits to compare; at the bound on r, π is not μ·r.
    unsure = (np.maximum(pi, mu) > 1 - 1e-3) | (np.abs(np.log(r)) > 19.99)
    return Expected(
        loss=[-kept * r * a], weight=[kept], at_kink=unsure | np.isclose(divergence, delta, rtol=1e-3, atol=0)
    )


def _cispo(r: Array, mu: Array, a: Array, clip_low: float, clip_high: float) -> Expected:
    return Expected(loss=None, weight=[np.clip(r, 1 - clip_low, 1 + clip_high) / r])


def _sapo(r: Array, mu: Array, a: Array, tau_positive: float, tau_negative: float) -> Expected:
    tau = np.where(a > 0, tau_positive, tau_negative)
    decay = np.exp(-np.abs(tau * (r - 1)))
    gate = np.where(r >= 1, 1 / (1 + decay), decay / (1 + decay))
    return Expected(loss=[-4 / tau * gate * a], weight=[4 * decay / (1 + decay) ** 2])


def _dgpo(
    r: Array, mu: Array, a: Array, clip_low: float, clip_high: float, low_power: float, high_root: float
) -> Expected:
    below, above = (a < 0) & (r < 1 - clip_low), (a > 0) & (r > 1 + clip_high)
    weight = np.where(
        below, (r / (1 - clip_low)) ** low_power, np.where(above, ((1 + clip_high) / r) ** (1 / high_root), 1)
    )
    return Expected(loss=[-weight * r * a], weight=[weight])


def _pg(r: Array, mu: Array, a: Array) -> Expected:
    return Expected(loss=[-r * a], weight=[np.ones_like(r)])


REFERENCE: dict[str, tuple[Callable[..., Expected], dict[str, tuple[float, float]]]] = {
    "drpo": (_drpo, {"delta": (0.02, 20)}),
    "spo": (_spo, {"epsilon": (0.02, 20)}),
    "dppo_tv": (_dppo_tv, {"delta": (0.02, 0.9)}),
    "ppo": (_ppo, {"clip_low": (0.01, 0.9), "clip_high": (0.01, 5)}),
    "mask_drpo": (_mask_drpo, {"delta": (0.02, 0.9)}),
    "dppo_kl": (_dppo_kl, {"delta": (0.01, 0.5)}),
    "cispo": (_cispo, {"clip_low": (0.01, 10), "clip_high": (0.01, 5)}),
    "sapo": (_sapo, {"tau_positive": (0.1, 3), "tau_negative": (0.1, 3)}),
    "dgpo": (_dgpo, {"clip_low": (0.01, 0.9), "clip_high": (0.01, 5), "low_power": (0.5, 3), "high_root": (1, 4)}),
    "pg": (_pg, {}),
}
"""By name: the reference, and the range of each hyperparameter."""


def _scale(mask: Array, mode: str, horizon: int) -> Array:
    counted = mask.astype(np.float64)
    if mode == "token-mean":
        return counted / max(counted.sum(), 1)
    counted /= max(mask.any(axis=1).sum(), 1)
    if mode == "seq-mean-token-sum":
        return counted
    if mode == "seq-mean-token-mean":
        return counted / np.maximum(mask.sum(axis=1, keepdims=True), 1)
    return counted / horizon


def _log_probs(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Array, Array]:
    """Log-probs at most 0 whose differences are tiny, moderate, at the bound of 20 or up to ±1e4, a mixture by token."""
    behavior_logp = -rng.choice([0.01, 1, 10, 100], shape) * rng.exponential(size=shape)
    difference = rng.choice([0, 1e-6, 1e-2, 1, 8, 20], shape) * rng.standard_normal(shape)
    logp = np.minimum(behavior_logp + difference, 0)
    flavor = rng.random(shape)
    extreme = -(10 ** rng.uniform(0, 4, shape))
    logp = np.where(flavor < 0.1, extreme, logp)
    behavior_logp = np.where(flavor > 0.9, extreme, behavior_logp)
    return logp, behavior_logp


def _advantages(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    flavor = rng.integers(4)
    if flavor == 0:
        return np.zeros(shape)
    if flavor == 1:
        return rng.choice([-1.0, 0.0, 1.0], shape)
    return rng.standard_normal(shape) * 10 ** rng.uniform(-3, 3)


def _mask(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.bool_]:
    flavor = rng.integers(6)
    if flavor == 0:
        return np.zeros(shape, dtype=bool)
    if flavor == 1:
        return np.ones(shape, dtype=bool)
    # Rows masked as a whole among others.
    return (rng.random(shape) < rng.random()) & (rng.random((shape[0], 1)) < 0.8)


def _close(got: torch.Tensor, terms: list[Array], tolerance: float, where: NDArray[np.bool_]) -> None:
    # A sum of terms is exact to the size of the terms, not of their difference.
    error = np.abs(got.detach().double().numpy() - sum(terms))
    allowed = tolerance * sum(np.abs(term) for term in terms) + 1e-30
    assert (error <= allowed)[where].all(), f"off by {error[where]} where {allowed[where]} is allowed"


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=-(-BATCHES // len(OBJECTIVES)), deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 4), st.sampled_from([0, 1, 2, 5, 16])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    mode=st.sampled_from(MODES),
)
def test_loss_weight_and_gradient_are_finite_and_match_an_independent_reference(
    name: str, seed: int, shape: tuple[int, int], dtype: torch.dtype, mode: str
) -> None:
    rng = np.random.default_rng(seed)
    reference, ranges = REFERENCE[name]
    hyperparameters = {field: float(np.exp(rng.uniform(*np.log(bounds)))) for field, bounds in ranges.items()}
    horizon = int(rng.integers(1, 100))

    # Rounded to the dtype first: the reference starts from what the library is given.
    advantage = _advantages(rng, shape)
    if by_sequence := rng.random() < 0.3:
        advantage = advantage[:, :1].repeat(shape[1], axis=1) if shape[1] else advantage
    inputs = [torch.from_numpy(a).to(dtype) for a in (*_log_probs(rng, shape), advantage)]
    logp, behavior_logp, advantage = (t.double().numpy() for t in inputs)
    r, mu = np.exp(np.clip(logp - behavior_logp, -20, 20)), np.exp(behavior_logp)
    expected = reference(r, mu, advantage, **hyperparameters)
    mask = _mask(rng, shape) & ~np.asarray(expected.at_kink)

    counts = torch.from_numpy(mask)
    garbage = [torch.from_numpy(rng.choice(GARBAGE, shape)).to(dtype) for _ in inputs]
    leaf, given_behavior, given_advantage = (torch.where(counts, t, g) for t, g in zip(inputs, garbage, strict=True))
    leaf.requires_grad_()
    if by_sequence and shape[1]:
        given_advantage = inputs[2][:, 0]
    batch = TokenBatch(logp=leaf, behavior_logp=given_behavior, advantage=given_advantage, mask=counts)
    objective = make_objective(name, **hyperparameters)
    loss = aggregate(objective.loss(batch), batch.mask, mode, horizon=horizon if mode.endswith("norm") else None)  # type: ignore[arg-type]
    at_leaf, gradient = torch.autograd.grad(loss, [leaf, batch.logp])

    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (at_leaf[~counts] == 0).all()
    assert torch.equal(at_leaf[counts], gradient.to(dtype)[counts])

    tolerance = TOLERANCE[batch.logp.dtype]
    scale = _scale(mask, mode, horizon)
    if expected.loss is not None:
        terms = np.concatenate([(scale * term)[mask] for term in expected.loss])
        assert abs(loss.item() - terms.sum()) <= tolerance * np.abs(terms).sum() + 1e-30
    _close(objective.gradient_weight(batch), expected.weight, tolerance, mask)
    _close(gradient, [-scale * advantage * r * term for term in expected.weight], tolerance, np.ones(shape, dtype=bool))
