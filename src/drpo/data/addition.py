"""The task ``addition``: a sum after four examples of it, a line each, for a model that goes on with a text.

A prompt ends in a line such as ``7+12=``, whose answer is ``19``. Its last line alone is the question that decides on
its split: there are 361 of them, with any examples.
"""

from __future__ import annotations

import random

EXAMPLES = 4
LARGEST = 20


def sample_prompt(rng: random.Random) -> tuple[str, str]:
    """Draw a prompt and its answer."""
    lines, total = [], 0
    for _ in range(EXAMPLES + 1):
        first, second = rng.randint(2, LARGEST), rng.randint(2, LARGEST)
        total = first + second
        lines.append(f"{first}+{second}={total}")
    return "\n".join(lines).removesuffix(str(total)), str(total)
