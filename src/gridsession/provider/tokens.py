"""Tokens for locks, tickets and commits: no two alike, in any process, and no secrets.

Random where a process begins, and counted from there: drawing each would take a system call.
"""

from __future__ import annotations

import os
from itertools import count

_COMMITS = 1 << 64


class _Series:
    """The tokens of one process."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._prefix = os.urandom(8)
        self._first_commit = int.from_bytes(os.urandom(8), "little")
        self._numbers = count()

    def lock_token(self) -> bytes:
        """16 bytes for a claim."""
        return self._prefix + next(self._numbers).to_bytes(8, "little")

    def commit_token(self) -> int:
        """64 bits for a commit."""
        return (self._first_commit + next(self._numbers)) % _COMMITS


_series = _Series()
lock_token = _series.lock_token
commit_token = _series.commit_token

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_series.begin)
