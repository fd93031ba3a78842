"""What the trust region did in an update, in the form in which verl averages it.

verl takes the plain mean of a policy loss's metrics over the micro-batches of an update, whatever
they hold, then over the ranks, then over the updates of a rollout (with :mod:`.maxima` the maximum of
all where the name has "max" in it). So after k micro-batches, of which all tokens together measure
R_k, the value given out is k·R_k − (k − 1)·R_{k−1}: the mean of the first k of these is R_k. A rank's
mean over tokens counts by its share of the update's tokens, so that the mean over ranks is one over
tokens; counts are added up.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from drpo.integrations.verl.maxima import is_maximum
from drpo.metrics import TrustRegionMetrics
from drpo.metrics.histograms import LOGGED_BINS
from drpo.tokens import TokenBatch

MEANS = ("ratio/mean", "divergence/mean", "kl/k1", "kl/k3", "chi_squared")
"""Scalars that are means over all tokens."""


class UpdateMetrics:
    """Measurements over the micro-batches of an update on this rank.

    An update ends with the optimizer's step, or with the last of its sequences where verl skips the step.
    """

    def __init__(self) -> None:
        self._measured = TrustRegionMetrics(by_group=False)
        self.reset()

    def reset(self) -> None:
        """Begin another update."""
        self._measured.reset()
        self._micro_batches = self._sequences = self._tokens = 0
        self._before: dict[str, float] = {}

    def add(self, tokens: TokenBatch, weight: Tensor, of: int | None = None, counted: Tensor | None = None) -> None:
        """Add tokens of a micro-batch, [B, T], and the objective's gradient weight of each.

        Args:
            of: the sequences of an update on this rank, where they are known.
            counted: the tokens that verl counts, [B, T], bool, those that cannot be measured too; all measured by default.
        """
        if of is not None and self._sequences >= of:
            self.reset()
        self._sequences += len(tokens.mask)
        self._tokens += int((tokens.mask if counted is None else counted).sum())
        self._measured.update(tokens, weight)

    def take_micro_batch(
        self, histograms: bool = False, ranks: int = 1, update_tokens: int | None = None
    ) -> dict[str, float]:
        """What verl averages, after each micro-batch; always under the same names, since its ranks have to agree on them.

        A share of tokens of which there are none is 0.

        Args:
            histograms: whether counts of the histograms are among them, as ``divergence_histogram/000``.
            ranks: over which verl takes the mean.
            update_tokens: that count, of all ranks; None where they are not known, and each is taken to have as many.
        """
        measured = self._measured.compute()
        now = {name: measured.scalars.get(name, 0.0) for name in _names()}
        if update_tokens:
            share = self._tokens * ranks / update_tokens
            now |= {name: share * now[name] for name in MEANS}
        if histograms:
            for name in LOGGED_BINS:
                counts = getattr(measured, name)
                now |= {f"{name}/{index:03d}": float(ranks * count) for index, count in enumerate(counts)}
        before, k = self._before, self._micro_batches + 1
        self._before, self._micro_batches = now, k
        return {
            f"actor/{name}": value if is_maximum(name) else k * value - (k - 1) * before.get(name, 0.0)
            for name, value in now.items()
        }


MEASURED = UpdateMetrics()
"""Of this process, which has one actor."""

register_optimizer_step_post_hook(lambda *_: MEASURED.reset())


@cache
def _names() -> tuple[str, ...]:
    """Of every scalar that can be measured without the entropy."""
    half = torch.full((1, 2), 0.5).log()
    every = TrustRegionMetrics(by_group=False)
    every.update(TokenBatch(half, half, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2)), torch.ones(1, 2))
    return tuple(every.compute().scalars)
