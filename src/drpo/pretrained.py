"""A model and its tokenizer from a folder or the hub, with every weight that the model has."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.errors import UserError


def load_pretrained(name: str, dtype: torch.dtype, *, field: str, expected: str) -> tuple[Any, Any]:
    """The model and its tokenizer, which pads on the left.

    Args:
        name: a folder saved by Transformers, or a model on the hub.
        dtype: of the weights.
        field: where the name was given, for messages.
        expected: what else it may be, for messages.

    Raises:
        UserError: it cannot be loaded, or lacks weights, of which Transformers would draw random ones.
    """
    try:
        # Code that a folder brings along is refused; without a word here Transformers asks on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        model, loading_info = loaded
    except Exception as error:  # a damaged folder fails in as many ways as there are files in it
        raise UserError(
            f"{field}: cannot load {name!r}: expected {expected}, a folder saved by Transformers, or a model on the "
            f"Hugging Face hub ({str(error)[:200]})"
        ) from error
    if missing := sorted(loading_info["missing_keys"]):
        raise UserError(
            f"{field}: {name!r} lacks {len(missing)} of the weights that its config.json asks for, {missing[0]} among them; "
            "expected the weights of a causal language model and the config.json that belongs to them"
        )
    return model, tokenizer


def is_repo_id(name: str) -> bool:
    """Whether a model of that name could be on the Hugging Face hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
