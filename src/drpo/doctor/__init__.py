"""What is wrong with a run before it starts: findings, each with its fix."""

from drpo.doctor.findings import Finding, Verdict, show

__all__ = ["Finding", "Verdict", "show"]
