"""Short words for the tests of the embedded grid, and for their processes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from unittest import mock

import lmdb

from gridsession.errors import GridFull
from gridsession.grids.contract import Clock
from gridsession.grids.embedded import EmbeddedGrid, store
from gridsession.grids.embedded.place import Place
from gridsession.grids.embedded.store import Store
from gridsession.testing.contract_hooks import Visitor, a_change, a_claim, payload_of

MIB = 1 << 20
PAGE = 4096


@contextlib.asynccontextmanager
async def opened(
    path: Path,
    *,
    size: int | None = 4 * MIB,
    durable: bool = False,
    namespace: str = "/",
    timeout: float = 5.0,
    clock: Clock | None = None,
) -> AsyncIterator[EmbeddedGrid]:
    grid = EmbeddedGrid(
        Place(path, size, durable), namespace=namespace, timeout=timeout, clock=clock
    )
    await grid.open()
    try:
        yield grid
    finally:
        await grid.close()


def store_of(grid: EmbeddedGrid) -> Store:
    assert grid._store is not None
    return grid._store


def pages_in_use(grid: EmbeddedGrid) -> int:
    stat = store_of(grid).env.stat()
    return int(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"])


@contextlib.contextmanager
def boot(number: int) -> Iterator[None]:
    """The system has been started anew, for whatever is opened meanwhile."""
    with mock.patch.object(store, "read_boot_id", return_value=number):
        yield


@contextlib.contextmanager
def inside(grid: EmbeddedGrid) -> Iterator[lmdb.Transaction]:
    """Inside the gate and a write transaction, as another call would be."""
    opened_store = store_of(grid)
    opened_store.gate.enter_blocking()
    try:
        with opened_store.env.begin(write=True) as transaction:
            yield transaction
    finally:
        opened_store.gate.leave()


def visitor(grid: EmbeddedGrid, number: int) -> Visitor:
    """A session that other processes know by its number, too."""
    there = Visitor(grid)
    there.key, there.secret = number.to_bytes(32), (1000 + number).to_bytes(32)
    return there


async def counted(there: Visitor, lease: float = 30.0) -> int:
    """Add one to the number in a session, under its lock; answers it."""
    claim = a_claim(lease=lease, queue_limit=10_000)
    snapshot = await there.taken(claim)
    number = int(payload_of(snapshot)) + 1
    done = await there.commit(claim, a_change(b"%d" % number), release=True)
    assert done.version.counter == snapshot.version.counter + 1
    return number


async def fill(grid: EmbeddedGrid, *sizes: int, timeout: float = 1000.0) -> list[Visitor]:
    """Create sessions with payloads of each size in turn, until there is no room for one more."""
    kept: list[Visitor] = []
    for size in sizes:
        with contextlib.suppress(GridFull):
            for number in itertools.count():
                there = Visitor(grid)
                await there.create(b"%08d" % number + b"x" * (size - 8), timeout=timeout)
                kept.append(there)
    return kept


async def longest_gap(until: asyncio.Event) -> float:
    """For how long, at most, an event loop did not turn, in seconds."""
    loop, longest = asyncio.get_running_loop(), 0.0
    last = loop.time()
    while not until.is_set():
        await asyncio.sleep(0.001)
        now = loop.time()
        longest, last = max(longest, now - last), now
    return longest
