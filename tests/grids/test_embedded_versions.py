"""Versions in the embedded grid: records put back by force, tickets as they were stored before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import lmdb
import ormsgpack
import pytest

from gridsession.grids.contract import Committed, Conflict, Found, Granted, QueueFull, Released
from gridsession.grids.embedded import codec
from gridsession.grids.embedded.codec import HEAD, PAYLOAD
from gridsession.testing.contract_hooks import Visitor, a_change, a_claim, expect
from tests.grids.embedded_process import memory_folder
from tests.grids.embedded_words import inside, opened


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


def taken(transaction: lmdb.Transaction, stored: bytes) -> bytes:
    return bytes(transaction.get(stored) or b"")


def test_promise_8_a_record_put_back_whose_counter_repeats_is_another_version(
    folder: Path,
) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            there, claim = Visitor(grid), a_claim()
            base = (await there.create(b"base")).version
            stored = grid._prefix + there.key
            with inside(grid) as transaction:
                kept = {part: taken(transaction, stored + part) for part in (HEAD, PAYLOAD)}
            lost = expect(Committed, await there.commit_if(base, a_change(b"lost"))).version
            with inside(grid) as transaction:
                for part, raw in kept.items():
                    transaction.put(stored + part, raw)
            done = expect(Committed, await there.commit_if(base, a_change(b"stored"))).version
            assert (done.counter, done.token == lost.token) == (lost.counter, False)
            assert expect(Found, await there.read(known=lost)).snapshot.payload == b"stored"
            got = expect(Granted, await there.acquire(claim, known=lost)).snapshot
            assert (got.payload, got.version) == (b"stored", done)
            expect(Released, await there.release(claim))
            conflict = expect(Conflict, await there.commit_if(lost, a_change(b"stale")))
            assert (conflict.snapshot.payload, conflict.snapshot.version) == (b"stored", done)
            assert (await there.found()).payload == b"stored"

    asyncio.run(run())


def test_only_a_commits_ticket_says_something_of_limits(folder: Path) -> None:
    """The others are stored as before commits had tickets: older workers may read them."""

    async def run() -> None:
        async with opened(folder) as grid:
            there, holder, old = Visitor(grid), a_claim(), a_claim("old")
            await there.create(claim=holder)
            await there.queued(old)
            await there.queued(a_claim(queue_limit=None))
            stored = grid._prefix + there.key + HEAD
            with inside(grid) as transaction:
                layout, row = ormsgpack.unpackb(taken(transaction, stored))
                tickets = next(part for part in row if isinstance(part, list) and len(part) == 2)
                assert layout == codec.LAYOUT
                assert [ticket[5:] for ticket in tickets] == [[], [True]]
                record = codec.unpack(taken(transaction, stored))
            assert [ticket.uncounted for ticket in record.tickets] == [False, True]
            expect(QueueFull, await there.acquire(a_claim(queue_limit=1)))
            assert (await there.queued(a_claim(queue_limit=2))).ahead == 2
            expect(Released, await there.release(holder))
            await there.locked(old)

    asyncio.run(run())
