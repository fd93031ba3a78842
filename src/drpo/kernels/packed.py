"""Sampled tokens without padding, as the fused loss takes them, and the batch an objective sees of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drpo.tokens import Anchor, TokenBatch, TopK


@dataclass(frozen=True)
class PackedTokens:
    """N tokens of some sequences, one after another. Checked here, once.

    Args:
        token_ids: [N], int64.
        behavior_logp: [N], log μ, the sampler's, in nats.
        advantage: [N].
        scale: [N], the weight of each token's loss in the sum (:func:`drpo.token_scale`, flattened).
        old_logp: [N], log π_old, where the policy has moved since the rollout began; without it and
            anchored on it r = 1.
        anchor: what the ratio is taken against.
        sequence_ids: [N], which sequence each token belongs to, not decreasing.
        top_k_ids: [N, K], the sampler's likeliest tokens.
        top_k_behavior_logp: [N, K], their log μ.

    Raises:
        ValueError: a shape or dtype that does not fit, or sequences out of order.
    """

    token_ids: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    scale: Tensor
    old_logp: Tensor | None = None
    anchor: Anchor = "sampler"
    sequence_ids: Tensor | None = None
    top_k_ids: Tensor | None = None
    top_k_behavior_logp: Tensor | None = None

    def __post_init__(self) -> None:
        if self.token_ids.dim() != 1:
            raise ValueError(f"token_ids has shape {tuple(self.token_ids.shape)}; expected one dimension, [N]")
        for name, ids in self._ids().items():
            if ids.dtype != torch.int64:
                raise ValueError(f"{name} has dtype {ids.dtype}; expected torch.int64")
        for name, tensor in self._tensors().items():
            dims = 2 if name.startswith("top_k") else 1
            if tensor.dim() != dims or len(tensor) != len(self.token_ids):
                expected = f"({len(self.token_ids)}{', K' if dims == 2 else ','})"
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}, as token_ids has")
        if (self.top_k_ids is None) != (self.top_k_behavior_logp is None):
            raise ValueError("top_k_ids and top_k_behavior_logp belong together; got one of them")
        if self.sequence_ids is not None and (self.sequence_ids.diff() < 0).any():
            raise ValueError("sequence_ids decreases; expected the tokens of each sequence together, in order")

    def __len__(self) -> int:
        return len(self.token_ids)

    def chunk(self, rows: slice) -> PackedTokens:
        """Some of the tokens, as if of one sequence."""
        tensors = {name: tensor[rows] for name, tensor in self._tensors().items()}
        return replace(self, **(tensors | {"sequence_ids": None}))

    def check_vocabulary(self, size: int) -> None:
        """Raise a ValueError where an id is not of a vocabulary of ``size``."""
        for name, ids in self._ids().items():
            least, greatest = torch.stack(ids.aminmax()).tolist() if ids.numel() else (0, 0)
            if least < 0 or greatest >= size:
                wrong = least if least < 0 else greatest
                raise ValueError(f"{name} has {wrong}; expected tokens of the vocabulary, 0 to {size - 1}")

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _ids(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._tensors().items() if name in ("token_ids", "top_k_ids")}

    def batch(self, logp: Tensor, top_k_logp: Tensor | None = None) -> TokenBatch:
        """The tokens under log-probs ``logp`` [N]: one row a sequence if there are ``sequence_ids``, else one row of all."""
        topk = None
        if top_k_logp is not None and self.top_k_ids is not None and self.top_k_behavior_logp is not None:
            is_sampled = self.top_k_ids == self.token_ids.unsqueeze(1)
            topk = TopK(*(self.rows(t) for t in (top_k_logp, self.top_k_behavior_logp, is_sampled)))
        old_logp = logp.detach() if self.anchor == "old" and self.old_logp is None else self.old_logp
        return TokenBatch(
            logp=self.rows(logp),
            behavior_logp=self.rows(self.behavior_logp),
            advantage=self.rows(self.advantage),
            mask=self.rows(torch.ones_like(self.token_ids, dtype=torch.bool)),
            old_logp=None if old_logp is None else self.rows(old_logp),
            anchor=self.anchor,
            topk=topk,
        )

    @property
    def likeliest_ids(self) -> Tensor:
        """``top_k_ids``, for objectives that look at them."""
        assert self.top_k_ids is not None
        return self.top_k_ids

    def rows(self, values: Tensor) -> Tensor:
        """[N, ...] as [B, T, ...], zeros where there is no token."""
        if self.sequence_ids is None:
            return values.unsqueeze(0)
        sequence, position = self._places()
        shape = (int(sequence[-1]) + 1, int(position.max()) + 1) if len(self) else (0, 0)
        rows = values.new_zeros(*shape, *values.shape[1:])
        return rows.index_put((sequence, position), values)

    def flatten(self, rows: Tensor) -> Tensor:
        """What :meth:`rows` was made of."""
        return rows.squeeze(0) if self.sequence_ids is None else rows[self._places()]

    def _places(self) -> tuple[Tensor, Tensor]:
        assert self.sequence_ids is not None
        _, sequence, lengths = self.sequence_ids.unique_consecutive(return_inverse=True, return_counts=True)
        first = lengths.cumsum(0) - lengths
        return sequence, torch.arange(len(sequence), device=sequence.device) - first[sequence]
