"""Measurements against named peers. ``python -m benchmarks --list`` says which; each writes a table with its provenance."""
