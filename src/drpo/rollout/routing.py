"""Which experts a mixture's routers choose for each token: recorded while sampling, compared and replayed while training.

Two engines that differ in rounding choose other experts where two are nearly as good, which moves log-probs further than
the rounding did. Training on the sampler's choices is router replay (R3, arXiv 2510.11370).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def find_routers(model: nn.Module) -> list[Any]:
    """The modules of a Transformers model that choose a token's experts with one ``topk``, in the order of its layers."""
    return [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]


class _Choosing(TorchFunctionMode):
    """Within this mode ``choose`` replaces the indices that ``torch.topk`` returns."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.calls = 0
        self._choose = choose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return result
        self.calls += 1
        places = self._choose(result.indices)
        # Weights are made of these scores as the model makes them of its own choice.
        return torch.return_types.topk((args[0].gather(-1, places), places))


def _route_with(router: Any, choose: Callable[[Tensor], Tensor]) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Choosing(choose) as mode:
            outputs = type(router).forward(router, *args, **kwargs)
        if mode.calls != 1:
            raise RuntimeError(f"{type(router).__name__} calls topk {mode.calls} times; expected one choice of experts")
        return outputs

    router.forward = forward


class ChosenExperts:
    """The experts that a model's routers choose.

    Args:
        routers: of the model.
    """

    def __init__(self, routers: Sequence[Any]) -> None:
        self._passes: list[list[Tensor]] = [[] for _ in routers]
        is_few = all(getattr(router, "num_experts", 1 << 15) <= 256 for router in routers)
        self._dtype = torch.uint8 if is_few else torch.int16

    def see(self, layer: int, experts: Tensor) -> Tensor:
        """See the choice of a layer's router, [N, K], which stays as it is."""
        self._passes[layer].append(experts)
        return experts

    def take(self, rows: int) -> Tensor:
        """What was chosen since the last call for so many rows, [rows, T, layers, K], uint8 or int16."""
        layers = [torch.cat([one.view(rows, -1, one.shape[-1]) for one in passes], dim=1) for passes in self._passes]
        for passes in self._passes:
            passes.clear()
        return torch.stack(layers, dim=2).to(self._dtype)


@contextmanager
def recording_experts(model: nn.Module) -> Iterator[ChosenExperts]:
    """Within this context the model's routers are seen choosing, by their own scores even where others are replayed."""
    routers = find_routers(model)
    chosen = ChosenExperts(routers)
    own = [vars(router).get("forward") for router in routers]
    for layer, router in enumerate(routers):
        _route_with(router, lambda experts, layer=layer: chosen.see(layer, experts))
    try:
        yield chosen
    finally:
        for router, forward in zip(routers, own, strict=True):
            del router.forward
            if forward is not None:
                router.forward = forward


class ExpertReplay:
    """Compares the experts that a policy's routers choose with those that its sampler chose.

    Args:
        model: the policy, whose routers are changed.
        takes_recorded: whether tokens go to the sampler's experts, with weights that the policy gives them.
    """

    def __init__(self, model: nn.Module, takes_recorded: bool) -> None:
        self.takes_recorded = takes_recorded
        self._recorded: Tensor | None = None
        self._differing: dict[int, Tensor] = {}
        for layer, router in enumerate(find_routers(model)):
            _route_with(router, lambda experts, layer=layer: self._choose(layer, experts))

    def expect(self, recorded: Tensor | None) -> None:
        """Say what was recorded of the tokens of the next forward pass.

        It holds until the next call, or that of :meth:`end_update`: where activations are checkpointed, the backward pass
        computes them again.

        Args:
            recorded: [..., layers, K], in the order of the model's input of N tokens; None leaves all as it is.
        """
        self._recorded = None if recorded is None else recorded.flatten(0, -3)
        self._differing = {}

    def end_update(self) -> None:
        """Leave further passes, such as those of generation, as they are."""
        self._recorded = None

    def differing_at(self, shape: Sequence[int], places: Any) -> Tensor | None:
        """The share of the sampler's experts that the policy would not have chosen in the last pass; None if nothing was expected.

        Args:
            shape: of the model's input.
            places: an index of tensors into it.

        Returns:
            [tokens, layers].
        """
        if not self._differing:
            return None
        by_layer = [share for _, share in sorted(self._differing.items())]
        return torch.stack(by_layer, dim=1).view(*shape, -1)[places]

    def _choose(self, layer: int, experts: Tensor) -> Tensor:
        if self._recorded is None:
            return experts
        if layer >= self._recorded.shape[1]:
            raise RuntimeError(f"experts of {self._recorded.shape[1]} layers were recorded; the model has more routers")
        recorded = self._recorded[:, layer].to(experts)
        if recorded.shape != experts.shape:
            raise RuntimeError(f"{tuple(experts.shape)} experts are chosen; {tuple(recorded.shape)} were recorded")
        is_chosen = (recorded.unsqueeze(2) == experts.unsqueeze(1)).any(dim=2)
        self._differing[layer] = 1 - is_chosen.float().mean(dim=1)
        return recorded if self.takes_recorded else experts
