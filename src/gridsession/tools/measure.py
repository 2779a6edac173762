"""What the application's requests would ask of its grid, asked on a record of our own and timed.

The record has a random key, lives for a minute at most, and is removed at the end in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator

from gridsession.errors import SessionError
from gridsession.grids.contract import (
    Change,
    Claim,
    Committed,
    Found,
    Granted,
    Grid,
    NewRecord,
    Released,
)
from gridsession.tools.report import Timing

RECORD_SECONDS = 60.0  # after which the record expires by itself, should all else fail
LEASE_SECONDS = 10.0  # longer than anything here takes
HOLDER = f"gridsession doctor · pid {os.getpid()}"
_ROUNDS = 200
_LONGEST = 2.0  # seconds that the rounds may take altogether
_REMOVAL = 5.0  # seconds for which removing the record is tried
_PAUSE = 0.1  # seconds between two tries
_PAYLOAD = b"gridsession doctor" * 50  # 900 bytes, as a session with a few values


class WrongAnswer(Exception):
    """A grid answered otherwise than it must; the text says to which call, and how."""


class OwnRecord:
    """The doctor's own record on a grid.

    Args:
        grid: opened.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.key = secrets.token_bytes(32)
        self.secret = secrets.token_bytes(32)

    def claim(self) -> Claim:
        """A wish for the lock that nobody had before."""
        return Claim(secrets.token_bytes(16), HOLDER, LEASE_SECONDS, 50)

    async def call_all(self) -> None:
        """Make the record, and ask once for all that a request asks for.

        Raises:
            WrongAnswer: an answer was not the one that it has to be.
            GridUnavailable, GridFull: the grid failed.
        """
        grid, key, claim = self.grid, self.key, self.claim()
        new = NewRecord(secrets.randbits(64), self.secret, b"new", RECORD_SECONDS, None, None)
        _expect("create", Committed, await grid.create(key, new))
        _expect("acquire", Granted, await grid.acquire(key, self.secret, claim))
        if await grid.renew([(key, claim.token)], LEASE_SECONDS) != [True]:
            raise WrongAnswer("the grid lost a lock between acquire and renew")
        _expect("read", Found, await grid.read(key, self.secret))
        change = self._change()
        _expect("commit", Committed, await grid.commit(key, claim.token, change, release=False))
        found = await grid.read(key, self.secret)
        _expect("read", Found, found)
        if isinstance(found, Found) and found.snapshot.payload != _PAYLOAD:
            raise WrongAnswer("the grid read something else than what was committed before")
        _expect("release", Released, await grid.release(key, claim.token))

    async def round_trips(self) -> Timing:
        """An exclusive request's two calls: lock and read, commit and unlock. Many times.

        Raises:
            WrongAnswer, GridUnavailable, GridFull: as `call_all`.
        """
        times: list[float] = []
        end = time.perf_counter() + _LONGEST
        while len(times) < _ROUNDS and time.perf_counter() < end:
            claim, change = self.claim(), self._change()
            began = time.perf_counter()
            acquired = await self.grid.acquire(self.key, self.secret, claim)
            committed = await self.grid.commit(self.key, claim.token, change, release=True)
            times.append(time.perf_counter() - began)
            _expect("acquire", Granted, acquired)
            _expect("commit", Committed, committed)
            await asyncio.sleep(0)  # an interruption gets through
        return Timing.of(times)

    async def remove(self) -> bool:
        """Remove the record, whoever holds its lock. False where the grid did not let us."""
        end = time.monotonic() + _REMOVAL
        while True:
            with contextlib.suppress(SessionError):
                await self.grid.remove(self.key)
                return True
            if time.monotonic() > end:
                return False
            await asyncio.sleep(_PAUSE)

    def _change(self) -> Change:
        return Change(secrets.randbits(64), _PAYLOAD, RECORD_SECONDS, None)


class Left(Exception):
    """The doctor's record could not be removed; it expires by itself."""


@contextlib.asynccontextmanager
async def own_record(grid: Grid) -> AsyncIterator[OwnRecord]:
    """`async with own_record(grid) as record:` gone at the end, also when the block fails.

    Raises:
        Left: it is not gone, and nothing else failed.
    """
    record = OwnRecord(grid)
    try:
        yield record
    except BaseException:
        await record.remove()
        raise
    if not await record.remove():
        raise Left


def _expect(call: str, kind: type, outcome: object) -> None:
    if not isinstance(outcome, kind):
        raise WrongAnswer(f"the grid answered {type(outcome).__name__} to {call}")
