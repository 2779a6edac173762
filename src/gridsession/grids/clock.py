"""The machine's clocks, for grids that run in this process."""

from __future__ import annotations

import sys
import time
from functools import partial

from gridsession.grids.contract import Now

if sys.platform == "win32":
    steady = time.monotonic
else:  # macOS has no BOOTTIME; its MONOTONIC goes on while the machine sleeps
    steady = partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class SystemClock:
    """The machine's clocks. `boot_id` is given by a grid that outlives a boot."""

    def __init__(self, boot_id: int = 0) -> None:
        self._boot_id = boot_id

    def now(self) -> Now:
        # Twice a request, and a named tuple's own constructor is a Python function.
        return tuple.__new__(Now, (time.time(), steady(), self._boot_id))
