"""Looking into an embedded grid from outside, without taking part in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import lmdb

from gridsession.grids.embedded import codec
from gridsession.grids.record import Record
from gridsession.identity import parse_id


class Peek:
    """The records of a grid, read by LMDB alone."""

    def __init__(self, env: lmdb.Environment, namespace: str) -> None:
        self._env = env
        self._prefix = codec.prefix_of(namespace)

    def record(self, session_id: str) -> Record | None:
        identity = parse_id(session_id.encode())
        assert identity is not None
        with self._env.begin() as transaction:
            raw = transaction.get(self._prefix + identity.key + b"h")
        return None if raw is None else codec.unpack(bytes(raw))

    def tickets(self, session_id: str) -> int:
        """How many wait for a session."""
        record = self.record(session_id)
        return 0 if record is None else len(record.tickets)

    def is_locked(self, session_id: str) -> bool:
        record = self.record(session_id)
        return record is not None and record.lock_token is not None

    def entries(self) -> int:
        """Records, payloads and entries of the index, all together."""
        with self._env.begin() as transaction:
            return int(transaction.stat()["entries"])


@contextlib.contextmanager
def peek(grid: Path, namespace: str = "/") -> Iterator[Peek]:
    env = lmdb.open(str(grid), readonly=True, max_readers=1022, max_spare_txns=0)
    try:
        yield Peek(env, namespace)
    finally:
        env.close()
