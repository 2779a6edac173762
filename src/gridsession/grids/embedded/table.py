"""The records of an LMDB file, as `operations.Table` wants them."""

from __future__ import annotations

from collections.abc import Sequence

import lmdb

from gridsession.errors import GridFull
from gridsession.grids.contract import Now
from gridsession.grids.embedded import codec
from gridsession.grids.embedded.codec import HEAD, PAYLOAD
from gridsession.grids.embedded.mailbox import SocketBells
from gridsession.grids.record import Record

_SHORT_QUEUE = 5  # tickets, of 150 bytes or so each; a record of half a page needs two pages

_MOST_DECODED = 1000  # records, of about a kilobyte each


# LMDB's types allow for `buffers=True`, with which it hands out memoryviews; we get bytes.
class LmdbTable:
    """One transaction's view.

    Args:
        transaction: LMDB's; whoever opened it commits or aborts it.
        now: the time of all that happens in it.
        bells: where the caller can be rung.
        decoded: records as this process stored them last, by key, with the bytes that it stored.
            What lies in the file is read all the same, and compared: while it is what we stored,
            it need not be taken apart again. To be cleared when the transaction is aborted.

    Attributes:
        frugal: there is no room for a long record: queues are cut to what fits into a part of a
            page. Those left out enter their tickets anew at their next heartbeat.
        address: the caller's bell, where it had to be made beforehand.
        swelled: something became longer: a record by a lock, a ticket, a commit's token, or a
            payload; the file may have become too full.
        grown_by: bytes of the payloads that became longer.
    """

    # Defaults on the class: most transactions change none of them.
    address: bytes | None = None
    rung: Sequence[tuple[bytes, bytes]] = ()
    swelled = False
    grown_by = 0
    frugal = False
    _loaded = 0  # bytes of the record that was loaded last

    def __init__(
        self,
        transaction: lmdb.Transaction,
        now: Now,
        bells: SocketBells,
        decoded: dict[bytes, tuple[bytes, Record]],
    ) -> None:
        self._txn = transaction
        self._bells = bells
        self._decoded = decoded
        self.now = now

    def load(self, key: bytes) -> Record | None:
        raw: bytes | None = self._txn.get(key + HEAD)  # type: ignore[assignment]
        known = self._decoded.get(key)
        # Whatever is saved was looked for before: that it is not among them yet is seen here.
        if known is None and len(self._decoded) >= _MOST_DECODED:
            self._decoded.clear()
        if raw is None:
            return None
        self._loaded = len(raw)
        record = known[1] if known is not None and known[0] == raw else codec.unpack(raw)
        if record.boot_id != self.now.boot_id:
            record.enter_boot(self.now.boot_id)
        return record

    def save(self, key: bytes, record: Record) -> None:
        if self.frugal:
            del record.tickets[_SHORT_QUEUE:]
        raw = codec.pack(record)
        if len(raw) > self._loaded:
            self.swelled = True
        self._txn.put(key + HEAD, raw)
        self._decoded[key] = (raw, record)

    def payload(self, key: bytes) -> bytes:
        payload: bytes = self._txn.get(key + PAYLOAD, b"")  # type: ignore[assignment]
        return payload

    def save_payload(self, key: bytes, payload: bytes, *, grows: bool) -> None:
        self._txn.put(key + PAYLOAD, payload)
        if grows:
            self.swelled = True
            self.grown_by += len(payload)

    def delete(self, key: bytes, record: Record) -> None:
        self._decoded.pop(key, None)
        self._txn.delete(key + HEAD)
        self._txn.delete(key + PAYLOAD)
        self._txn.delete(codec.index_key(record.indexed, key))

    def index(self, key: bytes, record: Record, due: float) -> None:
        self._txn.delete(codec.index_key(record.indexed, key))
        record.indexed = due
        self._txn.put(codec.index_key(due, key), b"")

    def due(self, wall: float, limit: int) -> list[tuple[float, bytes]]:
        due: list[tuple[float, bytes]] = []
        with self._txn.cursor() as cursor:
            if cursor.set_range(codec.INDEX):
                raw: bytes
                for raw in cursor.iternext(keys=True, values=False):  # type: ignore[assignment]
                    if len(due) == limit or not raw.startswith(codec.INDEX):
                        break
                    at, key = codec.parse_index_key(raw)
                    if at > wall:
                        break
                    due.append((at, key))
        return due

    def forget(self, due: float, key: bytes) -> None:
        self._txn.delete(codec.index_key(due, key))

    def put_off(self, due: float, key: bytes, until: float) -> None:
        self.forget(due, key)
        self._txn.put(codec.index_key(until, key), b"")

    def bell(self, token: bytes) -> bytes:
        if self.frugal:
            raise GridFull("the embedded grid is full, and has no room for one who waits")
        if self.address is None:
            self._bells.listen(token)
            return self._bells.address()
        return self.address  # on the writer's thread: made, and listened at, before

    def hush(self, token: bytes) -> None:
        self._bells.forget(token)
