"""`durable=true`: what is acknowledged is on disk; who commits together shares a transaction."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gridsession.errors import GridFull, GridUnavailable
from gridsession.grids.contract import Busy, Committed, Granted, Missing
from gridsession.grids.embedded.writer import Writer
from gridsession.testing.contract_hooks import Visitor, a_change, a_claim, a_new, expect, payload_of
from tests.grids.embedded_process import Child, memory_folder
from tests.grids.embedded_words import MIB, boot, inside, longest_gap, opened, store_of, visitor

pytestmark = pytest.mark.skipif("sys.platform != 'linux'")


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


def test_nothing_is_left_unflushed(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, durable=True) as grid:
            flags = store_of(grid).env.flags()
            assert flags["sync"] is True
            assert flags["metasync"] is True
            assert flags["map_async"] is False

    asyncio.run(run())


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_call_is_on_disk_when_it_is_answered(tmp_path: Path, durable: bool) -> None:
    if os.stat(tmp_path).st_dev == os.stat("/dev/shm").st_dev:
        pytest.skip("there is no disk under the temporary folder")

    async def run() -> None:
        async with opened(tmp_path, durable=durable) as grid:
            for _ in range(3):
                await Visitor(grid).create(b"x" * 5000)
                assert (_dirty(tmp_path / "data.mdb") == 0) is durable

    asyncio.run(run())


def _dirty(data: Path) -> int:
    """KiB of a mapped file that this process has written and the disk has not."""
    for block in Path("/proc/self/smaps").read_text().split("VmFlags"):
        if str(data) in block:
            lines = (line.split() for line in block.splitlines())
            return sum(int(line[1]) for line in lines if line and line[0].endswith("_Dirty:"))
    raise AssertionError("the file is not mapped")


def test_commits_that_come_together_share_a_transaction(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, durable=True) as grid:
            visitors = [Visitor(grid) for _ in range(50)]
            claims = [a_claim() for _ in visitors]
            await asyncio.gather(
                *(v.create(claim=c) for v, c in zip(visitors, claims, strict=True))
            )
            before = store_of(grid).env.info()["last_txnid"]
            await asyncio.gather(
                *(v.commit(c, a_change(b"x")) for v, c in zip(visitors, claims, strict=True))
            )
            assert store_of(grid).env.info()["last_txnid"] - before <= 5

    asyncio.run(run())


def test_one_that_fails_harms_none_of_those_beside_it(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, size=MIB, durable=True) as grid:
            newer = Visitor(grid)
            await newer.create(b"damaged")
            stored = grid._prefix + newer.key + b"h"
            with inside(grid) as transaction:
                transaction.put(stored, b"\x92\x02\x90")
            visitors = [Visitor(grid) for _ in range(20)]
            big = Visitor(grid)
            calls: list[Any] = [there.create(b"%d" % n) for n, there in enumerate(visitors)]
            calls[7:7] = [newer.acquire(a_claim())]
            calls[12:12] = [big.create(b"x" * (2 * MIB))]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            kinds = [type(outcome) for outcome in outcomes]
            assert kinds.count(Committed) == 20
            assert kinds[7] is GridUnavailable
            assert kinds[12] is GridFull
            for number, there in enumerate(visitors):
                found = await there.found()
                assert found.payload == b"%d" % number
                assert found.version.counter == 1

    asyncio.run(run())


def test_flushing_blocks_no_event_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the disk takes."""

    async def run() -> None:
        async with opened(folder, durable=True) as grid:
            flushing = threading.Event()
            real = grid._transact

            def slow(*args: Any, **kwargs: Any) -> Any:
                flushing.wait(5.0)
                return real(*args, **kwargs)

            monkeypatch.setattr(grid, "_transact", slow)
            done = asyncio.Event()
            ticker = asyncio.create_task(longest_gap(done))
            calls = [asyncio.create_task(Visitor(grid).create()) for _ in range(5)]
            await asyncio.sleep(0.2)
            assert not any(call.done() for call in calls)
            flushing.set()
            await asyncio.gather(*calls)
            done.set()
            assert await ticker < 0.15

    asyncio.run(run())


def test_what_was_asked_before_close_is_carried_out(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, durable=True) as grid:
            visitors = [Visitor(grid) for _ in range(30)]
            calls = [asyncio.create_task(there.create(b"kept")) for there in visitors]
            await asyncio.sleep(0)
            await grid.close()
            await asyncio.gather(*calls)
        async with opened(folder, durable=True) as grid:
            for there in visitors:
                assert (await there.at(grid).found()).payload == b"kept"

    asyncio.run(run())


def test_a_closed_writer_answers_nobody_with_silence() -> None:
    async def run() -> None:
        writer = Writer(lambda runs: [run(None) for run in runs])
        assert await writer.write(lambda _: 7) == 7
        writer.close()
        async with asyncio.timeout(2.0):
            with pytest.raises(GridUnavailable, match="closed"):
                await writer.write(lambda _: 7)

    asyncio.run(run())


def test_a_cancelled_call_whose_turn_has_not_come_is_not_made() -> None:
    async def run() -> None:
        began, go = threading.Event(), threading.Event()
        made: list[str] = []

        def first(_: object) -> None:
            began.set()
            go.wait(5.0)

        writer = Writer(lambda runs: [run(None) for run in runs])
        blocking = asyncio.create_task(writer.write(first))
        await asyncio.to_thread(began.wait, 5.0)
        late = asyncio.create_task(writer.write(lambda _: made.append("cancelled")))
        kept = asyncio.create_task(writer.write(lambda _: made.append("kept")))
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(blocking, kept)
        with contextlib.suppress(asyncio.CancelledError):
            await late
        writer.close()
        assert made == ["kept"]

    asyncio.run(run())


def test_each_acknowledged_commit_outlives_its_process_and_its_system(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, durable=True) as grid:
            await visitor(grid, 1).create(b"0")
        with Child("count", path=folder, numbers=[1], times=100_000, durable=True) as other:
            other.says("open")
            for _ in range(20):
                other.line()
            other.kill()
            told = max(int(line.split(" ")[1]) for line in other.rest() or ["1 20"] if " " in line)
        with boot(2):
            async with opened(folder, durable=True) as grid:
                assert told <= int(payload_of(await visitor(grid, 1).found())) <= told + 1

    asyncio.run(run())


def test_waiting_and_bells_work_from_the_writers_thread(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, durable=True) as grid:
            there, holder, waiter = visitor(grid, 1), a_claim(), a_claim()
            await grid.create(there.key, a_new(there.secret), holder)
            with Child("wait_for_bell", path=folder, number=1, durable=True) as other:
                other.says("queued")
                expect(Busy, await there.acquire(waiter))
                await there.release(holder)
                assert float(other.says("rung")) == 0.0
                other.ends()
            # The other has ended with the lock: its lease is what is waited for.
            await grid.remove(there.key)
            async with asyncio.timeout(5.0):
                await there.wait(waiter, 60.0)
            expect(Missing, await there.acquire(waiter))
            await there.create()
            expect(Granted, await there.acquire(waiter))

    asyncio.run(run())
