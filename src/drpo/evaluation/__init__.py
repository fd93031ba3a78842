"""How good a model is: held-out accuracy while it trains, and sampled evaluations with intervals."""

from drpo.evaluation.heldout import BATCH_SIZE, Evaluation, as_prompt, evaluate

__all__ = ["BATCH_SIZE", "Evaluation", "as_prompt", "evaluate"]
