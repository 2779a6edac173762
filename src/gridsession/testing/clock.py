"""A clock that a test sets."""

from __future__ import annotations

from gridsession.grids.contract import Now


class ManualClock:
    """A grid's clock that stands still until it is told to go on.

    Args:
        wall: seconds since the epoch to begin with.
        boot_id: which boot the steady clock counts from; change it to play a restart.
    """

    def __init__(self, wall: float = 1_800_000_000.0, boot_id: int = 1) -> None:
        self._wall = wall
        self._steady = 1000.0
        self.boot_id = boot_id

    def wall(self) -> float:
        return self._wall

    def steady(self) -> float:
        return self._steady

    def now(self) -> Now:
        return Now(self._wall, self._steady, self.boot_id)

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks."""
        self._wall += seconds
        self._steady += seconds

    def step_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back, as an operator or NTP does."""
        self._wall += seconds
