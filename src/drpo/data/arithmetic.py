"""The built-in task: chained additions and subtractions, solved one running total at a time.

A problem is a prompt such as ``17+25-8+34=``; a solution writes the running total after every
operation, ``42,34,68``, and its last number is the answer.
"""

from __future__ import annotations

import random
import string
from pathlib import Path

from drpo.data.split import Split, draw

MODEL_PATH = Path(__file__).parent / "arithmetic_model"
"""The model pretrained on this task (Qwen3 architecture, character tokenizer), made by ``scripts/pretrain_arithmetic.py``."""


TERMS = 5
LARGEST_TERM = 49
LARGEST_TOTAL = 99


def sample_prompt(rng: random.Random) -> tuple[str, list[int]]:
    """Draw a prompt of ``TERMS`` terms and its running totals, which all lie in [0, LARGEST_TOTAL]."""
    total = rng.randint(1, LARGEST_TERM)
    prompt, totals = str(total), []
    for _ in range(TERMS - 1):
        operand = rng.randint(1, LARGEST_TERM)
        signs = [sign for sign in (1, -1) if 0 <= total + sign * operand <= LARGEST_TOTAL]
        sign = rng.choice(signs)
        total += sign * operand
        prompt += f"{'+' if sign > 0 else '-'}{operand}"
        totals.append(total)
    return prompt + "=", totals


def noisy_totals(totals: list[int], rng: random.Random, error_rate: float) -> list[int]:
    """The running totals, each with probability ``error_rate`` written with one wrong digit and carried on from there."""
    shift, written = 0, []
    for correct in totals:
        total = correct + shift
        if not 0 <= total <= LARGEST_TOTAL:
            total = correct
        if rng.random() < error_rate:
            digits = list(str(total))
            position = rng.randrange(len(digits))
            allowed = string.digits[1:] if position == 0 and len(digits) > 1 else string.digits
            digits[position] = rng.choice([digit for digit in allowed if digit != digits[position]])
            total = int("".join(digits))
        shift = total - correct
        written.append(total)
    return written


def sample_prompts(split: Split, size: int, seed: int) -> dict[str, list[int]]:
    """Draw ``size`` distinct prompts of a split, and the running totals of each; the same for the same seed."""
    return draw(sample_prompt, split, size, f"{split}-{seed}")
