"""What samples: the policy itself, or a copy of it that is some rollouts old or in another precision."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drpo.precision import RolloutPrecision, make_rollout_model, quantized

FOLDER = "behavior_policy"
"""Within a checkpoint: the weights of past rollouts, oldest first."""


class BehaviorPolicy:
    """The policy μ of a run.

    At the beginning of a rollout it takes the weights that the policy had ``lag`` rollouts before
    (its first ones, in the first ``lag`` rollouts), in a copy that is quantized anew each time.

    Args:
        policy: whose class and configuration the copy gets; not yet wrapped by anything.
        lag: in rollouts. The weights of so many are kept in CPU memory and in checkpoints.
        precision: of the copy; None computes as the policy does.
        autocast: what the policy computes within.

    Attributes:
        age: rollouts between the weights that sample and the policy's.
    """

    def __init__(
        self,
        policy: nn.Module,
        lag: int,
        precision: RolloutPrecision | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.lag = lag
        self.age = 0
        self._precision: RolloutPrecision = precision or "fp32"
        self._autocast = autocast if precision is None else nullcontext
        self._past: deque[dict[str, Tensor]] = deque()
        is_copy = lag > 0 or precision is not None
        self._blank = make_rollout_model(policy, self._precision) if is_copy else None
        self._model: Any = None

    @property
    def is_copy(self) -> bool:
        """Whether it has weights of its own, and is not the policy itself."""
        return self._blank is not None

    def begin_rollout(self, policy: nn.Module) -> None:
        """Take the weights to sample from, and remember those of now."""
        if self._blank is None:
            return
        weights: dict[str, Tensor] = policy.state_dict()
        if self.lag:
            self._past.append({name: tensor.to("cpu", copy=True) for name, tensor in weights.items()})
            while len(self._past) > self.lag + 1:
                self._past.popleft()
            self.age = len(self._past) - 1
            weights = self._past[0]
        self._blank.to(next(policy.parameters()).device)
        self._blank.load_state_dict(weights)
        self._model = quantized(self._blank, self._precision)

    @contextmanager
    def sampling(self, policy: Any) -> Iterator[Any]:
        """Within this context ``policy.generate`` is that of the model that samples, which is given back."""
        if self._blank is None:
            yield policy
            return
        model = self._model
        policy.generate = lambda *args, **kwargs: model.generate(*args, **kwargs)
        try:
            with self._autocast():
                yield model
        finally:
            del policy.generate

    @contextmanager
    def weights_of_samples(self, policy: nn.Module) -> Iterator[None]:
        """Within this context the policy has the weights that sampled the rollout."""
        policy.load_state_dict(self._past[0])
        try:
            yield
        finally:
            policy.load_state_dict(self._past[-1])

    def save(self, checkpoint: Path) -> None:
        """Write the weights of past rollouts into a checkpoint."""
        if not self.lag:
            return
        (checkpoint / FOLDER).mkdir(parents=True, exist_ok=True)
        for index, weights in enumerate(self._past):
            save_file(weights, checkpoint / FOLDER / f"{index:04d}.safetensors")

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        if self.lag:
            self._past = deque(map(load_file, sorted((checkpoint / FOLDER).glob("*.safetensors"))))
