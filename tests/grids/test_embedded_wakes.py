"""Bells between processes: datagrams to sockets that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvloop

from gridsession.grids.contract import Busy, Granted, Missing, QueueFull
from gridsession.grids.embedded import EmbeddedGrid, mailbox
from gridsession.grids.embedded.mailbox import SocketBells
from gridsession.grids.embedded.place import Place
from gridsession.grids.memory import MemoryGrid
from gridsession.testing.contract_hooks import Visitor, a_change, a_claim, expect
from tests.grids.embedded_process import Child, memory_folder
from tests.grids.embedded_words import counted, opened, visitor

pytestmark = pytest.mark.skipif("sys.platform != 'linux'")


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


@contextlib.asynccontextmanager
async def bells_in(folder: Path) -> AsyncIterator[SocketBells]:
    bells = SocketBells(folder)
    try:
        yield bells
    finally:
        bells.close()


def test_two_processes_hand_the_lock_to_and_fro(folder: Path) -> None:
    """A lost bell would cost a second each: forty hand-offs take a fraction of that."""

    async def run() -> None:
        async with opened(folder) as grid:
            there, loop = visitor(grid, 1), asyncio.get_running_loop()
            await there.create(b"0")
            with Child("count", path=folder, numbers=[1], times=100_000) as other:
                other.says("open")
                other.line()
                began = loop.time()
                last = 0
                for _ in range(20):
                    last = await counted(there)
                took = loop.time() - began
                other.kill()
            assert last >= 21
            assert took < 2.0

    asyncio.run(run())


def test_a_datagram_wakes_a_waiter_in_another_process(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            there, holder = visitor(grid, 1), a_claim()
            await there.create(b"0", claim=holder)
            with Child("wait_for_bell", path=folder, number=1) as other:
                other.says("queued")
                assert len(os.listdir(folder / "bells")) == 1
                await there.commit(holder, a_change(b"1"), release=True)
                assert float(other.says("rung")) < 0.5
                other.ends()

    asyncio.run(run())


def test_bells_removed_while_it_is_open_are_made_anew(folder: Path) -> None:
    """Sessions that had to wait were unavailable until a restart."""

    async def run() -> None:
        async with opened(folder) as grid:
            there, holder = visitor(grid, 1), a_claim()
            await there.create(b"0", claim=holder)
            shutil.rmtree(folder / "bells")
            await there.queued(waits := a_claim())  # in the new folder
            assert len(os.listdir(folder / "bells")) == 1
            with Child("wait_for_bell", path=folder, number=1) as other:
                other.says("queued")
                await there.commit(holder, a_change(b"1"), release=True)
                await there.wait(waits)
                expect(Granted, await there.acquire(waits))
                await there.release(waits)
                assert float(other.says("rung")) < 0.5
                other.ends()

    asyncio.run(run())


def test_who_rings_finds_bells_that_were_made_anew(folder: Path) -> None:
    async def run() -> None:
        path = folder / "bells"
        path.mkdir()
        async with bells_in(path) as sender, bells_in(path) as bells:
            token = b"t" * 16
            bells.listen(token)
            lost = bells.address()
            before = len(os.listdir("/proc/self/fd"))
            shutil.rmtree(path)
            sender.ring_at(lost, token)  # to nobody, and no failure
            bells.keep_up()
            address = bells.address()
            sender.ring_at(address, token)
            async with asyncio.timeout(5.0):
                await bells.wait(token, 60.0)
            assert len(os.listdir("/proc/self/fd")) == before
            assert os.listdir(path) == [address.decode()]
        assert os.listdir(path) == []

    asyncio.run(run())


@pytest.mark.parametrize("waiters", [3, 40])
def test_a_full_queue_counts_as_rung(
    folder: Path, waiters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a socket could not hold is lost; that it was full tells that all must look."""
    monkeypatch.setattr(mailbox, "_queue_length", lambda: 10)

    async def run() -> None:
        async with bells_in(folder) as bells, bells_in(folder) as sender:
            tokens = [b"%016d" % number for number in range(waiters)]
            for token in tokens:
                bells.listen(token)
            address = bells.address()
            for number in range(2000):  # until nothing more fits in
                sender.ring_at(address, b"%016d" % (10_000 + number))
            for token in tokens:
                sender.ring_at(address, token)  # lost
            async with asyncio.timeout(5.0):
                await asyncio.gather(*(bells.wait(token, 60.0) for token in tokens))

    asyncio.run(run())


def test_a_few_datagrams_ring_nobody_else(folder: Path) -> None:
    async def run() -> None:
        async with bells_in(folder) as bells, bells_in(folder) as sender:
            mine, other = b"m" * 16, b"o" * 16
            bells.listen(mine)
            bells.listen(other)
            sender.ring_at(bells.address(), mine)
            await bells.wait(mine, 60.0)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await bells.wait(other, 60.0)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["memory", "embedded", "durable"])
def test_a_refused_request_leaves_no_bell_listening(folder: Path, kind: str) -> None:
    """Nobody takes a refused token back: what it left would be there for good."""

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            grid: MemoryGrid | EmbeddedGrid = MemoryGrid()
            if kind != "memory":
                grid = await stack.enter_async_context(opened(folder, durable=kind == "durable"))
            there, stranger = Visitor(grid), Visitor(grid)
            await there.create(b"0", claim=a_claim())
            stranger.key = there.key
            assert type(await there.acquire(a_claim(queue_limit=0))) is QueueFull
            assert type(await there.read(watch=a_claim(queue_limit=0))) is QueueFull
            assert type(await stranger.acquire(a_claim())) is Missing
            assert type(await stranger.read(watch=a_claim())) is Missing
            assert not grid._bells.listeners
            assert type(await there.acquire(a_claim())) is Busy  # it does listen
            assert len(grid._bells.listeners) == 1

    asyncio.run(run())


def test_a_process_that_takes_no_datagrams_keeps_none_from_others(folder: Path) -> None:
    """What it does not take is charged to the sender, whose buffer must not fill for good."""

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            sender = await stack.enter_async_context(bells_in(folder))
            for number in range(60):  # sockets of stopped processes
                stopped = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                stopped.bind(str(folder / f"stopped.{number}"))
                for _ in range(20):
                    sender.ring_at(b"stopped.%d" % number, b"x" * 16)
            bells = await stack.enter_async_context(bells_in(folder))
            bells.listen(b"t" * 16)
            sender.ring_at(bells.address(), b"t" * 16)
            async with asyncio.timeout(5.0):
                await bells.wait(b"t" * 16, 60.0)

    asyncio.run(run())


@pytest.mark.parametrize("failure", [errno.EACCES, errno.ENOBUFS, errno.EMFILE, errno.EPERM])
def test_a_bell_that_cannot_be_rung_fails_no_commit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: int
) -> None:
    """What was done is done: it must not be reported as a failure."""

    class Out:
        def sendto(self, *_: object) -> None:
            raise OSError(failure, os.strerror(failure))

        def close(self) -> None:
            pass

    async def run() -> None:
        async with opened(folder) as grid, opened(folder) as other:
            there, holder = visitor(grid, 1), a_claim()
            await there.create(b"0", claim=holder)
            await there.at(other).queued(a_claim())
            grid._bells._out.close()
            monkeypatch.setattr(grid._bells, "_out", Out())
            await there.commit(holder, a_change(b"1"), release=True)

    asyncio.run(run())


def test_sockets_of_the_dead_are_removed_at_open(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            there = visitor(grid, 1)
            await there.create(claim=a_claim())
            mine = a_claim()
            await there.queued(mine)
            bells = folder / "bells"
            (own,) = os.listdir(bells)
            with Child("wait_for_bell", path=folder, number=1) as other:
                other.says("queued")
                assert len(os.listdir(bells)) == 2
                with Child("hold_open", path=folder) as third:
                    third.says("open")
                    assert len(os.listdir(bells)) == 2  # both are alive
                other.kill()
            assert len(os.listdir(bells)) == 2
            with Child("hold_open", path=folder) as third:
                third.says("open")
                assert os.listdir(bells) == [own]

    asyncio.run(run())


def test_a_deep_folder_has_bells_too(folder: Path) -> None:
    """The address of a socket has 107 bytes."""
    deep = folder.joinpath(*["a-rather-deep-folder"] * 8)

    async def run() -> None:
        async with opened(deep) as grid:
            there, holder = visitor(grid, 1), a_claim()
            await there.create(b"0", claim=holder)
            with Child("wait_for_bell", path=deep, number=1) as other:
                other.says("queued")
                await there.release(holder)
                assert float(other.says("rung")) < 0.5

    asyncio.run(run())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_an_event_loop_for_each_request_leaves_nothing_behind(folder: Path, runner: object) -> None:
    assert callable(runner)
    grid = EmbeddedGrid(Place(folder, 4 << 20))

    async def begin() -> Visitor:
        await grid.open()
        there = visitor(grid, 1)
        await there.create(b"0")
        return there

    async def request(there: Visitor) -> None:
        first, second = a_claim(), a_claim()
        await there.locked(first)
        await there.queued(second)
        asyncio.get_running_loop().call_soon(asyncio.create_task, there.release(first))
        await there.taken(second)
        await there.commit(second, a_change(b"x"), release=True)

    there = runner(begin())
    for _ in range(3):
        runner(request(there))
    before = descriptors()
    for _ in range(20):
        runner(request(there))
    assert descriptors() <= before
    assert len(os.listdir(folder / "bells")) == 1
    runner(grid.close())
    assert os.listdir(folder / "bells") == []
    assert descriptors() < before


def test_hand_offs_on_uvloop_between_processes(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            there, holder = visitor(grid, 1), a_claim()
            await there.create(b"0", claim=holder)
            with Child("wait_for_bell", path=folder, number=1, uvloop=True) as other:
                other.says("queued")
                await there.release(holder)
                assert float(other.says("rung")) < 0.5

    uvloop.run(run())
