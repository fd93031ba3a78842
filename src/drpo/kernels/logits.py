"""From the output of an LM head to the logits of a softmax."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output x of its LM head before the softmax: z = cap·tanh(scale·x / cap) / temperature.

    Args:
        temperature: of sampling.
        scale: a factor; 1 for most models.
        softcap: the cap; None where z = scale·x / temperature.
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("softcap", self.softcap)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; expected a number > 0")

    @property
    def slope(self) -> float:
        """∂z/∂x where the cap has no effect."""
        return self.scale / self.temperature

    def __call__(self, x: Tensor) -> Tensor:
        """z, in place of x."""
        if self.softcap is None:
            return x if self.slope == 1 else x.mul_(self.slope)
        return x.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def damping(self, z: Tensor) -> Tensor:
        """∂z/∂x over :attr:`slope`: 1 − tanh², under a cap."""
        assert self.softcap is not None
        return 1 - (z * (self.temperature / self.softcap)).square_()
