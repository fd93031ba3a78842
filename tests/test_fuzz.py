"""Random token batches against a reference in numpy and fp64 that shares no code with the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from drpo import OBJECTIVES, TokenBatch, aggregate, make_objective
from drpo.objectives import CORRECTIONS, PPO, Corrected, make_correction
from drpo.tokens import TopK

Array = NDArray[np.float64]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "prompt-mean")
EVERY = (*OBJECTIVES, *CORRECTIONS)
"""What is fuzzed; a correction is one of PPO with its defaults."""
GARBAGE = np.array([np.nan, np.inf, -np.inf, 1e4, -1e4, 1e30])


@dataclass
class Tokens:
    """What a reference sees, [B, T] each; zero or one where masked."""

    logp: Array
    behavior_logp: Array
    a: Array
    mask: NDArray[np.bool_]
    sampler_logp: Array
    """log μ, where ``behavior_logp`` is the anchor's, log π_old."""
    topk_pi: Array
    topk_mu: Array
    is_sampled: NDArray[np.bool_]
    eps: float
    """Of the dtype the library computes in."""

    def __post_init__(self) -> None:
        self.log_r = np.clip(self.logp - self.behavior_logp, -20, 20)
        self.r, self.excess = np.exp(self.log_r), np.expm1(self.log_r)
        self.pi, self.mu = np.exp(self.logp), np.exp(self.behavior_logp)
        self.log_rho = np.clip(self.behavior_logp - self.sampler_logp, -20, 20)
        self.r_sampler = np.exp(self.log_rho)

    def mean(self, values: Array) -> Array:
        return (values * self.mask).sum(1, keepdims=True) / np.maximum(self.mask.sum(1, keepdims=True), 1)


@dataclass
class Expected:
    """Per token: the terms that add up to the loss and to the weight, and where rounding may pick either branch.

    No loss where only its gradient says something; ``coefficient`` where it is not A·r·w; ``condition`` where an
    error of the log-ratio is multiplied by more than 1."""

    loss: list[Array] | None
    weight: list[Array]
    at_kink: Array | bool = False
    coefficient: list[Array] | None = None
    condition: Array | float = 1.0
    others: list[Array] | None = None
    """−∂loss/∂log π of the tokens in the support that were not sampled, [B, T, K]."""


def _near(x: Array, y: Array | float) -> Array:
    return np.isclose(x, y, rtol=1e-4, atol=0)


def _drpo(t: Tokens, delta: float) -> Expected:
    return Expected(
        loss=[-t.r * t.a, np.abs(t.a) * t.mu * (t.r - 1) ** 2 / (2 * delta)],
        weight=[np.ones_like(t.r), -np.sign(t.a * (t.r - 1)) * t.mu * np.abs(t.r - 1) / delta],
    )


def _spo(t: Tokens, epsilon: float) -> Expected:
    return Expected(
        loss=[-t.r * t.a, np.abs(t.a) * (t.r - 1) ** 2 / (2 * epsilon)],
        weight=[np.ones_like(t.r), -np.sign(t.a * (t.r - 1)) * np.abs(t.r - 1) / epsilon],
    )


def _masked(t: Tokens, outside: Array, at_kink: Array) -> Expected:
    kept = np.where(outside, 0.0, 1.0)
    return Expected(loss=[-kept * t.r * t.a], weight=[kept], at_kink=at_kink)


def _dppo_tv(t: Tokens, delta: float) -> Expected:
    divergence = np.abs(t.mu * t.r - t.mu)
    return _masked(t, (t.a * (t.r - 1) > 0) & (divergence > delta), _near(divergence, delta))


def _ipo(t: Tokens, delta: float) -> Expected:
    divergence = np.abs(t.mu * t.r - t.mu)
    return _masked(t, divergence > delta, _near(divergence, delta))


def _ppo(t: Tokens, clip_low: float, clip_high: float) -> Expected:
    low, high = 1 - clip_low, 1 + clip_high
    kept = np.where(((t.a > 0) & (t.r > high)) | ((t.a < 0) & (t.r < low)), 0.0, 1.0)
    loss = -np.minimum(t.r * t.a, np.clip(t.r, low, high) * t.a)
    return Expected(loss=[loss], weight=[kept], at_kink=_near(t.r, low) | _near(t.r, high))


def _ppo_dual_clip(t: Tokens, clip_low: float, clip_high: float, clip_dual: float) -> Expected:
    clip_dual += 1
    ppo = _ppo(t, clip_low, clip_high)
    assert ppo.loss is not None
    runaway = (t.a < 0) & (t.r > clip_dual)
    loss = np.where(runaway, -clip_dual * t.a, ppo.loss[0])
    return Expected([loss], [np.where(runaway, 0.0, ppo.weight[0])], at_kink=ppo.at_kink | _near(t.r, clip_dual))


def _icepop(t: Tokens, clip_low: float, clip_high: float, mask_low: float, mask_high: float) -> Expected:
    ppo = _ppo(t, clip_low, clip_high)
    assert ppo.loss is not None
    k = np.where((t.r_sampler >= mask_low) & (t.r_sampler <= mask_high), t.r_sampler, 0.0)
    at_kink = ppo.at_kink | _near(t.r_sampler, mask_low) | _near(t.r_sampler, mask_high)
    return Expected([k * ppo.loss[0]], [k * ppo.weight[0]], at_kink=at_kink)


def _mask_drpo(t: Tokens, delta: float) -> Expected:
    divergence = np.abs(t.mu * t.r - t.mu)
    outside = np.where((t.a * (t.r - 1) > 0) & (divergence > delta), 1.0, 0.0)
    return Expected(
        loss=[-t.r * t.a, outside * np.abs(t.a) * t.mu * (t.r - 1) ** 2 / (2 * delta)],
        weight=[np.ones_like(t.r), -outside * divergence / delta],
        at_kink=_near(divergence, delta),
    )


def _dppo_kl(t: Tokens, delta: float) -> Expected:
    pi = np.minimum(t.mu * t.r, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = -t.mu * t.log_r + np.where(t.mu < 1, (1 - t.mu) * np.log((1 - t.mu) / (1 - pi)), 0)
    # Within rounding of 1 a probability's complement has no digits to compare; at the bound on r, π is not μ·r.
    unsure = (np.maximum(pi, t.mu) > 1 - 1e-3) | (np.abs(t.log_r) > 19.99)
    at_kink = unsure | np.isclose(divergence, delta, rtol=1e-3, atol=0)
    return _masked(t, (t.a * (t.r - 1) > 0) & (divergence > delta), at_kink)


def _categories(t: Tokens) -> tuple[Array, Array]:
    outside = ~t.is_sampled.any(2, keepdims=True)
    of = [
        np.concatenate([support, np.where(outside, p[..., None], 0)], axis=2)
        for support, p in ((t.topk_pi, t.pi), (t.topk_mu, t.mu))
    ]
    return tuple(np.concatenate([p, np.maximum(1 - p.sum(2, keepdims=True), t.eps)], axis=2) for p in of)  # type: ignore[return-value]


def _dppo_topk_tv(t: Tokens, delta: float) -> Expected:
    pi, mu = _categories(t)
    divergence = np.abs(pi - mu).sum(2) / 2
    return _masked(t, (t.a * (t.r - 1) > 0) & (divergence > delta), _near(divergence, delta))


def _dppo_topk_kl(t: Tokens, delta: float) -> Expected:
    pi, mu = _categories(t)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(mu > 0, mu * (np.log(mu) - np.log(pi)), 0).sum(2)
    # What is left of 1 has few digits where it is small, and a KL divergence sees all of them.
    unsure = (pi[..., -1] < 1e-3) | (mu[..., -1] < 1e-3) | (pi.min(2, where=mu > 0, initial=1) < 1e-30)
    at_kink = unsure | np.isclose(divergence, delta, rtol=1e-2, atol=0)
    return _masked(t, (t.a * (t.r - 1) > 0) & (divergence > delta), at_kink)


def _pdm(t: Tokens, delta: float) -> Expected:
    pi, mu = _categories(t)
    change = t.mu * t.r - t.mu + (pi * (mu - pi)).sum(2)
    divergence = np.abs(t.mu * t.r - t.mu)
    return _masked(t, (t.a * change > 0) & (divergence > delta), _near(divergence, delta) | (np.abs(change) < 1e-5))


def _cppo(
    t: Tokens, delta: float, weight_min: float, allowance_low: float, allowance_high: float, soft: bool = False
) -> Expected:
    allowance_high += allowance_low
    kept, at_kink = np.ones_like(t.r), np.zeros_like(t.mask)
    for row in range(len(t.r)):
        counted = np.flatnonzero(t.mask[row])
        if not len(counted):
            continue
        divergence = np.abs(t.mu[row] * (t.r[row] - 1))
        allowance = np.clip(np.quantile(divergence[counted], 0.9), allowance_low, allowance_high)
        earned = spent = 0.0
        for place, column in enumerate(counted, 1):
            omega = 1.0
            if len(counted) > 1:
                omega = weight_min + (1 - weight_min) * (len(counted) - place) / (len(counted) - 1)
            z, budget = omega * divergence[column], min(delta, delta + allowance * earned - spent)
            if t.a[row, column] * (t.r[row, column] - 1) > 0 and z > budget:
                kept[row, column] = max(0.0, budget) / max(z, 1e-300) if soft else 0
            at_kink[row, column] = np.isclose(z, budget, rtol=1e-3, atol=1e-6)
            earned, spent = earned + omega, spent + z
    return Expected(loss=[-kept * t.r * t.a], weight=[kept], at_kink=at_kink)


def _cppo_soft(t: Tokens, **drawn: float) -> Expected:
    expected = _cppo(t, **drawn, soft=True)
    # What is left of the budget is a difference.
    return replace(expected, condition=50.0 / drawn["delta"])


def _rollout_is(t: Tokens, clip_low: float, clip_high: float) -> Expected:
    low, high = 1 - clip_low, 1 + clip_high
    return _masked(t, (t.r < low) | (t.r > high), _near(t.r, low) | _near(t.r, high))


def _pg_tv_penalty(t: Tokens, beta: float) -> Expected:
    return _penalised(t, [beta * np.abs(t.excess), -t.a * t.logp], [t.a, -beta * np.sign(t.excess) * t.r])


def _mask_drpo_region(t: Tokens, delta: float, region_delta: float) -> Expected:
    divergence = np.abs(t.mu * t.r - t.mu)
    outside = np.where((t.a * (t.r - 1) > 0) & (divergence > region_delta), 1.0, 0.0)
    return Expected(
        loss=[-t.r * t.a, outside * np.abs(t.a) * t.mu * (t.r - 1) ** 2 / (2 * delta)],
        weight=[np.ones_like(t.r), -outside * divergence / delta],
        at_kink=_near(divergence, region_delta),
    )


def _m2po(t: Tokens, clip_low: float, clip_high: float, tau: float) -> Expected:
    ppo = _ppo(t, clip_low, clip_high)
    assert ppo.loss is not None
    squared = np.log(t.r_sampler) ** 2
    ascending = np.sort(squared[t.mask])
    means = ascending.cumsum() / np.arange(1, len(ascending) + 1)
    kept = ascending[means < tau]
    largest = kept[-1] if len(kept) else -1.0
    at_kink = (
        ppo.at_kink
        | _near(means, tau).any()
        | (np.isclose(squared, largest, rtol=1e-3, atol=1e-9) & (squared != largest))
    )
    outside = squared > largest
    return Expected([np.where(outside, 0, ppo.loss[0])], [np.where(outside, 0, ppo.weight[0])], at_kink=at_kink)


def _covariance(t: Tokens) -> tuple[Array, Array]:
    """With what rounding may make of it."""
    count = max(t.mask.sum(), 1)
    advantage, logp = ((values * t.mask).sum() / count for values in (t.a, t.logp))
    error = 1e-5 * (np.abs(t.a) + np.abs(advantage)) * (np.abs(t.logp) + np.abs(logp))
    return (t.a - advantage) * (t.logp - logp), error


def _clip_cov(t: Tokens, clip_low: float, clip_high: float, share: float, cov_low: float, cov_high: float) -> Expected:
    """With a share of all, so that nothing is left to chance."""
    assert share >= 1
    cov_high += cov_low
    ppo = _ppo(t, clip_low, clip_high)
    assert ppo.loss is not None
    cov, error = _covariance(t)
    outside = (cov > cov_low) & (cov < cov_high) & (ppo.weight[0] > 0)
    at_kink = ppo.at_kink | (np.abs(cov - cov_low) < error) | (np.abs(cov - cov_high) < error)
    return Expected([np.where(outside, 0, ppo.loss[0])], [np.where(outside, 0, ppo.weight[0])], at_kink=at_kink)


def _kl_cov(t: Tokens, share: float, beta: float) -> Expected:
    cov, error = _covariance(t)
    descending = -np.sort(-cov[t.mask])
    wanted = min(len(descending), max(1, int(share * len(descending))))
    least = descending[wanted - 1] if wanted else np.inf
    if wanted and (descending == descending[0]).sum() > wanted:
        least = np.inf
    penalised = cov >= least
    close = (np.abs(cov - least) < error) & t.mask
    at_kink = close & (close.sum() > 1)
    if wanted:
        largest = (descending[0] - cov < error) & t.mask
        at_kink |= largest & (largest.sum() > wanted)
    sign = np.sign(t.log_r)
    pull = np.where(penalised, beta * sign, 0)
    return _penalised(t, [np.where(penalised, beta * np.abs(t.log_r), 0), -t.r * t.a], [t.a * t.r, -pull], at_kink)


def _p3o(t: Tokens) -> Expected:
    r = t.r[t.mask]
    size = r.sum() ** 2 / (len(r) * (r**2).sum()) if len(r) else 1.0
    capped, slope = np.minimum(t.r, size), -np.expm1(-t.log_r)
    divergence = t.log_r - slope
    return _penalised(
        t, [-capped * t.a * t.logp, divergence, -size * divergence], [t.a * capped, -slope, size * slope], condition=3.0
    )


def _drpo_topk(t: Tokens, delta: float) -> Expected:
    within = t.is_sampled.any(2)
    shift = t.mu * t.r - t.mu
    scale = np.abs(t.a) / (2 * delta)
    squares = (t.topk_pi - t.topk_mu) ** 2
    pull = t.topk_pi * (t.topk_pi - t.topk_mu)
    of_sampled = np.where(within, (pull * t.is_sampled).sum(2) / t.r, shift)
    return Expected(
        loss=[
            -t.r * t.a,
            *(scale[..., None] * squares).transpose(2, 0, 1),
            np.where(within, 0, scale * shift * (t.r - 1)),
        ],
        weight=[np.ones_like(t.r), -np.sign(t.a) * of_sampled / delta],
        others=[
            np.where(t.is_sampled, 0, -np.abs(t.a)[..., None] * t.topk_pi * p / delta) for p in (t.topk_pi, -t.topk_mu)
        ],
    )


def _drpo_unweighted(t: Tokens, delta: float) -> Expected:
    return _penalised(t, [t.mu * t.excess**2 / (2 * delta), -t.r * t.a], [t.a * t.r, -t.r * t.mu * t.excess / delta])


def _dro(t: Tokens, beta: float) -> Expected:
    log_r = t.log_r
    return _penalised(t, [beta / 2 * log_r**2, -t.a * t.logp], [t.a, -beta * log_r])


def _penalised(
    t: Tokens, loss: list[Array], coefficient: list[Array], at_kink: Array | bool = False, condition: float = 1.0
) -> Expected:
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = [np.where(t.a != 0, c / (t.a * t.r), float(i == 0)) for i, c in enumerate(coefficient)]
    return Expected(loss=loss, weight=weight, coefficient=coefficient, at_kink=at_kink, condition=condition)


def _drpo_tv(t: Tokens, beta: float) -> Expected:
    return Expected(
        loss=[-t.r * t.a, beta * np.abs(t.a) * np.abs(t.mu * t.r - t.mu)],
        weight=[np.ones_like(t.r), -np.sign(t.a * (t.r - 1)) * beta * t.mu],
    )


def _drpo_k3(t: Tokens, beta: float) -> Expected:
    scale = beta * np.abs(t.a)
    return Expected(
        loss=[-t.r * t.a, scale * (t.r - 1), -scale * t.log_r],
        weight=[np.ones_like(t.r), -np.sign(t.a) * beta, np.sign(t.a) * beta / t.r],
    )


def _drpo_kl(t: Tokens, beta: float) -> Expected:
    with np.errstate(divide="ignore", invalid="ignore"):
        of_pi, of_mu = (
            np.where(logp > -0.5, np.log(-np.expm1(logp)), np.log1p(-np.exp(logp)))
            for logp in (t.logp, t.behavior_logp)
        )
        others = np.clip(np.where((t.logp == 0) & (t.behavior_logp == 0), 0, of_pi - of_mu), -20, 20)
    scale = beta * np.abs(t.a)
    return Expected(
        loss=[-t.r * t.a, -scale * t.mu * t.log_r, -scale * (1 - t.mu) * others],
        weight=[
            np.ones_like(t.r),
            -np.sign(t.a) * beta * t.pi * np.exp(-others) / t.r,
            np.sign(t.a) * beta * t.mu / t.r,
        ],
    )


def _cispo(t: Tokens, clip_low: float, clip_high: float) -> Expected:
    return Expected(loss=None, weight=[np.clip(t.r, 1 - clip_low, 1 + clip_high) / t.r])


def _sapo(t: Tokens, tau_positive: float, tau_negative: float) -> Expected:
    tau = np.where(t.a > 0, tau_positive, tau_negative)
    decay = np.exp(-np.abs(tau * (t.r - 1)))
    gate = np.where(t.r >= 1, 1 / (1 + decay), decay / (1 + decay))
    return Expected(loss=[-4 / tau * gate * t.a], weight=[4 * decay / (1 + decay) ** 2])


def _dgpo(t: Tokens, clip_low: float, clip_high: float, low_power: float, high_root: float) -> Expected:
    below, above = (t.a < 0) & (t.r < 1 - clip_low), (t.a > 0) & (t.r > 1 + clip_high)
    weight = np.where(
        below, (t.r / (1 - clip_low)) ** low_power, np.where(above, ((1 + clip_high) / t.r) ** (1 / high_root), 1)
    )
    return Expected(loss=[-weight * t.r * t.a], weight=[weight])


def _gspo(t: Tokens, clip_low: float, clip_high: float) -> Expected:
    s = np.exp(t.mean(t.log_r)) + np.zeros_like(t.r)
    low, high = 1 - clip_low, 1 + clip_high
    kept = np.where(((t.a > 0) & (s > high)) | ((t.a < 0) & (s < low)), 0.0, 1.0)
    loss = -np.minimum(s * t.a, np.clip(s, low, high) * t.a)
    return Expected(loss=[loss], weight=[kept * s / t.r], at_kink=_near(s, low) | _near(s, high))


def _gmpo(t: Tokens, clip_low: float, clip_high: float) -> Expected:
    log_r = t.log_r
    bounded = np.where(t.a > 0, np.minimum(log_r, clip_high), np.maximum(log_r, -clip_low))
    g = np.exp(t.mean(bounded)) + np.zeros_like(t.r)
    at_kink = np.where(t.a > 0, _near(log_r, clip_high), _near(log_r, -clip_low))
    return Expected(loss=[-g * t.a], weight=[np.where(bounded == log_r, g / t.r, 0)], at_kink=at_kink)


def _vespo(t: Tokens, k_positive: float, lambda_positive: float, k_negative: float, lambda_negative: float) -> Expected:
    k, rate = np.where(t.a < 0, k_negative, k_positive), np.where(t.a < 0, lambda_negative, lambda_positive)
    log_w = (t.log_r * t.mask).sum(1, keepdims=True)
    phi = np.exp(rate + k * log_w - rate * np.exp(log_w))
    # The exponent is off by what the sum of log-ratios is, times the powers.
    condition = 1 + k * np.abs(t.log_r * t.mask).sum(1, keepdims=True) + rate * np.exp(np.minimum(log_w, 7)) * 20
    return Expected(loss=None, weight=[phi / t.r], condition=condition)


def _pg(t: Tokens) -> Expected:
    return Expected(loss=[-t.r * t.a], weight=[np.ones_like(t.r)])


def _corrected(weight: Callable[..., tuple[Array, Array | bool]]) -> Callable[..., Expected]:
    """PPO with its defaults, times a weight that comes with where rounding may pick either branch."""

    def expected(t: Tokens, **drawn: float) -> Expected:
        ppo = _ppo(t, PPO.clip_low, PPO.clip_high)
        assert ppo.loss is not None
        with np.errstate(over="ignore"):
            factor, at_kink = weight(t, **drawn)
        return Expected([factor * ppo.loss[0]], [factor * ppo.weight[0]], at_kink=ppo.at_kink | at_kink)

    return expected


def _kept(outside: Array, at_kink: Array, t: Tokens) -> tuple[Array, Array]:
    return np.where(outside, 0.0, 1.0) + np.zeros_like(t.r), at_kink


def _band(values: Array, low: float, high: float) -> tuple[Array, Array]:
    return np.where((values >= low) & (values <= high), values, 0.0), _near(values, low) | _near(values, high)


def _product(t: Tokens) -> Array:
    return np.exp((t.log_rho * t.mask).sum(1, keepdims=True)) + np.zeros_like(t.r)


def _k3(t: Tokens) -> Array:
    return np.expm1(t.log_rho) - t.log_rho


def _sequence_max_k3(t: Tokens, delta: float) -> tuple[Array, Array]:
    worst = np.max(_k3(t), axis=1, keepdims=True, where=t.mask, initial=0.0)
    return _kept(worst > delta, _near(worst, delta), t)


def _sequence_mean_k3(t: Tokens, delta: float) -> tuple[Array, Array]:
    return _kept(t.mean(_k3(t)) > delta, _near(t.mean(_k3(t)), delta), t)


def _sequence_geometric(t: Tokens, low: float, high: float) -> tuple[Array, Array]:
    mean = np.exp(t.mean(t.log_rho))
    return _kept((mean < low) | (mean > high), _near(mean, low) | _near(mean, high), t)


def _opsm(t: Tokens, delta: float) -> tuple[Array, Array]:
    left = t.mean(np.clip(t.sampler_logp - t.logp, -20, 20))
    return _kept((t.a < 0) & (left > delta), np.isclose(left, delta, rtol=1e-4, atol=1e-6), t)


def _kpop(t: Tokens, delta: float) -> tuple[Array, Array]:
    old, sampler = t.mu, np.exp(t.sampler_logp)
    with np.errstate(divide="ignore", invalid="ignore"):
        others = np.log1p(-sampler) - np.log1p(-old)
        forward = -sampler * t.log_rho + (1 - sampler) * others
        reverse = old * t.log_rho - (1 - old) * others
    # As with dppo_kl.
    unsure = (np.maximum(old, sampler) > 1 - 1e-3) | (np.abs(t.log_rho) > 19.99)
    divergence = np.where(unsure, 0.0, np.maximum(forward, reverse))
    return _kept(divergence > delta, unsure | np.isclose(divergence, delta, rtol=1e-3, atol=0), t)


def _vaco(t: Tokens, delta: float) -> tuple[Array, Array]:
    distance = t.mean(np.abs(t.r_sampler - 1))
    return _kept((t.a * (t.r_sampler - 1) > 0) & (distance > delta), _near(distance, delta), t)


REFERENCE: dict[str, tuple[Callable[..., Expected], dict[str, tuple[float, float]]]] = {
    "drpo": (_drpo, {"delta": (0.02, 20)}),
    "mask_drpo": (_mask_drpo, {"delta": (0.02, 0.9)}),
    "drpo_topk": (_drpo_topk, {"delta": (0.02, 20)}),
    "drpo_unweighted": (_drpo_unweighted, {"delta": (0.02, 20)}),
    "drpo_kl": (_drpo_kl, {"beta": (0.01, 2)}),
    "drpo_tv": (_drpo_tv, {"beta": (0.01, 2)}),
    "drpo_k3": (_drpo_k3, {"beta": (0.01, 2)}),
    "dppo_tv": (_dppo_tv, {"delta": (0.02, 0.9)}),
    "dppo_kl": (_dppo_kl, {"delta": (0.01, 0.5)}),
    "dppo_topk_tv": (_dppo_topk_tv, {"delta": (0.02, 0.9)}),
    "dppo_topk_kl": (_dppo_topk_kl, {"delta": (0.01, 0.5)}),
    "ipo": (_ipo, {"delta": (0.02, 0.9)}),
    "m2po": (_m2po, {"clip_low": (0.01, 0.9), "clip_high": (0.01, 5), "tau": (0.001, 10)}),
    "clip_cov": (
        _clip_cov,
        {"clip_low": (0.01, 0.9), "clip_high": (0.01, 5), "share": (1, 2), "cov_low": (0.01, 2), "cov_high": (0.1, 20)},
    ),
    "kl_cov": (_kl_cov, {"share": (1e-4, 0.5), "beta": (0.01, 2)}),
    "p3o": (_p3o, {}),
    "rollout_is": (_rollout_is, {"clip_low": (0.01, 0.9), "clip_high": (0.01, 5)}),
    "pg_tv_penalty": (_pg_tv_penalty, {"beta": (0.01, 2)}),
    "mask_drpo_region": (_mask_drpo_region, {"delta": (0.02, 20), "region_delta": (0.02, 0.9)}),
    "cppo_soft": (
        _cppo_soft,
        {"delta": (0.02, 0.5), "weight_min": (0.1, 1), "allowance_low": (0.01, 0.1), "allowance_high": (0.01, 0.2)},
    ),
    "cppo": (
        _cppo,
        {"delta": (0.02, 0.5), "weight_min": (0.1, 1), "allowance_low": (0.01, 0.1), "allowance_high": (0.01, 0.2)},
    ),
    "pdm": (_pdm, {"delta": (0.02, 0.9)}),
    "spo": (_spo, {"epsilon": (0.02, 20)}),
    "pg": (_pg, {}),
    "vespo": (
        _vespo,
        {"k_positive": (1, 4), "lambda_positive": (1, 4), "k_negative": (1, 4), "lambda_negative": (1, 4)},
    ),
    "ppo": (_ppo, {"clip_low": (0.01, 0.9), "clip_high": (0.01, 5)}),
    "ppo_dual_clip": (_ppo_dual_clip, {"clip_low": (0.01, 0.9), "clip_high": (0.01, 5), "clip_dual": (0.1, 5)}),
    "icepop": (
        _icepop,
        {"clip_low": (0.01, 0.9), "clip_high": (0.01, 5), "mask_low": (0.1, 0.9), "mask_high": (1.1, 9)},
    ),
    "cispo": (_cispo, {"clip_low": (0.01, 10), "clip_high": (0.01, 5)}),
    "sapo": (_sapo, {"tau_positive": (0.1, 3), "tau_negative": (0.1, 3)}),
    "dgpo": (_dgpo, {"clip_low": (0.01, 0.9), "clip_high": (0.01, 5), "low_power": (0.5, 3), "high_root": (1, 4)}),
    "gspo": (_gspo, {"clip_low": (0.01, 0.9), "clip_high": (0.01, 5)}),
    "gmpo": (_gmpo, {"clip_low": (0.1, 2), "clip_high": (0.1, 2)}),
    "dro": (_dro, {"beta": (0.01, 2)}),
    "token_truncate": (_corrected(lambda t, cap: (np.minimum(t.r_sampler, cap), False)), {"cap": (0.1, 9)}),
    "sequence_truncate": (_corrected(lambda t, cap: (np.minimum(_product(t), cap), False)), {"cap": (0.1, 9)}),
    "token_mask": (
        _corrected(lambda t, low, high: _band(t.r_sampler, low, high)),
        {"low": (0.1, 0.9), "high": (1.1, 9)},
    ),
    "sequence_mask": (
        _corrected(lambda t, low, high: _band(_product(t), low, high)),
        {"low": (0.1, 0.9), "high": (1.1, 9)},
    ),
    "sequence_max_k3": (_corrected(_sequence_max_k3), {"delta": (0.001, 3)}),
    "sequence_mean_k3": (_corrected(_sequence_mean_k3), {"delta": (0.001, 3)}),
    "sequence_geometric": (_corrected(_sequence_geometric), {"low": (0.1, 0.99), "high": (1.01, 9)}),
    "opsm": (_corrected(_opsm), {"delta": (0.001, 3)}),
    "kpop": (_corrected(_kpop), {"delta": (0.001, 0.5)}),
    "vaco": (_corrected(_vaco), {"delta": (0.001, 3)}),
}
"""By name: the reference, and the range of each hyperparameter (of its distance from the one it has to exceed, if any)."""

ABOVE = {"clip_dual": "1", "allowance_high": "allowance_low", "cov_high": "cov_low"}
"""Hyperparameters that have to exceed another one, or 1; the references add it."""


def _scale(mask: Array, mode: str, length: Array | int) -> Array:
    counted = mask.astype(np.float64)
    if mode == "token-mean":
        return counted / max(counted.sum(), 1)
    counted /= max(mask.any(axis=1).sum(), 1)
    if mode == "seq-mean-token-sum":
        return counted
    if mode == "seq-mean-token-mean":
        return counted / np.maximum(mask.sum(axis=1, keepdims=True), 1)
    return counted / length


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


def _close(got: torch.Tensor, terms: list[Array], tolerance: Array, where: NDArray[np.bool_]) -> None:
    # A sum of terms is exact to the size of the terms, not of their difference. A μ below 1e-38 is 0 in fp32, and r may be e^20.
    error = np.abs(got.detach().double().numpy() - sum(terms))
    allowed = tolerance * sum(np.abs(term) for term in terms) + 1e-28
    assert (error <= allowed)[where].all(), f"off by {error[where]} where {allowed[where]} is allowed"


def _supports(
    rng: np.random.Generator, logp: Array, behavior_logp: Array, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two or three other tokens of either policy, with what the sampled one leaves, and whether it is among them."""
    is_sampled = np.zeros((*logp.shape, 3), dtype=bool)
    is_sampled[..., 0] = rng.random(logp.shape) < 0.5
    supports = []
    for sampled in (logp, behavior_logp):
        share = rng.dirichlet(np.full(4, 0.5), size=logp.shape)[..., :3].clip(1e-30)
        left = np.maximum(-np.expm1(sampled), 1e-30)
        log_p = np.where(is_sampled, sampled[..., None], np.log(share * left[..., None]))
        supports.append(torch.from_numpy(np.minimum(log_p, 0)).to(dtype))
    return supports, torch.from_numpy(is_sampled)


def fuzzed(batches: int) -> Callable[[Any], Any]:
    """A test of an objective or a correction on drawn batches, over all of them so many."""
    each = settings(max_examples=-(-batches // len(EVERY)), deadline=None, derandomize=True, database=None)
    drawn = given(
        seed=st.integers(0, 2**32 - 1),
        shape=st.tuples(st.integers(1, 4), st.sampled_from([0, 1, 2, 5, 16])),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
        mode=st.sampled_from(MODES),
    )
    return lambda test: pytest.mark.parametrize("name", EVERY)(each(drawn(test)))


@fuzzed(2_500)
def test_loss_weight_and_gradient_are_finite_and_match_an_independent_reference(name: str, **drawn: Any) -> None:
    check_against_the_reference(name, **drawn)


@pytest.mark.long
@fuzzed(20_000)
def test_they_are_and_do_on_many_more_batches(name: str, **drawn: Any) -> None:
    check_against_the_reference(name, **drawn)


def check_against_the_reference(name: str, seed: int, shape: tuple[int, int], dtype: torch.dtype, mode: str) -> None:
    rng = np.random.default_rng(seed)
    reference, ranges = REFERENCE.get(name, (None, {}))
    drawn = {field: float(np.exp(rng.uniform(*np.log(bounds)))) for field, bounds in ranges.items()}
    hyperparameters = {
        field: value + (drawn.get(ABOVE[field], 1.0) if field in ABOVE else 0) for field, value in drawn.items()
    }
    # What the two modes divide a sequence's sum by.
    horizon, mean_lengths = int(rng.integers(1, 100)), rng.uniform(1, 20, shape[0])
    needed = {
        "seq-mean-token-sum-norm": {"horizon": horizon},
        "prompt-mean": {"mean_lengths": torch.tensor(mean_lengths)},
    }

    # Rounded to the dtype first: the reference starts from what the library is given.
    advantage = _advantages(rng, shape)
    if by_sequence := rng.random() < 0.3:
        advantage = advantage[:, :1].repeat(shape[1], axis=1) if shape[1] else advantage
    log_probs = _log_probs(rng, shape)
    sampler = np.minimum(log_probs[1] + rng.choice([0, 0.1, 3, 30], shape) * rng.standard_normal(shape), 0)
    inputs = [torch.from_numpy(a).to(dtype) for a in (*log_probs, advantage, sampler)]
    logp, behavior_logp, advantage, sampler = (t.double().numpy() for t in inputs)
    support, is_sampled = _supports(rng, logp, behavior_logp, dtype)
    computed = torch.promote_types(dtype, torch.float32)

    def expect(mask: NDArray[np.bool_]) -> Expected:
        if reference is None:
            return Expected(loss=None, weight=[])
        tokens = Tokens(
            logp=logp,
            behavior_logp=behavior_logp,
            a=advantage,
            mask=mask,
            sampler_logp=sampler,
            topk_pi=support[0].double().exp().numpy(),
            topk_mu=support[1].double().exp().numpy(),
            is_sampled=is_sampled.numpy(),
            eps=torch.finfo(computed).eps,
        )
        with np.errstate(divide="ignore"):
            return reference(tokens, **drawn)

    mask = _mask(rng, shape)
    # A token at a kink tells on the rest of its sequence, if at all: the rows go as a whole.
    while (kinked := np.asarray(expect(mask).at_kink) & mask).any():
        mask = mask & ~kinked.any(axis=1, keepdims=True)
    expected = expect(mask)

    counts = torch.from_numpy(mask)
    garbage = [torch.from_numpy(rng.choice(GARBAGE, shape)).to(dtype) for _ in inputs]
    leaf, given_behavior, given_advantage, given_sampler = (
        torch.where(counts, t, g) for t, g in zip(inputs, garbage, strict=True)
    )
    # What requires a gradient is not taken in fp16, which cannot hold it.
    leaf = (leaf.float() if dtype == torch.float16 else leaf).requires_grad_()
    if by_sequence and shape[1]:
        given_advantage = inputs[2][:, 0]
    topk = TopK(
        *(torch.where(counts.unsqueeze(2), t, g.unsqueeze(2)) for t, g in zip(support, garbage[:2], strict=True)),
        is_sampled,
    )
    topk.logp.requires_grad_()
    if name in CORRECTIONS:
        objective = Corrected(PPO(), make_correction(name, **hyperparameters))
    else:
        objective = make_objective(name, **hyperparameters)
    if objective.corrects_mismatch or name in CORRECTIONS:
        batch = TokenBatch(leaf, given_sampler, given_advantage, counts, given_behavior, "old", topk)
    else:
        batch = TokenBatch(leaf, given_behavior, given_advantage, counts, given_sampler, "sampler", topk)
    assert batch.topk is not None
    loss = aggregate(objective.loss(batch), batch.mask, mode, **needed.get(mode, {}))  # type: ignore[arg-type]
    at_leaf, gradient, by_topk = torch.autograd.grad(
        loss, [leaf, batch.logp, batch.topk.logp], allow_unused=True, materialize_grads=True
    )

    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (at_leaf[~counts] == 0).all()
    assert (by_topk[~counts] == 0).all()
    assert at_leaf.isfinite().all()
    assert torch.equal(at_leaf[counts], gradient.to(leaf.dtype)[counts])
    assert objective.gradient_weight(batch).isfinite().all()
    if reference is None:
        return

    tolerance = TOLERANCE[batch.logp.dtype] * np.broadcast_to(expected.condition, shape)
    scale = _scale(mask, mode, mean_lengths[:, None] if mode == "prompt-mean" else horizon)
    if expected.loss is not None:
        terms = np.concatenate([(scale * term)[mask] for term in expected.loss])
        assert abs(loss.item() - terms.sum()) <= TOLERANCE[batch.logp.dtype] * np.abs(terms).sum() + 1e-30
    _close(objective.gradient_weight(batch), expected.weight, tolerance, mask)
    r = np.exp(np.clip(logp - behavior_logp, -20, 20))
    coefficient = expected.coefficient or [advantage * r * term for term in expected.weight]
    total = gradient + (by_topk * topk.is_sampled).sum(dim=2)
    everywhere = np.ones(shape, dtype=bool)
    _close(total, [-scale * term for term in coefficient], tolerance, everywhere)
    others = [-scale[..., None] * term for term in expected.others or [np.zeros(by_topk.shape)]]
    _close(by_topk.masked_fill(topk.is_sampled, 0), others, tolerance[..., None] * np.ones(3), everywhere)
