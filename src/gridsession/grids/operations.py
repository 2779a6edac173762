"""The contract's calls, carried out on a table of records within one transaction.

Shared by the grids that run in this process: they differ in where the table lies and in what makes
a transaction, not in what happens in it. Nothing here awaits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from gridsession.errors import GridUnavailable
from gridsession.grids.contract import (
    EXISTS,
    GONE,
    LOCK_LOST,
    MISSING,
    REMOVED,
    Busy,
    Change,
    Claim,
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
    Now,
    QueueFull,
    Released,
    Removed,
    Replaced,
    Version,
)
from gridsession.grids.record import Record

_UNREADABLE_SECONDS = 600.0  # until a record that cannot be read is looked at again


class Table(Protocol):
    """Records and payloads by key, and an index of deadlines; open for one transaction.

    Whatever is changed is kept whole or not at all, by whoever opened the transaction. `rung`
    gathers the bells, (address, token), to be rung once it is kept.
    """

    now: Now
    rung: Sequence[tuple[bytes, bytes]]

    def load(self, key: bytes) -> Record | None: ...
    def save(self, key: bytes, record: Record) -> None: ...
    def payload(self, key: bytes) -> bytes: ...
    def save_payload(self, key: bytes, payload: bytes, *, grows: bool) -> None: ...
    def delete(self, key: bytes, record: Record) -> None:
        """Record, payload and the index's entry for `record.indexed`."""
        ...

    def index(self, key: bytes, record: Record, due: float) -> None:
        """Move the index's entry for this record to `due`; sets `record.indexed`."""
        ...

    def due(self, wall: float, limit: int) -> Iterable[tuple[float, bytes]]:
        """Up to `limit` entries of the index that are due, the earliest first; not removed."""
        ...

    def forget(self, due: float, key: bytes) -> None:
        """Remove an entry of the index whose record is gone."""
        ...

    def put_off(self, due: float, key: bytes, until: float) -> None:
        """Move an entry of the index whose record cannot be read."""
        ...

    def bell(self, token: bytes) -> bytes:
        """The address at which a ticket's owner can be rung, who listens from now on."""
        ...

    def hush(self, token: bytes) -> None:
        """Nobody will wait for the bell that was asked for."""
        ...


def create(table: Table, key: bytes, new: NewRecord, claim: Claim | None) -> Committed | Exists:
    there = table.load(key)
    if there is not None:
        if there.is_live(table.now):
            return there.committed_by(new.commit_token, table.now) or EXISTS
        _remove(table, key, there)
    record = Record.new(new, table.now, claim)
    table.index(key, record, record.deadline)
    table.save_payload(key, new.payload, grows=True)
    _keep(table, key, record)
    return Committed(record.version, record.deadline, record.deadline - table.now.wall)


def acquire(
    table: Table, key: bytes, secret: bytes, claim: Claim, known: Version | None
) -> Granted | Busy | QueueFull | Replaced | Missing:
    record = table.load(key)
    if record is None:
        return MISSING
    token = claim.token
    contended = record.is_contended(token)
    bell = table.bell(token) if contended else b""
    outcome = record.acquire(table.now, secret, claim, bell)
    if contended and type(outcome) is not Busy:
        table.hush(token)
    if type(outcome) is Granted and (known is None or outcome.snapshot.version != known):
        outcome.snapshot.payload = table.payload(key)
    _keep(table, key, record)
    return outcome


def read(  # noqa: PLR0917 - the contract's arguments, behind the table
    table: Table,
    key: bytes,
    secret: bytes,
    watch: Claim | None,
    seen: bytes | None,
    known: Version | None,
) -> Found | Busy | QueueFull | Replaced | Missing:
    record = table.load(key)
    if record is None:
        return MISSING
    contended = watch is not None and record.is_contended(watch.token)
    bell = table.bell(watch.token) if watch is not None and contended else b""
    outcome = record.read(table.now, secret, watch, seen, bell)
    if watch is not None and contended and type(outcome) is not Busy:
        table.hush(watch.token)
    if type(outcome) is Found and (known is None or outcome.snapshot.version != known):
        outcome.snapshot.payload = table.payload(key)
    _keep(table, key, record)
    return outcome


def commit(
    table: Table, key: bytes, token: bytes, change: Change, release: bool
) -> Committed | LockLost | Gone:
    record = table.load(key)
    if record is None:
        return GONE
    before, size = record.counter, record.size
    outcome = record.commit(table.now, token, change, release)
    if record.counter != before:
        _write(table, key, record, change.payload, size)
    _keep(table, key, record)
    return outcome


def commit_if(
    table: Table, key: bytes, secret: bytes, base: Version, change: Change
) -> Committed | Conflict | Locked | Replaced | Gone:
    record = table.load(key)
    if record is None:
        return GONE
    before, size = record.counter, record.size
    outcome = record.commit_if(table.now, secret, base, change)
    if record.counter != before:
        _write(table, key, record, change.payload, size)
    elif type(outcome) is Conflict:
        outcome.snapshot.payload = table.payload(key)
    _keep(table, key, record)
    return outcome


def _write(table: Table, key: bytes, record: Record, payload: bytes | None, size: int) -> None:
    """What a commit writes beside the record; `size` is what the payload had before."""
    if payload is not None:
        table.save_payload(key, payload, grows=len(payload) > size)
    if record.deadline < record.indexed:
        table.index(key, record, record.deadline)


def renew(table: Table, leases: Sequence[tuple[bytes, bytes]], lease: float) -> list[bool]:
    answers = []
    unreadable: list[GridUnavailable] = []
    for key, token in leases:
        try:
            record = table.load(key)
        except GridUnavailable as error:  # the locks of other records are not to suffer for it
            unreadable.append(error)
            record = None
        answers.append(record is not None and record.renew(table.now, token, lease))
        if record is not None:
            _keep(table, key, record)
    if unreadable and len(unreadable) == len(answers):
        raise unreadable[0]
    return answers


def release(table: Table, key: bytes, token: bytes) -> Released | LockLost | Gone:
    record = table.load(key)
    if record is None or not record.is_live(table.now):
        return GONE
    outcome = record.release(table.now, token)
    _keep(table, key, record)
    return outcome


def touch(table: Table, key: bytes) -> bool:
    record = table.load(key)
    if record is None or not record.is_live(table.now):
        return False
    record.touch(table.now)
    _keep(table, key, record)
    return True


def remove(table: Table, key: bytes, token: bytes | None) -> Removed | LockLost | Gone:
    record = table.load(key)
    if record is None or not record.is_live(table.now):
        return GONE
    if token is not None and record.lock_token != token:
        return LOCK_LOST
    _remove(table, key, record)
    return REMOVED


def sweep(table: Table, limit: int) -> int:
    looked_at = 0
    for due, key in table.due(table.now.wall, limit):
        looked_at += 1
        try:
            record = table.load(key)
        except GridUnavailable:  # it is left alone, and is not to be in the way of what follows
            table.put_off(due, key, table.now.wall + _UNREADABLE_SECONDS)
            continue
        if record is None or record.indexed != due:
            table.forget(due, key)
        if record is None:
            continue
        if not record.is_live(table.now):
            _remove(table, key, record)
        elif record.indexed <= table.now.wall:
            # Also where this was not its own entry: that one may have been put off, when it could
            # not be read, and was this. Otherwise its own lies ahead.
            table.index(key, record, record.due(table.now))
            table.save(key, record)
    return looked_at


def _remove(table: Table, key: bytes, record: Record) -> None:
    record.end()
    table.delete(key, record)
    if record.rung:
        table.rung = [*table.rung, *record.rung]


def _keep(table: Table, key: bytes, record: Record) -> None:
    if record.dirty:
        # A sweep that met it locked has put it off to the end of a lease, which may be over now.
        if record.deadline < record.indexed and (due := record.due(table.now)) < record.indexed:
            table.index(key, record, due)
        table.save(key, record)
        if record.rung:
            table.rung = [*table.rung, *record.rung]
            record.rung = None
        record.dirty = False
