"""SIGINT and SIGTERM, remembered until a step is finished."""

import os
import signal
from typing import Any, Self

from jax.experimental import multihost_utils


class Interrupted(Exception):  # noqa: N818  # nor is this an error
    """Training was ended by the signal ``number``, and can go on from its last checkpoint."""

    def __init__(self, number: int, saved: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {saved}")
        self.number = number


class Signals:
    """While it is entered, the first SIGINT or SIGTERM only sets a mark; the second does what it always does.

    Of several processes any may be signalled, and all have to stop after the same step. JAX sees to that for SIGTERM,
    and SIGINT is turned into it.

    Args:
      processes: how many there are.
    """

    def __init__(self, processes: int) -> None:
        self.received, self._processes = 0, processes

    def __enter__(self) -> Self:
        numbers = (signal.SIGINT, signal.SIGTERM) if self._processes == 1 else (signal.SIGINT,)
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: Any) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
        if self._processes > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> int:
        """The signal after which to stop, or 0; the same in all processes, each of which asks after every step."""
        if self._processes == 1:
            return self.received
        return (self.received or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else 0
