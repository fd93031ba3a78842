"""Mathematical problems in one schema: read, checked, de-duplicated, compared with what is evaluated on."""

from drpo.data.files import Row, read_rows
from drpo.data.sources import SOURCES

__all__ = ["SOURCES", "Row", "read_rows"]
