"""Measurements against named peers. ``python -m benchmarks --list`` says which; each writes a table with its provenance."""

import sys
from pathlib import Path

# Where vLLM samples, it does so through the tests' support.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
