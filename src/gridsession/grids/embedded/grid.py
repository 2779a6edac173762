"""`embedded:`: one LMDB file, shared by the worker processes of a machine.

A call is one transaction, straight on the event loop: it takes microseconds, and a thread's hop
thirty times as long. Only `durable` transactions, which wait for the disk, go to a thread, where
those that come together share one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
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
from gridsession.grids.embedded import codec
from gridsession.grids.embedded.mailbox import SocketBells
from gridsession.grids.embedded.place import Place
from gridsession.grids.embedded.store import (
    SMALL_BYTES,
    Store,
    close_store,
    open_store,
    opening_guard,
)
from gridsession.grids.embedded.table import LmdbTable
from gridsession.grids.embedded.writer import Writer

_T = TypeVar("_T")
_MOMENT = 0.005  # seconds, in which a process that waits for its CPU may have got it


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
        self._clock: Clock
        self._bells: SocketBells
        self._listeners: Mapping[bytes, object] = {}
        self._writer: Writer | None = None

    @classmethod
    def from_connection_string(
        cls, connection_string: str, *, namespace: str, timeout: float
    ) -> EmbeddedGrid:
        """From `embedded:` or `embedded:///path?max_size=512MiB&durable=true`.

        Raises:
            SettingsError: a part of it is wrong.
        """
        return cls(Place.parse(connection_string), namespace=namespace, timeout=timeout)

    is_local = True

    @property
    def where(self) -> str:
        if self._store is None:
            return f"embedded: {self._place.path or '(default folder)'} (this machine only)"
        size = self._store.state.max_size >> 20
        return f"embedded: {self._store.path}, {size} MiB (this machine only)"

    async def open(self) -> None:
        if self._usable_store() is None:
            await asyncio.to_thread(self._open)

    def _open(self) -> None:
        with opening_guard:  # not a lock of its own: a fork waits for this one
            if self._usable_store() is not None:
                return
            store = open_store(self._place, self._timeout)
            if self._store is not None:
                self._bells.forsake()
            try:
                self._bells = SocketBells(store.path / "bells")
            except OSError as error:
                close_store(store)
                raise GridUnavailable(
                    f"the embedded grid cannot be opened: {error.strerror}"
                ) from error
            group = partial(self._write_group, store)
            self._writer = Writer(group) if store.state.durable else None
            self._listeners = self._bells.listeners
            self._clock = self._given_clock or store.clock
            self._store = store

    async def close(self) -> None:
        store = self._usable_store()
        if store is not None:
            self._store = None
            self._bells.close()  # on the loop that it reads from
            await asyncio.to_thread(self._close, store)

    def _close(self, store: Store) -> None:
        if self._writer is not None:
            self._writer.close()
        close_store(store)

    # -- the contract ---------------------------------------------------------------------

    def create(
        self, key: bytes, new: NewRecord, claim: Claim | None = None
    ) -> Coroutine[Any, Any, Committed | Exists]:
        return self._write(operations.create, self._prefix + key, new, claim)

    def acquire(
        self, key: bytes, secret: bytes, claim: Claim, known: Version | None = None
    ) -> Coroutine[Any, Any, Granted | Busy | QueueFull | Replaced | Missing]:
        call = self._write(operations.acquire, self._prefix + key, secret, claim, known)
        return self._then_forget(call, claim.token) if self._listeners else call

    def read(
        self,
        key: bytes,
        secret: bytes,
        watch: Claim | None = None,
        seen: bytes | None = None,
        known: Version | None = None,
    ) -> Coroutine[Any, Any, Found | Busy | QueueFull | Replaced | Missing]:
        key = self._prefix + key
        if watch is None:
            return self._read(operations.read, key, secret, None, None, known)
        call = self._write(operations.read, key, secret, watch, seen, known)
        return self._then_forget(call, watch.token) if self._listeners else call

    async def _then_forget(self, call: Coroutine[Any, Any, _T], token: bytes) -> _T:
        outcome = await call
        if type(outcome) is not Busy:
            self._bells.forget(token)
        return outcome

    async def wait(self, key: bytes, token: bytes, seconds: float) -> None:
        await self._bells.wait(token, seconds)

    def commit(
        self, key: bytes, token: bytes, change: Change, *, release: bool
    ) -> Coroutine[Any, Any, Committed | LockLost | Gone]:
        return self._write(operations.commit, self._prefix + key, token, change, release)

    def commit_if(
        self, key: bytes, secret: bytes, base: Version, change: Change
    ) -> Coroutine[Any, Any, Committed | Conflict | Locked | Replaced | Gone]:
        return self._write(operations.commit_if, self._prefix + key, secret, base, change)

    async def renew(self, leases: Sequence[tuple[bytes, bytes]], lease: float) -> list[bool]:
        return await self._renew([(self._prefix + key, token) for key, token in leases], lease)

    async def _renew(self, pairs: list[tuple[bytes, bytes]], lease: float) -> list[bool]:
        try:
            return await self._write(operations.renew, pairs, lease)
        except GridFull:  # each record in a transaction copies a page: fewer may find room
            if len(pairs) < 2:
                return await self._find_room(operations.renew, pairs, lease)
            half = len(pairs) // 2
        return await self._renew(pairs[:half], lease) + await self._renew(pairs[half:], lease)

    async def release(self, key: bytes, token: bytes) -> Released | LockLost | Gone:
        key = self._prefix + key
        try:
            outcome = await self._write(operations.release, key, token)
        except GridFull:
            outcome = await self._find_room(operations.release, key, token)
        self._bells.forget(token)
        return outcome

    def touch(self, key: bytes) -> Coroutine[Any, Any, bool]:
        return self._write(operations.touch, self._prefix + key)

    async def remove(self, key: bytes, token: bytes | None = None) -> Removed | LockLost | Gone:
        key = self._prefix + key
        try:
            return await self._write(operations.remove, key, token)
        except GridFull:
            return await self._find_room(operations.remove, key, token)

    async def sweep(self, limit: int) -> int:
        # Whoever looks here removes what is due in every namespace: one may have no workers left.
        store = await self._opened()
        if store.upkeep_is_due:
            await asyncio.to_thread(store.keep_up)
        self._bells.keep_up()
        due = await self._read(lambda table: table.due(table.now.wall, 1))
        looked_at, part = 0, limit if due else 0
        while part:
            try:
                found = await self._write(operations.sweep, part)
            except GridFull:  # as in _renew
                if part > 1:
                    part //= 2
                    continue
                found = await self._find_room(operations.sweep, part)
            looked_at += found
            part = min(part, limit - looked_at) if found == part else 0
        return looked_at

    async def _find_room(self, run: Callable[..., _T], *arguments: Any) -> _T:
        """A call that makes room, again: a reader that lost its CPU holds room for a moment."""
        end = time.monotonic() + self._timeout
        while time.monotonic() < end:
            await asyncio.sleep(_MOMENT)
            with contextlib.suppress(GridFull):
                return await self._write(run, *arguments)
        return await self._write(run, *arguments)

    # -- transactions ---------------------------------------------------------------------

    def _usable_store(self) -> Store | None:
        """None before opening, and in a process forked from the one that opened it."""
        store = self._store
        return None if store is None or store.inherited else store

    async def _opened(self) -> Store:
        store = self._usable_store()
        if store is None:
            await self.open()
            store = self._store
            assert store is not None
        return store

    async def _write(self, run: Callable[..., _T], *arguments: Any) -> _T:
        store = self._store
        if store is None or store.inherited:
            store = await self._opened()
        if self._writer is not None:
            return await self._write_durably(self._writer, run, arguments)
        if not store.gate.try_enter():
            await store.gate.enter()
        try:
            outcome, rung = self._transact(store, run, arguments)
        finally:
            store.gate.leave()
        if rung:
            self._ring(rung)
        return outcome

    async def _write_durably(
        self, writer: Writer, run: Callable[..., _T], arguments: tuple[Any, ...]
    ) -> _T:
        # Who claims may have to wait. What belongs to this event loop is done before the hop.
        address, token = b"", None
        for claim in arguments if run in (operations.acquire, operations.read) else ():
            if isinstance(claim, Claim):
                token = claim.token
                self._bells.listen(token)
                address = self._bells.address()

        def run_on_thread(table: LmdbTable) -> _T:
            table.address = address
            return run(table, *arguments)

        outcome: _T = await writer.write(run_on_thread)
        if token is not None and type(outcome) is not Busy:
            self._bells.forget(token)
        return outcome

    def _write_group(self, store: Store, runs: list[Callable[[LmdbTable], Any]]) -> list[Any]:
        """On the writer's thread, also for what was asked for before the grid was closed."""
        store.gate.enter_blocking()
        try:
            outcomes, rung = self._transact(store, _run_all, (runs,), len(runs) > 1)
        finally:
            store.gate.leave()
        self._ring(rung)
        return outcomes

    def _transact(
        self,
        store: Store,
        run: Callable[..., _T],
        arguments: tuple[Any, ...],
        several: bool = False,
        frugal: bool = False,
    ) -> tuple[_T, Sequence[tuple[bytes, bytes]]]:
        """Inside the gate: all of it is kept, or an exception says that nothing is."""
        try:
            transaction = store.env.begin(write=True)
            try:
                now = self._clock.now()
                table = LmdbTable(transaction, now, self._bells, store.decoded)
                if frugal:
                    table.frugal = True
                outcome = run(table, *arguments)
                if (
                    table.swelled
                    and (table.grown_by > SMALL_BYTES or transaction.id() >= store.roomy_until)
                    and not store.has_room(transaction, table.grown_by)
                ):
                    raise GridFull(
                        f"the embedded grid is full: {store.state.max_size >> 20} MiB; raise "
                        "max_size, or shorten the timeout"
                    )
                transaction.commit()
            except BaseException:
                store.decoded.clear()  # records in it may have been changed, and not stored
                transaction.abort()
                raise
        except lmdb.MapFullError as error:
            if store.env.reader_check():  # what those who died had seen is free now
                return self._transact(store, run, arguments, several, frugal)
            if not frugal and not several:
                return self._transact(store, run, arguments, frugal=True)
            raise GridFull(
                "the embedded grid is full, and has no room to make room" + store.held_up_by()
            ) from error
        except lmdb.Error as error:
            raise GridUnavailable(f"the embedded grid failed: {error}") from error
        return outcome, table.rung

    def _ring(self, rung: Sequence[tuple[bytes, bytes]]) -> None:
        for address, token in rung:
            self._bells.ring_at(address, token)

    async def _read(self, run: Callable[..., _T], *arguments: Any) -> _T:
        """Outside the gate: readers block nobody, and nobody blocks them."""
        store = await self._opened()
        try:
            with store.reads, store.env.begin() as transaction:
                return run(LmdbTable(transaction, self._clock.now(), self._bells, {}), *arguments)
        except lmdb.Error as error:
            raise GridUnavailable(f"the embedded grid failed: {error}") from error


def _run_all(table: LmdbTable, runs: list[Callable[[LmdbTable], Any]]) -> list[Any]:
    return [run(table) for run in runs]
