"""The order in which the prompts of a data set come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler


class PromptSampler(Sampler[int]):
    """TRL's order of prompts, which here depends on seed and epoch alone: a resumed run begins its epoch in the same order.

    Args:
        sampler: TRL's, which draws a permutation an epoch from a generator that no checkpoint holds.
        seed: of that generator.
        epoch: says which epoch begins, from 0 on.
    """

    def __init__(self, sampler: RepeatSampler, seed: int, epoch: Callable[[], int]) -> None:
        self._sampler, self._seed, self._epoch = sampler, seed, epoch

    def __iter__(self) -> Iterator[int]:
        if self._sampler.shuffle:
            self._sampler.generator.manual_seed(self._seed)
            for _ in range(self._epoch()):
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)
