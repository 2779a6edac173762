"""An open grid in a forked process: both go on, and neither harms the other."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from gridsession.grids.contract import Granted
from gridsession.grids.embedded import EmbeddedGrid, store
from gridsession.grids.embedded.gate import Gate
from gridsession.testing.contract_hooks import a_change, a_claim, expect
from tests.grids.embedded_process import Child, memory_folder
from tests.grids.embedded_words import counted, inside, opened, store_of, visitor

pytestmark = pytest.mark.skipif("sys.platform != 'linux'")
Work = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


def fork(work: Work | None = None, *, orderly: bool = False) -> int:
    """Fork a child that does some work and exits; answers its pid.

    Args:
        orderly: it lets go of all that it has as an interpreter does at its end.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads, Python 3.12
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        if work is not None:
            asyncio.run(work())
        if orderly:
            store._close_at_exit()
            store._inherited.clear()
            gc.collect()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


async def ended(*children: int) -> None:
    """Wait until they have ended well; none outlives the test."""
    left = set(children)
    try:
        async with asyncio.timeout(15.0):
            while left:
                for child in list(left):
                    pid, status = os.waitpid(child, os.WNOHANG)
                    if pid:
                        left.remove(child)
                        assert status == 0
                await asyncio.sleep(0.002)
    finally:
        for child in left:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("durable", [False, True])
def test_child_and_parent_go_on_counting(folder: Path, durable: bool) -> None:
    """As gunicorn's workers do when the application is preloaded."""

    async def run() -> None:
        async with opened(folder, durable=durable) as grid:
            there = visitor(grid, 1)
            await there.create(b"0")

            async def work() -> None:
                for _ in range(20):
                    await counted(there)
                await grid.close()

            children = [fork(work) for _ in range(4)]
            for _ in range(20):
                await counted(there)
            await ended(*children)
            assert (await there.found()).payload == b"100"
            assert (await there.found()).version.counter == 101

    asyncio.run(run())


@pytest.mark.parametrize("orderly", [False, True])
@pytest.mark.parametrize("uses", ["nothing", "the grid", "and closes it"])
def test_a_childs_end_harms_nothing_in_the_parent(folder: Path, uses: str, orderly: bool) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            there, claim, waiter = visitor(grid, 1), a_claim("parent"), a_claim()
            await there.create(b"0", claim=claim)
            await there.queued(waiter)

            async def work() -> None:
                if uses != "nothing":
                    assert (await there.found()).payload == b"0"
                    mine = a_claim()
                    assert (await there.queued(mine)).holder == "parent"
                    await there.release(mine)
                if uses == "and closes it":
                    await grid.close()

            await ended(fork(work, orderly=orderly))
            assert store_of(grid).state.clean is False
            await there.commit(claim, a_change(b"1"), release=True)
            await there.wait(waiter)  # its bell still rings
            expect(Granted, await there.acquire(waiter))
            await grid.release(there.key, waiter.token)
            neighbour = Gate(folder / "gate", 1.0)
            with inside(grid):
                assert not neighbour.try_enter()
            assert neighbour.try_enter()
            neighbour.leave()
            neighbour.close()
            assert await counted(there) == 2

    asyncio.run(run())


def test_a_childs_unlock_does_not_free_the_parents_gate(folder: Path) -> None:
    """On an inherited descriptor it would: the lock belongs to what both share."""

    async def run() -> None:
        async with opened(folder) as grid:
            there = visitor(grid, 1)
            await there.create(b"0")
            read_end, write_end = os.pipe()
            go = threading.Event()
            inside_it = threading.Event()

            def occupy() -> None:
                with inside(grid):
                    inside_it.set()
                    go.wait(10.0)

            async def work() -> None:
                os.read(read_end, 1)  # until the parent is inside
                try:
                    async with asyncio.timeout(0.2):
                        await there.found()
                        await counted(there)
                except TimeoutError:
                    return
                raise AssertionError("two are inside")

            child = fork(work)
            thread = threading.Thread(target=occupy)
            thread.start()
            assert inside_it.wait(5.0)
            os.write(write_end, b"x")
            await ended(child)
            go.set()
            thread.join()
            os.close(read_end)
            os.close(write_end)
            assert await counted(there) in (1, 2)

    asyncio.run(run())


def test_the_killed_parents_gate_is_free_while_an_idle_child_lives(folder: Path) -> None:
    """What it inherits is closed at once: a lock lives for as long as any copy of it is open."""

    async def run() -> None:
        async with opened(folder) as grid:
            there = visitor(grid, 1)
            await there.create(b"0")
            with Child("fork_and_stop_in_write", path=folder) as parent:
                parent.says("open")
                idle = int(parent.says("forked"))
                parent.is_stopped()
                parent.kill()
                try:
                    async with asyncio.timeout(5.0):
                        assert await counted(there) == 1
                finally:
                    os.kill(idle, 9)

    asyncio.run(run())


def test_an_idle_child_does_not_keep_the_store_in_use(folder: Path) -> None:
    async def run() -> None:
        read_end, write_end = os.pipe()

        async def idle() -> None:
            os.read(read_end, 1)

        async with opened(folder):
            child = fork(idle)
        try:
            assert '"clean": true' in (folder / "state.json").read_text()
            async with opened(folder, size=8 << 20) as grid:  # grows only when alone
                assert store_of(grid).state.max_size == 8 << 20
        finally:
            os.write(write_end, b"x")
            os.close(read_end)
            os.close(write_end)
        await ended(child)

    asyncio.run(run())


@pytest.mark.parametrize("durable", [False, True])
def test_forks_while_other_threads_write_and_open(folder: Path, durable: bool) -> None:
    """A lock that another thread holds at that moment stays held in the child for ever."""

    async def run() -> None:
        async with opened(folder, durable=durable) as grid:
            for number in range(4):
                await visitor(grid, number).create(b"0")
            done = threading.Event()

            async def writing(number: int) -> None:
                there = visitor(grid, number)
                while not done.is_set():
                    await counted(there)

            async def opening() -> None:
                while not done.is_set():
                    other = EmbeddedGrid(store_of(grid).place)
                    await other.open()
                    await visitor(other, 3).found()
                    await other.close()

            works: list[Work] = [lambda: writing(1), lambda: writing(2), opening]
            threads = [threading.Thread(target=lambda w=w: asyncio.run(w())) for w in works]
            for thread in threads:
                thread.start()

            async def work() -> None:
                async with asyncio.timeout(10.0):
                    await counted(visitor(grid, 0))

            children = []
            for _ in range(8):
                children.append(await asyncio.to_thread(lambda: fork(work)))
                await asyncio.sleep(0.01)
            await ended(*children)
            done.set()
            for thread in threads:
                await asyncio.to_thread(thread.join)
            assert (await visitor(grid, 0).found()).payload == b"8"

    asyncio.run(run())


def test_forks_while_other_threads_read(folder: Path) -> None:
    """A read in the middle of which the fork came would never end in the child."""

    async def run() -> None:
        async with opened(folder) as grid:
            await visitor(grid, 1).create(b"x" * 100_000)
            await visitor(grid, 2).create(b"0")
            done = threading.Event()

            async def reading() -> None:
                while not done.is_set():
                    await visitor(grid, 1).found()

            async def work() -> None:
                await counted(visitor(grid, 2))

            threads = [threading.Thread(target=lambda: asyncio.run(reading())) for _ in range(2)]
            for thread in threads:
                thread.start()
            try:
                for _ in range(20):
                    await ended(fork(work))
            finally:
                done.set()
                for thread in threads:
                    await asyncio.to_thread(thread.join)
            assert (await visitor(grid, 2).found()).payload == b"20"

    asyncio.run(run())


def test_the_inherited_environment_is_closed_before_another_is_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMDB's locks belong to process and file: closing the one would drop the other's."""

    async def run() -> None:
        async with opened(folder) as grid:
            await visitor(grid, 1).create(b"x")
            inherited = store_of(grid).env
            real = store.lmdb.open  # type: ignore[attr-defined]

            def checked(*args: Any, **kwargs: Any) -> Any:
                with pytest.raises(store.lmdb.Error, match="closed"):  # type: ignore[attr-defined]
                    inherited.begin()
                return real(*args, **kwargs)

            async def work() -> None:
                monkeypatch.setattr(store.lmdb, "open", checked)  # type: ignore[attr-defined]
                assert (await visitor(grid, 1).found()).payload == b"x"
                assert store_of(grid).env is not inherited

            await ended(fork(work))
            assert store_of(grid).env is inherited

    asyncio.run(run())


def test_a_store_that_could_not_be_closed_is_inherited_as_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_LAST_WORDS", 0.01)

    async def run() -> None:
        async with opened(folder) as grid:
            left = store_of(grid)
            await visitor(grid, 1).create(b"0")
            left.gate.threads.acquire()  # as a thread that does not come out
        left.gate.threads.release()

        async def work() -> None:
            assert left.inherited
            async with opened(folder) as grid:
                assert await counted(visitor(grid, 1)) == 1

        await ended(fork(work))
        async with opened(folder) as grid:
            assert store_of(grid) is left
            assert await counted(visitor(grid, 1)) == 2

    asyncio.run(run())
