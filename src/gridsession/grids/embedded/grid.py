"""`embedded:`: one LMDB file, shared by the worker processes of a machine.

A call is one transaction, straight on the event loop: it takes microseconds, and a thread's hop
thirty times as long. Only `durable` transactions, which wait for the disk, go to a thread, where
those that come together share one.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import lmdb

from gridsession.errors import GridFull, GridUnavailable
from gridsession.grids import operations
from gridsession.grids.contract import (
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
)
from gridsession.grids.embedded import codec
from gridsession.grids.embedded.mailbox import SocketBells
from gridsession.grids.embedded.place import Place
from gridsession.grids.embedded.store import Store, close_store, open_store
from gridsession.grids.embedded.table import LmdbTable
from gridsession.grids.embedded.writer import Writer
from gridsession.grids.record import Now

_T = TypeVar("_T")


class EmbeddedGrid:
    """A grid in a file of this machine.

    Args:
        place: where the file is, how large, whether durable.
        namespace: sets the records of several applications apart.
        timeout: seconds to wait for a neighbour that is inside a transaction.
        clock: for tests; the machine's by default.
    """

    def __init__(
        self,
        place: Place,
        *,
        namespace: str = "/",
        timeout: float = 1.0,
        clock: Clock | None = None,
    ) -> None:
        self._place = place
        self._prefix = codec.prefix_of(namespace)
        self._timeout = timeout
        self._given_clock = clock
        self._store: Store | None = None
        self._pid = 0
        self._bells: SocketBells
        self._writer: Writer | None = None
        self._opening = threading.Lock()

    @classmethod
    def from_connection_string(
        cls, connection_string: str, *, namespace: str, timeout: float
    ) -> EmbeddedGrid:
        """From `embedded:` or `embedded:///path?max_size=512MiB&durable=true`.

        Raises:
            SettingsError: a part of it is wrong.
        """
        return cls(Place.parse(connection_string), namespace=namespace, timeout=timeout)

    @property
    def where(self) -> str:
        if self._store is None:
            return f"embedded: {self._place.path or '(default folder)'} (this machine only)"
        size = self._store.state.max_size >> 20
        return f"embedded: {self._store.path}, {size} MiB (this machine only)"

    async def open(self) -> None:
        if self._store is None or self._pid != os.getpid():
            await asyncio.to_thread(self._open)

    def _open(self) -> None:
        with self._opening:
            if self._store is not None and self._pid == os.getpid():
                return
            forked = self._store is not None
            store = open_store(self._place, self._timeout)
            if forked:
                self._bells.forsake()
            self._bells = SocketBells(store.path / "bells")
            self._writer = Writer(self._write_group) if store.state.durable else None
            self._clock = self._given_clock or store.clock
            self._pid = os.getpid()
            self._store = store

    async def close(self) -> None:
        if self._store is not None and self._pid == os.getpid():
            store, self._store = self._store, None
            self._bells.close()  # on the loop that it reads from
            await asyncio.to_thread(self._close, store)

    def _close(self, store: Store) -> None:
        if self._writer is not None:
            self._writer.close()
        close_store(store)

    # -- the contract ---------------------------------------------------------------------

    async def create(
        self, key: bytes, new: NewRecord, claim: Claim | None = None
    ) -> Committed | Exists:
        key = self._prefix + key
        return await self._write(lambda table: operations.create(table, key, new, claim))

    async def acquire(
        self, key: bytes, secret: bytes, claim: Claim
    ) -> Granted | Busy | QueueFull | Replaced | Missing:
        key = self._prefix + key
        return await self._write_and_listen(
            lambda table: operations.acquire(table, key, secret, claim), claim.token
        )

    async def read(
        self, key: bytes, secret: bytes, watch: Claim | None = None, seen: bytes | None = None
    ) -> Found | Busy | QueueFull | Replaced | Missing:
        key = self._prefix + key
        if watch is None:
            return await self._read(lambda table: operations.read(table, key, secret, None, None))
        return await self._write_and_listen(
            lambda table: operations.read(table, key, secret, watch, seen), watch.token
        )

    async def wait(self, key: bytes, token: bytes, seconds: float) -> None:
        await self._bells.wait(token, seconds)

    async def commit(
        self, key: bytes, token: bytes, change: Change, *, release: bool
    ) -> Committed | LockLost | Gone:
        key = self._prefix + key
        return await self._write(
            lambda table: operations.commit(table, key, token, change, release)
        )

    async def renew(self, leases: Sequence[tuple[bytes, bytes]], lease: float) -> list[bool]:
        pairs = [(self._prefix + key, token) for key, token in leases]
        return await self._write(lambda table: operations.renew(table, pairs, lease))

    async def release(self, key: bytes, token: bytes) -> Released | LockLost | Gone:
        key = self._prefix + key
        outcome = await self._write(lambda table: operations.release(table, key, token))
        self._bells.listen(token, waiting=False)
        return outcome

    async def touch(self, key: bytes) -> bool:
        key = self._prefix + key
        return await self._write(lambda table: operations.touch(table, key))

    async def remove(self, key: bytes, token: bytes | None = None) -> Removed | LockLost | Gone:
        key = self._prefix + key
        return await self._write(lambda table: operations.remove(table, key, token))

    async def sweep(self, limit: int) -> int:
        # Whoever looks here removes what is due in every namespace: one may have no workers left.
        due = await self._read(lambda table: table.due(table.now.wall, 1))
        (await self._opened()).forget_dead_readers()
        return await self._write(lambda table: operations.sweep(table, limit)) if due else 0

    # -- transactions ---------------------------------------------------------------------

    async def _opened(self) -> Store:
        """The store, opened anew in a process that was forked from the one which opened it."""
        store = self._store
        if store is None or self._pid != os.getpid():
            await self.open()
            store = self._store
            assert store is not None
        return store

    async def _write_and_listen(self, run: Callable[[LmdbTable], _T], token: bytes) -> _T:
        """A call after which the caller may have to wait for its bell."""
        store = await self._opened()
        bells = self._bells
        if store.state.durable:  # it runs on a thread: what belongs to this loop is done before
            address = bells.address()
            bells.listen(token, waiting=True)

            def run_at(table: LmdbTable) -> _T:
                table.address = address
                return run(table)

            outcome = await self._write(run_at)
            bells.listen(token, waiting=type(outcome) is Busy)
            return outcome

        def run_and_listen(table: LmdbTable) -> _T:
            outcome = run(table)
            bells.listen(token, waiting=type(outcome) is Busy)
            return outcome

        return await self._write(run_and_listen)

    async def _write(self, run: Callable[[LmdbTable], _T]) -> _T:
        store = await self._opened()
        if self._writer is not None:
            written: _T = await self._writer.write(run)
            return written
        if not store.gate.try_enter():
            await store.gate.enter()
        try:
            (outcome,), rung = self._transact(store, [run])
        finally:
            store.gate.leave()
        if rung:
            self._ring(rung)
        return outcome

    def _write_group(self, runs: list[Callable[[LmdbTable], Any]]) -> list[Any]:
        """On the writer's thread."""
        store = self._store
        assert store is not None
        store.gate.enter_blocking()
        try:
            outcomes, rung = self._transact(store, runs)
        finally:
            store.gate.leave()
        self._ring(rung)
        return outcomes

    def _transact(
        self, store: Store, runs: list[Callable[[LmdbTable], _T]]
    ) -> tuple[list[_T], list[tuple[bytes, bytes]]]:
        """Inside the gate: all of it is kept, or an exception says that nothing is."""
        try:
            transaction = store.env.begin(write=True)
            try:
                table = LmdbTable(transaction, self._now(), self._bells)
                outcomes = [run(table) for run in runs]
                if table.grew and store.pages_in_use(transaction) > store.full_pages:
                    raise GridFull(
                        f"the embedded grid is full: {store.state.max_size >> 20} MiB; raise "
                        "max_size, or shorten the timeout"
                    )
            except BaseException:
                transaction.abort()
                raise
            transaction.commit()
        except lmdb.MapFullError as error:
            raise GridFull("the embedded grid is full, and has no room to make room") from error
        except lmdb.Error as error:
            raise GridUnavailable(f"the embedded grid failed: {error}") from error
        return outcomes, table.rung

    async def _read(self, run: Callable[[LmdbTable], _T]) -> _T:
        """Outside the gate: readers block nobody, and nobody blocks them."""
        store = await self._opened()
        try:
            with store.env.begin() as transaction:
                return run(LmdbTable(transaction, self._now(), self._bells))
        except lmdb.Error as error:
            raise GridUnavailable(f"the embedded grid failed: {error}") from error

    def _now(self) -> Now:
        clock = self._clock
        return Now(clock.wall(), clock.steady(), clock.boot_id)

    def _ring(self, rung: list[tuple[bytes, bytes]]) -> None:
        for address, token in rung:
            self._bells.ring_at(address, token)
