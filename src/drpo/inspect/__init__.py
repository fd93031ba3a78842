"""Rollouts from anywhere, measured after the fact: ``drpo inspect``."""
