"""`memory://`: records in this process, for tests and for a single worker.

The reference for the rules: `record.Record` and a dict, nothing else. What it keeps dies with the
process, and no other worker sees it.
"""

from __future__ import annotations

import heapq
import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TypeVar

from gridsession.errors import GridUnavailable, SettingsError
from gridsession.grids.bells import Bells
from gridsession.grids.contract import (
    EXISTS,
    GONE,
    LOCK_LOST,
    MISSING,
    REMOVED,
    Busy,
    Change,
    Claim,
    Clock,
    Committed,
    Exists,
    Found,
    Gone,
    Granted,
    LockLost,
    Missing,
    NewRecord,
    QueueFull,
    Released,
    Removed,
    Replaced,
    SystemClock,
)
from gridsession.grids.record import Now, Record

log = logging.getLogger("gridsession")
_SERVERS = ("uvicorn", "gunicorn", "hypercorn", "granian", "fastapi")
_Outcome = TypeVar("_Outcome")


class MemoryGrid:
    """A grid inside this process.

    Args:
        clock: for tests; the machine's by default.
    """

    where = "memory:// (this process only)"

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._records: dict[bytes, Record] = {}
        self._payloads: dict[bytes, bytes] = {}
        self._deadlines: list[tuple[float, bytes]] = []  # a heap
        self._guard = threading.RLock()  # several event loops of one process may use one grid
        self._bells = Bells()
        self._pid = os.getpid()

    @classmethod
    def from_connection_string(cls, connection_string: str) -> MemoryGrid:
        """From `memory://`; there is nothing to set.

        Raises:
            SettingsError: there is something else in it, or the server has several workers.
        """
        if connection_string not in ("memory:", "memory://"):
            raise SettingsError("connection_string: memory:// takes neither a path nor options")
        workers = server_workers(sys.orig_argv, os.environ)
        if workers is not None and workers > 1:
            raise SettingsError(
                f"connection_string: memory:// keeps sessions in one process, and {workers} "
                "workers were asked for; use embedded: to share sessions between them"
            )
        if workers is None:
            log.warning("memory:// keeps sessions in this process only; no other worker sees them")
        return cls()

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def create(
        self, key: bytes, new: NewRecord, claim: Claim | None = None
    ) -> Committed | Exists:
        with self._guard:
            now = self._now()
            there = self._records.get(key)
            if there is not None:
                if (again := there.created_by(new.commit_token)) is not None:
                    return again
                if there.is_live(now):
                    return EXISTS
                self._drop(key, there)
            record = self._records[key] = Record.new(new, now, claim)
            self._payloads[key] = new.payload
            self._index(key, record)
            return Committed(record.version, record.deadline)

    async def acquire(
        self, key: bytes, secret: bytes, claim: Claim
    ) -> Granted | Busy | QueueFull | Replaced | Missing:
        with self._guard:
            record = self._records.get(key)
            outcome = (
                MISSING if record is None else record.acquire(self._now(), secret, claim, b"")
            )
            if type(outcome) is Granted:
                outcome.snapshot.payload = self._payloads[key]
            return self._done(record, outcome, claim)

    async def read(
        self, key: bytes, secret: bytes, watch: Claim | None = None, seen: bytes | None = None
    ) -> Found | Busy | QueueFull | Replaced | Missing:
        with self._guard:
            record = self._records.get(key)
            outcome = (
                MISSING
                if record is None
                else record.read(self._now(), secret, watch, seen, b"")
            )
            if type(outcome) is Found:
                outcome.snapshot.payload = self._payloads[key]
            return self._done(record, outcome, watch)

    async def wait(self, key: bytes, token: bytes, seconds: float) -> None:
        await self._bells.wait(token, seconds)

    async def commit(
        self, key: bytes, token: bytes, change: Change, *, release: bool
    ) -> Committed | LockLost | Gone:
        with self._guard:
            record = self._records.get(key)
            if record is None:
                return GONE
            before = record.counter
            outcome = record.commit(self._now(), token, change, release)
            if record.counter != before and change.payload is not None:
                self._payloads[key] = change.payload
            if record.deadline < record.indexed:
                self._index(key, record)
            return self._done(record, outcome)

    async def renew(self, leases: Sequence[tuple[bytes, bytes]], lease: float) -> list[bool]:
        with self._guard:
            now = self._now()
            found = [(self._records.get(key), token) for key, token in leases]
            return [r is not None and r.renew(now, token, lease) for r, token in found]

    async def release(self, key: bytes, token: bytes) -> Released | LockLost | Gone:
        with self._guard:
            self._bells.forget(token)
            record = self._records.get(key)
            if record is None:
                return GONE
            return self._done(record, record.release(self._now(), token))

    async def touch(self, key: bytes) -> bool:
        with self._guard:
            record, now = self._records.get(key), self._now()
            if record is None or not record.is_live(now):
                return False
            record.touch(now)
            return True

    async def remove(self, key: bytes, token: bytes | None = None) -> Removed | LockLost | Gone:
        with self._guard:
            record = self._records.get(key)
            if record is None or not record.is_live(self._now()):
                return GONE
            if token is not None and record.lock_token != token:
                return LOCK_LOST
            self._drop(key, record)
            return REMOVED

    async def sweep(self, limit: int) -> int:
        with self._guard:
            now = self._now()
            looked_at = 0
            while looked_at < limit and self._deadlines and self._deadlines[0][0] <= now.wall:
                looked_at += 1
                _, key = heapq.heappop(self._deadlines)
                record = self._records.get(key)
                if record is None:
                    continue
                if record.is_live(now):
                    self._index(key, record, record.due(now))
                else:
                    self._drop(key, record)
            return looked_at

    # -- parts ----------------------------------------------------------------------------

    def _now(self) -> Now:
        if os.getpid() != self._pid:
            raise GridUnavailable(
                "memory:// was opened in one process and used in another, forked from it; each "
                "would keep sessions of its own. Use embedded: to share them between workers."
            )
        return Now(self._clock.wall(), self._clock.steady(), self._clock.boot_id)

    def _index(self, key: bytes, record: Record, due: float | None = None) -> None:
        """Note when to look at a record: a hint, which the sweeper corrects by asking it."""
        record.indexed = record.deadline if due is None else due
        heapq.heappush(self._deadlines, (record.indexed, key))

    def _drop(self, key: bytes, record: Record) -> None:
        del self._records[key], self._payloads[key]
        record.end()
        self._done(record, None)

    def _done(self, record: Record | None, outcome: _Outcome, claim: Claim | None = None) -> _Outcome:
        """Ring whom the record wants rung; expect a bell exactly while the caller waits."""
        if claim is not None:
            if type(outcome) is Busy:
                self._bells.expect(claim.token)
            else:
                self._bells.forget(claim.token)
        if record is not None and record.rung:
            for _, token in record.rung:
                self._bells.ring(token)
            record.rung = None
        return outcome


def server_workers(argv: Sequence[str], environ: Mapping[str, str]) -> int | None:
    """How many workers this process's command line asks its server for; None when unknown."""
    found: str | None = environ.get("WEB_CONCURRENCY")
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        if word in ("--workers", "-w"):
            found = after
        elif word.startswith("--workers="):
            found = word.partition("=")[2]
        elif word.startswith("-w") and word[2:].isdigit():
            found = word[2:]
    if found is not None and found.isdigit():
        return int(found)
    programs = {os.path.basename(word) for word in argv}
    return 1 if programs.intersection(_SERVERS) else None
