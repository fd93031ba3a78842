"""The tokens of an update as they were trained on, in rows that ``drpo inspect`` reads."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from drpo.tokens import TokenBatch
from drpo.trainer.batch import RolloutBatch, loss_mask


class TokenLog:
    """Collects every sequence that went through the model: its texts, reward and advantage, the log-probs of both policies
    and the gradient weight of each token, and the sampler's age in rollouts.

    Args:
        tokenizer: what turns token ids into text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._rows: list[dict[str, Any]] = []

    def add(self, batch: RolloutBatch, sampled: TokenBatch, weight: Tensor) -> None:
        """Add the sequences of a micro-batch.

        Args:
            batch: of those sequences.
            sampled: their tokens that count, in order; padding may be between them.
            weight: the objective's gradient weight of each token, as ``sampled`` has them.
        """
        counted = loss_mask(batch).bool()
        sizes = counted.sum(dim=1).tolist()
        columns = {
            "tokens": batch["completion_ids"][counted],
            "logp": sampled.logp.detach()[sampled.mask].float(),
            "behavior_logp": sampled.behavior_logp[sampled.mask].float(),
            "weight": weight[sampled.mask].float(),
        }
        if "old_per_token_logps" in batch:
            columns["old_logp"] = batch["old_per_token_logps"][counted].float()
        split = {name: column.cpu().split(sizes) for name, column in columns.items()}
        of_rows = {
            "advantage": batch["advantages"].tolist(),
            "reward": batch["rewards"].tolist(),
            "age": batch["age"].tolist(),
            "prompt": self._texts(batch["prompt_ids"], batch["prompt_mask"]),
            "completion": self._texts(batch["completion_ids"], batch["completion_mask"]),
        }
        for row, size in enumerate(sizes):
            if size:
                tokens = {name: parts[row].tolist() for name, parts in split.items()}
                text = self._tokenizer.batch_decode([[token] for token in tokens["tokens"]])
                self._rows.append({**{name: values[row] for name, values in of_rows.items()}, **tokens, "text": text})

    def _texts(self, ids: Tensor, mask: Tensor) -> list[str]:
        return self._tokenizer.batch_decode([row[counted.bool()] for row, counted in zip(ids, mask, strict=True)])

    def take(self) -> list[dict[str, Any]]:
        """The rows of all ranks since the last call, on every rank."""
        rows, self._rows = self._rows, []
        return gather_object(rows)
