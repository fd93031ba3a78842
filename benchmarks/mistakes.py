"""What a mistake looks like: log π against log μ of the first rollout of the built-in model, before any update.

A trainer with each fault and one without; SEQUENCES of the rollout's sequences are kept, a row a token. The audit stops
each run but the first, and a row has its verdict.
"""

from __future__ import annotations

import logging
from typing import Any

import transformers
from matplotlib.figure import Figure

from benchmarks import tables
from benchmarks.first_rollout import first_rollout
from drpo import DRPOTrainer

SEQUENCES = 32
SHOWN_FIRST = 2
"""Tokens at the beginning of a completion that are drawn apart."""

PACKAGES = ("torch", "transformers", "trl")


class OtherPrompt(DRPOTrainer):
    """A trainer whose sampler sees a space more in front of the prompt, as of another chat template."""

    def _generate_single_turn(self, prompt_ids: Any, *more: Any, **kwargs: Any) -> Any:
        tokenizer: Any = self.processing_class
        space = tokenizer(" ")["input_ids"]
        return super()._generate_single_turn([space + ids for ids in prompt_ids], *more, **kwargs)


FAULTS: dict[str, dict[str, Any]] = {
    "no mistake": {},
    "sampled at temperature 0.7, scored at 1": {"generation_kwargs": {"temperature": 0.7}},
    "a space more in the sampler's prompt": {"kind": OtherPrompt},
    "attention dropout of 0.1 in training": {"of_model": {"attention_dropout": 0.1}},
}
"""What each run changes."""


def run(command: str) -> list[dict[str, Any]]:
    logging.disable()
    transformers.utils.logging.disable_progress_bar()
    provenance = tables.provenance(command, PACKAGES)
    rows = []
    for fault, changes in FAULTS.items():
        trainer, sequences = first_rollout(0, train_precision="fp32", **changes)
        assert trainer.audit is not None
        audit = {"audit_mean": f"{trainer.audit.mean:.3g}", "audit_passed": trainer.audit.passed}
        for number, sequence in enumerate(sequences[:: len(sequences) // SEQUENCES]):
            pairs = zip(sequence["behavior_logp"], sequence["logp"], strict=True)
            for place, (behavior_logp, logp) in enumerate(pairs):
                token = {
                    "sequence": number,
                    "token": place,
                    "behavior_logp": f"{behavior_logp:.4f}",
                    "logp": f"{logp:.4f}",
                }
                rows.append({"fault": fault, **audit, **token, **provenance})
    return rows


def plot(rows: list[dict[str, str]]) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(FAULTS), sharex=True, sharey=True)
    for axes, fault in zip(panels, FAULTS, strict=True):
        chosen = [row for row in rows if row["fault"] == fault]
        axes.axline((0, 0), slope=1, color="0.6", linewidth=1, zorder=0)
        for label, color, marker, is_first in (
            ("later tokens", "C0", "o", False),
            ("first two tokens", "C1", "^", True),
        ):
            points = [row for row in chosen if (int(row["token"]) < SHOWN_FIRST) == is_first]
            places = [[float(row[name]) for row in points] for name in ("behavior_logp", "logp")]
            axes.scatter(*places, s=9, alpha=0.6, color=color, marker=marker, linewidths=0, label=label)
        axes.set_title(fault, fontsize=9)
        axes.set_xlabel(f"log μ\naudit: {chosen[0]['audit_mean']} nats on average", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("log π")
    panels[0].set_xlim(-8, 0.2)
    panels[0].set_ylim(-12, 0.2)
    panels[0].legend(frameon=False, fontsize=8)
    return figure
