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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from gridsession.errors import GridUnavailable, SettingsError
from gridsession.grids import operations
from gridsession.grids.bells import Bells
from gridsession.grids.clock import SystemClock
from gridsession.grids.contract import (
    Busy,
    Change,
    Claim,
    Clock,
    Committed,
    Conflict,
    Exists,
    Found,
    Gone,
    Granted,
    Locked,
    LockLost,
    Missing,
    NewRecord,
    QueueFull,
    Released,
    Removed,
    Replaced,
    Version,
)
from gridsession.grids.record import Record

log = logging.getLogger("gridsession")
_SERVERS = ("uvicorn", "granian", "fastapi")  # whose number of workers stands in no file


class MemoryGrid:
    """A grid inside this process.

    Args:
        clock: for tests; the machine's by default.
    """

    where = "memory:// (this process only)"
    is_local = True

    def __init__(self, clock: Clock | None = None) -> None:
        self._bells = Bells()
        self._table = _DictTable(clock or SystemClock(), self._bells)
        self._guard = threading.RLock()  # several event loops of one process may use one grid
        self._pid = os.getpid()

    @classmethod
    def from_connection_string(cls, connection_string: str) -> MemoryGrid:
        """From `memory://`; there is nothing to set.

        Raises:
            SettingsError: there is something else in it, or the server has several workers.
        """
        if connection_string not in ("memory:", "memory://"):
            raise SettingsError("connection_string: memory:// takes neither a path nor options")
        # A spawned worker's own command line is multiprocessing's; its sys.argv is the server's.
        workers = server_workers([*sys.orig_argv, *sys.argv], os.environ)
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
        with self._transaction() as table:
            return operations.create(table, key, new, claim)

    async def acquire(
        self, key: bytes, secret: bytes, claim: Claim, known: Version | None = None
    ) -> Granted | Busy | QueueFull | Replaced | Missing:
        with self._transaction() as table:
            outcome = operations.acquire(table, key, secret, claim, known)
        if type(outcome) is not Busy:
            self._bells.forget(claim.token)
        return outcome

    async def read(
        self,
        key: bytes,
        secret: bytes,
        watch: Claim | None = None,
        seen: bytes | None = None,
        known: Version | None = None,
    ) -> Found | Busy | QueueFull | Replaced | Missing:
        with self._transaction() as table:
            outcome = operations.read(table, key, secret, watch, seen, known)
        if watch is not None and type(outcome) is not Busy:
            self._bells.forget(watch.token)
        return outcome

    async def wait(self, key: bytes, token: bytes, seconds: float) -> None:
        await self._bells.wait(token, seconds)

    async def commit(
        self, key: bytes, token: bytes, change: Change, *, release: bool
    ) -> Committed | LockLost | Gone:
        with self._transaction() as table:
            return operations.commit(table, key, token, change, release)

    async def commit_if(
        self, key: bytes, secret: bytes, base: Version, change: Change
    ) -> Committed | Conflict | Locked | Replaced | Gone:
        with self._transaction() as table:
            return operations.commit_if(table, key, secret, base, change)

    async def renew(self, leases: Sequence[tuple[bytes, bytes]], lease: float) -> list[bool]:
        with self._transaction() as table:
            return operations.renew(table, leases, lease)

    async def release(self, key: bytes, token: bytes) -> Released | LockLost | Gone:
        self._bells.forget(token)
        with self._transaction() as table:
            return operations.release(table, key, token)

    async def touch(self, key: bytes) -> bool:
        with self._transaction() as table:
            return operations.touch(table, key)

    async def remove(self, key: bytes, token: bytes | None = None) -> Removed | LockLost | Gone:
        with self._transaction() as table:
            return operations.remove(table, key, token)

    async def sweep(self, limit: int) -> int:
        with self._transaction() as table:
            return operations.sweep(table, limit)

    @contextmanager
    def _transaction(self) -> Iterator[operations.Table]:
        if os.getpid() != self._pid:
            raise GridUnavailable(
                "memory:// was opened in one process and used in another, forked from it; each "
                "would keep sessions of its own. Use embedded: to share them between workers."
            )
        table = self._table
        with self._guard:
            table.tell_time()
            yield table
            rung, table.rung = table.rung, ()
        for _, token in rung:
            self._bells.ring(token)


class _DictTable:
    """A table of records that are changed where they stand."""

    def __init__(self, clock: Clock, bells: Bells) -> None:
        self._clock = clock
        self._bells = bells
        self._records: dict[bytes, Record] = {}
        self._payloads: dict[bytes, bytes] = {}
        self._deadlines: list[tuple[float, bytes]] = []  # a heap
        self.rung: Sequence[tuple[bytes, bytes]] = ()
        self.tell_time()

    def tell_time(self) -> None:
        self.now = self._clock.now()

    def load(self, key: bytes) -> Record | None:
        return self._records.get(key)

    def save(self, key: bytes, record: Record) -> None:
        self._records[key] = record

    def payload(self, key: bytes) -> bytes:
        return self._payloads[key]

    def save_payload(self, key: bytes, payload: bytes, *, grows: bool) -> None:
        self._payloads[key] = payload

    def delete(self, key: bytes, record: Record) -> None:
        del self._records[key], self._payloads[key]

    def index(self, key: bytes, record: Record, due: float) -> None:
        # The old entry stays in the heap until it is due, and is known by its time to be old.
        record.indexed = due
        heapq.heappush(self._deadlines, (due, key))

    def due(self, wall: float, limit: int) -> list[tuple[float, bytes]]:
        due: list[tuple[float, bytes]] = []
        while len(due) < limit and self._deadlines and self._deadlines[0][0] <= wall:
            due.append(heapq.heappop(self._deadlines))
        return due

    def forget(self, due: float, key: bytes) -> None:
        pass  # `due` took it from the heap

    def put_off(self, due: float, key: bytes, until: float) -> None:
        heapq.heappush(self._deadlines, (until, key))

    def bell(self, token: bytes) -> bytes:
        self._bells.listen(token)
        return b""  # everybody is in this process and is found by token

    def hush(self, token: bytes) -> None:
        self._bells.forget(token)


def server_workers(argv: Sequence[str], environ: Mapping[str, str]) -> int | None:
    """How many workers this process's command line asks its server for; None when unknown."""
    found = environ.get("UVICORN_WORKERS") or environ.get("WEB_CONCURRENCY")
    argv = [*environ.get("GUNICORN_CMD_ARGS", "").split(), *argv]
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        if word in ("--workers", "-w"):
            found = after
        elif word.startswith("--workers="):
            found = word.partition("=")[2]
        elif word.startswith("-w") and word[2:].isdigit():
            found = word[2:]
    if found is not None and found.isdigit():
        return int(found)
    # `python -m uvicorn` makes argv[0] …/uvicorn/__main__.py.
    programs = {os.path.basename(word.removesuffix("/__main__.py")) for word in argv}
    return 1 if programs.intersection(_SERVERS) else None
