"""verl's training engine in an environment that has TRL in it, as this library's has.

Where it finds TRL installed, verl 0.9.1 patches a class that TRL 1.16.0 no longer has (a model with
a value head), and every FSDP worker stops with an ImportError. No policy loss needs the class, so
verl is left to find, once and for all its process, that there is no TRL.
"""

from __future__ import annotations

import sys

from verl.utils.import_utils import is_trl_available


def let_verl_find_no_trl() -> None:
    """Have verl ask while TRL is out of sight; it keeps the answer."""
    is_trl_available.cache_clear()
    missing = object()
    loaded = sys.modules.get("trl", missing)
    sys.modules["trl"] = None  # type: ignore[assignment]
    try:
        assert not is_trl_available()
    finally:
        del sys.modules["trl"]
        if loaded is not missing:
            sys.modules["trl"] = loaded  # type: ignore[assignment]
