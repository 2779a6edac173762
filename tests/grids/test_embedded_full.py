"""A full store: whatever makes room finds room, nothing acknowledged is lost, and it recovers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gridsession.errors import GridFull
from gridsession.grids.contract import Busy, Claim, Committed, Released, Removed
from gridsession.grids.embedded import EmbeddedGrid
from gridsession.testing import ManualClock
from gridsession.testing.contract_hooks import Visitor, a_change, a_claim, a_new, expect, payload_of
from tests.grids.embedded_process import Child, memory_folder
from tests.grids.embedded_words import (
    MIB,
    PAGE,
    counted,
    fill,
    inside,
    opened,
    pages_in_use,
    store_of,
    visitor,
)

pytestmark = pytest.mark.skipif("sys.platform != 'linux'")
LONG_NAME = "POST /cart · web-3 · pid 71 " * 3


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


async def crowd(kept: list[Visitor], tickets: int) -> tuple[list[tuple[Visitor, Claim]], int]:
    """Lock each session and let others queue at it, for as long as the grid takes it."""
    held, refused = [], 0
    for there in kept:
        claim = a_claim(LONG_NAME)
        try:
            await there.locked(claim)
        except GridFull:
            refused += 1
        else:
            held.append((there, claim))
    for there, _ in held:
        try:
            for _ in range(tickets):
                await there.queued(a_claim(LONG_NAME))
        except GridFull:
            refused += 1
    return held, refused


@pytest.mark.parametrize("payload", [100, 1500, 3000, 100_000])
@pytest.mark.parametrize("tickets", [0, 50])
@pytest.mark.parametrize("size", [MIB, 3 * MIB])
def test_in_a_full_store_releases_renewals_and_sweeps_find_room(
    folder: Path, payload: int, tickets: int, size: int
) -> None:
    """The worst that can be done with locks and tickets; each of these copies its own pages."""

    async def run() -> None:
        clock = ManualClock()
        async with opened(folder, size=size, clock=clock) as grid:
            kept = await fill(grid, payload, 100, timeout=100.0)
            assert pages_in_use(grid) > size // PAGE // 2
            held, refused = await crowd(kept, tickets)
            assert refused or not tickets, "the store was not brought to its brim"
            pairs = [(there.key, claim.token) for there, claim in held]
            assert await grid.renew(pairs, 30.0) == [True] * len(pairs)
            for number, there in enumerate(kept):
                assert payload_of(await there.found())[:8].isdigit(), number
            for there, claim in held:
                expect(Released, await there.release(claim))
            clock.advance(1000.0)
            swept = 0
            limit = 256 if tickets else 10_000
            while (found := await grid.sweep(limit)) == limit:
                swept += found
            assert swept + found == len(kept)
            assert pages_in_use(grid) <= 1
            again = await fill(grid, payload, 100)
            assert len(again) >= 0.5 * len(kept)  # what was freed does not lie side by side

    asyncio.run(run())


def test_in_a_full_store_removals_one_by_one_find_room(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, size=MIB) as grid:
            kept = await fill(grid, 100, 100)
            await crowd(kept, 50)
            for there in kept:
                expect(Removed, await grid.remove(there.key))
            assert pages_in_use(grid) == 0

    asyncio.run(run())


def test_a_full_store_takes_what_does_not_grow(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, size=MIB) as grid:
            first, claim = Visitor(grid), a_claim()
            await first.create(b"a" * 1000, claim=claim)
            kept = await fill(grid, 5000, 100)
            for number in range(300):
                await first.commit(claim, a_change(b"%04d" % number * 250))
                assert await grid.touch(kept[number % len(kept)].key)
            before = await first.found()
            for release in (False, True):
                change = a_change(b"b" * 50_000)
                with pytest.raises(GridFull, match="1 MiB"):
                    await grid.commit(first.key, claim.token, change, release=release)
            assert await first.found() == before
            await first.commit(claim, a_change(b"smaller"), release=True)
            for there in kept[:20]:
                expect(Removed, await grid.remove(there.key))
            await Visitor(grid).create(b"c" * 5000)

    asyncio.run(run())


def test_a_payload_that_fits_in_no_gap_is_grid_full(folder: Path) -> None:
    """A payload needs pages side by side: half of the file is free, and no gap is long enough."""

    async def run() -> None:
        async with opened(folder, size=4 * MIB) as grid:
            kept = await fill(grid, 40_000)
            for there in kept[::2]:
                expect(Removed, await grid.remove(there.key))
            assert pages_in_use(grid) * PAGE < 2.3 * MIB
            big = Visitor(grid)
            with pytest.raises(GridFull):
                await big.create(b"x" * MIB)
            await Visitor(grid).create(b"x" * 30_000)
            for there in kept[1::2]:
                assert len(payload_of(await there.found())) == 40_000

    asyncio.run(run())


def test_the_reserve_is_not_for_payloads(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, size=20 * MIB) as grid:
            await fill(grid, 100_000, 3000, 100)
            assert pages_in_use(grid) <= 20 * 256 * 95 // 100

    asyncio.run(run())


def test_workers_hammer_a_full_store(folder: Path) -> None:
    """Three processes fill it, each removing some of its own: each finds just what it was told."""

    async def run() -> None:
        async with opened(folder, size=MIB) as grid:
            with contextlib.ExitStack() as stack:
                children = [
                    stack.enter_context(
                        Child("hammer", path=folder, size=MIB, seed=seed, rounds=1500)
                    )
                    for seed in (1, 2)
                ]
                for child in children:
                    refused, lost, starved = child.says("done").split(" ", 2)
                    assert int(refused) > 0
                    assert int(lost) == 0
                    assert starved == "[]", "a release found no room"
                    child.ends()
            await fill(grid, 1000, 100)

    asyncio.run(run())


def test_what_dead_readers_saw_is_given_back_when_it_is_needed(folder: Path) -> None:
    """A reader killed in the middle pins all that was there: one made a file grow 2000 times."""

    async def run() -> None:
        async with opened(folder, size=MIB) as grid:
            there = visitor(grid, 1)
            await there.create(b"0")
            for _ in range(2):
                with Child("stop_in_read", path=folder, size=MIB) as reader:
                    reader.is_stopped()
                    reader.kill()
                for _ in range(300):  # each copies a page or two of the 256
                    await counted(there)
            assert await counted(there) == 601

    asyncio.run(run())


def test_sweeping_forgets_dead_readers(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, size=16 * MIB) as grid:
            with Child("stop_in_read", path=folder, size=16 * MIB) as reader:
                reader.is_stopped()
                reader.kill()
            assert str(reader.pid) in store_of(grid).env.readers()
            await grid.sweep(10)
            assert str(reader.pid) not in store_of(grid).env.readers()

    asyncio.run(run())


def test_a_stopped_reader_is_named_and_nothing_is_lost(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, size=MIB) as grid:
            there, claim = visitor(grid, 1), a_claim()
            await there.create(b"0")
            with Child("stop_in_read", path=folder, size=MIB) as reader:
                reader.is_stopped()
                done, refused = 0, ""
                while not refused and done < 2000:
                    try:
                        done = await counted(there)
                    except GridFull as error:
                        refused = str(error)
                assert f"process {reader.pid} is inside a read" in refused
                reader.go_on()
                reader.says("out")
                # The call that was refused may have been the one that takes the lock, or not.
                await grid.sweep(1)
                assert int(payload_of(await there.found())) == done
                await Visitor(grid).create(b"x" * 10_000)
            await grid.remove(there.key)
            new = a_new(there.secret)
            expect(Committed, await grid.create(there.key, new, claim))
            expect(Busy, await there.acquire(a_claim()))

    asyncio.run(run())


def test_what_makes_room_waits_for_a_reader_that_is_slow_to_leave(folder: Path) -> None:
    """Off its CPU for some milliseconds, it holds whatever was freed meanwhile."""

    async def run() -> None:
        async with opened(folder, size=MIB) as grid:
            there, others = visitor(grid, 1), [Visitor(grid) for _ in range(4)]
            await there.create(b"0")
            claims = [a_claim() for _ in others]
            for other, claim in zip(others, claims, strict=True):
                await other.create(claim=claim, timeout=0.001)
            with Child("stop_in_read", path=folder, size=MIB) as reader:
                reader.is_stopped()
                with contextlib.suppress(GridFull):
                    while True:
                        await counted(there)
                calls: list[asyncio.Task[Any]] = [
                    asyncio.create_task(others[0].release(claims[0])),
                    asyncio.create_task(grid.renew([(others[1].key, claims[1].token)], 30.0)),
                    asyncio.create_task(grid.remove(others[2].key)),
                    asyncio.create_task(grid.sweep(10)),
                ]
                await asyncio.sleep(0.1)
                assert not any(call.done() for call in calls)
                reader.go_on()
                async with asyncio.timeout(4.0):
                    released, renewed, removed, swept = await asyncio.gather(*calls)
                expect(Released, released)
                assert renewed == [True]
                expect(Removed, removed)
                assert swept >= 1

    asyncio.run(run())


def test_a_refused_call_leaves_no_trace(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, size=MIB) as grid:
            await fill(grid, 5000, 100)
            before = content(grid)
            for size in (5000, 100_000, MIB):
                with pytest.raises(GridFull):
                    await Visitor(grid).create(b"x" * size, claim=a_claim())
            assert content(grid) == before

    asyncio.run(run())


def content(grid: EmbeddedGrid) -> list[tuple[bytes, bytes]]:
    with inside(grid) as transaction, transaction.cursor() as cursor:
        return [(bytes(key), bytes(value)) for key, value in cursor]


@pytest.mark.soak
def test_readers_killed_for_long_never_fill_it(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, size=MIB) as grid:
            there = visitor(grid, 1)
            await there.create(b"0")
            for round_ in range(200):
                with Child("stop_in_read", path=folder, size=MIB) as reader:
                    reader.is_stopped()
                    reader.kill()
                for _ in range(100):
                    await counted(there)
                assert int(payload_of(await there.found())) == 100 * (round_ + 1)
            assert pages_in_use(grid) < 5

    asyncio.run(run())


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 20))
def test_workers_hammer_a_full_store_for_long(folder: Path, seed: int) -> None:
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                Child("hammer", path=folder, size=2 * MIB, seed=seed * 10 + n, rounds=15_000)
            )
            for n in range(3)
        ]
        for child in children:
            assert child.line(300.0).endswith(" 0 []")
            child.ends()
