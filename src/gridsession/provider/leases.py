"""Which locks this process holds, and when they are to be renewed. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class HeldLock:
    """A lock that a request of this process holds.

    Attributes:
        key: the record's.
        token: the lock's.
        holder: who holds it, in words.
        since: loop seconds at which it was granted.
    """

    key: bytes
    token: bytes
    holder: str
    since: float


class LeaseBook:
    """The locks of one event loop.

    Args:
        execution_timeout: seconds after which a lock is renewed no more: its handler hangs, and
            others wait. ASP.NET breaks such a lock, and its holder never learns.
    """

    def __init__(self, execution_timeout: float) -> None:
        self._execution_timeout = execution_timeout
        self._held: dict[bytes, tuple[bytes, bytes, str, float]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, key: bytes, token: bytes, holder: str, since: float) -> None:
        """Args: as the attributes of `HeldLock`."""
        self._held[token] = (key, token, holder, since)  # at each request, and seldom looked at

    def drop(self, token: bytes) -> None:
        self._held.pop(token, None)

    def due(self, now: float) -> tuple[list[HeldLock], list[HeldLock]]:
        """The locks to renew, and those that have just been held for too long.

        The latter are in the book no more: their lease runs out.
        """
        held = [HeldLock(*lock) for lock in self._held.values()]
        hung = [lock for lock in held if now - lock.since >= self._execution_timeout]
        for lock in hung:
            del self._held[lock.token]
        return [lock for lock in held if lock not in hung], hung
