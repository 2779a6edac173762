"""The one logger: `gridsession`. Operators' warnings are its records, never `warnings.warn`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("gridsession")

_QUIET_SECONDS = 60.0


class Seldom:
    """A warning that any client can cause, and might fill the log with: once a minute at most.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._quiet_until = clock()
        self._left_out = 0

    def warning(self, message: str, *args: object) -> None:
        now = self._clock()
        if now < self._quiet_until:
            self._left_out += 1
            return
        if self._left_out:
            message += "; as %d before it that were not logged"
            args = (*args, self._left_out)
        self._left_out = 0
        self._quiet_until = now + _QUIET_SECONDS
        log.warning(message, *args)
