"""SIGTERM and SIGINT while a trainer trains: the update is finished and a checkpoint taken before the process ends."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """The signal that wants training to end, if one came. A second one of its kind acts as it would without this.

    Args:
        accelerator: of the ranks, which stop after the same update.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._number = 0

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within this context the signals are kept. Python lets the main thread alone ask for them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {int(number): signal.getsignal(number) for number in SIGNALS}
        # What is ignored stays so, as SIGINT does in a shell's background, and what another language handles (None).
        handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

        def keep(number: int, _frame: Any) -> None:
            self._number = number
            signal.signal(number, handlers[number])
            logger.warning(
                "%s: training ends with a checkpoint after this update; once more ends it at once.",
                signal.Signals(number).name,
            )

        for number in handlers:
            signal.signal(number, keep)
        try:
            yield
        finally:
            self._number = 0
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def agreed(self) -> int:
        """The number of the signal that came to any rank; 0 for none. All ranks call it together."""
        if self._accelerator.num_processes == 1:
            return self._number
        number = torch.tensor([self._number], device=self._accelerator.device)
        return int(self._accelerator.gather(number).max())
