"""Mathematical problems: read, checked, de-duplicated, compared with what is evaluated on."""

from drpo.data.files import read_problems
from drpo.data.problems import Problem
from drpo.data.sources import SOURCES

__all__ = ["SOURCES", "Problem", "read_problems"]
