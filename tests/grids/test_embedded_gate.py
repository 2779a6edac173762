"""The gate, and death inside of it: nobody waits blindly, nothing is half written."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gridsession.errors import GridUnavailable
from gridsession.grids.contract import Found
from gridsession.grids.embedded import store
from gridsession.grids.embedded.gate import Gate
from gridsession.testing.contract_hooks import Visitor, a_claim, expect
from tests.grids.embedded_process import Child, memory_folder
from tests.grids.embedded_words import MIB, counted, inside, longest_gap, opened, store_of, visitor

pytestmark = pytest.mark.skipif("sys.platform != 'linux'")
WAIT = 0.3  # seconds that a call waits at the gate in these tests


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("ending", ["continues", "is killed"])
def test_a_process_stopped_in_a_transaction_stops_no_event_loop(
    folder: Path, ending: str, durable: bool
) -> None:
    async def run() -> None:
        async with opened(folder, timeout=WAIT, durable=durable) as grid:
            loop = asyncio.get_running_loop()
            there = visitor(grid, 1)
            await there.create(b"0")
            with Child("stop_in_write", path=folder, dirty=50, durable=durable) as other:
                other.says("open")
                other.tell()
                other.is_stopped()
                done = asyncio.Event()
                ticker = asyncio.create_task(longest_gap(done))
                began = loop.time()
                calls = [counted(there), there.create(), grid.touch(there.key)] + [
                    grid.release(there.key, bytes(16)) for _ in range(200)
                ]
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
                took = loop.time() - began
                for outcome in outcomes:
                    assert isinstance(outcome, GridUnavailable), outcome
                    assert f"process {other.pid} is inside" in str(outcome)
                assert took < WAIT + 2.0
                assert (await there.found()).payload == b"0"  # reading goes on
                done.set()
                assert await ticker < 0.5  # a loop that stood still stood until the other went on
                if ending == "continues":
                    other.go_on()
                    other.says("out")
                else:
                    other.kill()
                assert await counted(there) == 1
                with inside(grid) as transaction:
                    assert transaction.get(b"r torn 1") is None

    asyncio.run(run())


def test_who_waits_at_the_gate_gets_in_as_soon_as_it_opens(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, timeout=20.0) as grid:
            there = visitor(grid, 1)
            await there.create(b"0")
            with Child("stop_in_write", path=folder) as other:
                other.says("open")
                other.tell()
                other.is_stopped()
                waiting = asyncio.create_task(counted(there))
                await asyncio.sleep(0.05)
                assert not waiting.done()
                other.go_on()
                async with asyncio.timeout(5.0):
                    assert await waiting == 1

    asyncio.run(run())


def test_cancelled_at_the_gate_a_call_has_not_happened(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            there = visitor(grid, 1)
            with inside(grid):
                call = asyncio.create_task(there.create(b"x"))
                await asyncio.sleep(0.02)
                call.cancel()
                await asyncio.wait([call])
                assert call.cancelled()
            await there.create(b"y")
            assert (await there.found()).payload == b"y"

    asyncio.run(run())


def test_the_store_can_be_opened_while_another_is_stopped_inside(folder: Path) -> None:
    async def run() -> None:
        with Child("stop_in_write", path=folder) as other:
            other.says("open")
            other.tell()
            other.is_stopped()
            async with asyncio.timeout(10.0), opened(folder, timeout=WAIT) as grid:
                with pytest.raises(GridUnavailable, match=f"process {other.pid}"):
                    await Visitor(grid).create(b"x")

    asyncio.run(run())


def test_threads_of_one_process_exclude_one_another(tmp_path: Path) -> None:
    """`flock` alone would let them all in: the descriptor is the same."""
    gate = Gate(tmp_path / "gate", 1.0)
    assert gate.try_enter()
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(gate.try_enter()))
    thread.start()
    thread.join()
    assert seen == [False]
    gate.leave()
    assert gate.try_enter()
    gate.leave()
    gate.close()


def test_processes_exclude_one_another(tmp_path: Path) -> None:
    """Each on a descriptor of its own."""
    first, second = Gate(tmp_path / "gate", 0.01), Gate(tmp_path / "gate", 0.01)
    assert first.try_enter()
    assert not second.try_enter()
    with pytest.raises(GridUnavailable, match=f"process {os.getpid()}"):
        second.enter_blocking()
    first.leave()
    assert second.try_enter()
    assert not first.try_enter()
    second.leave()
    first.close()
    second.close()


def test_a_process_that_is_alone_locks_nothing_until_another_joins(tmp_path: Path) -> None:
    first = Gate(tmp_path / "gate", 0.01, alone=True)
    assert first.try_enter()
    with open(tmp_path / "gate", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody has it
    second, third = Gate(tmp_path / "gate", 0.01), Gate(tmp_path / "gate", 0.01)
    for joined in (second, third):
        assert not joined.try_enter()
    with pytest.raises(GridUnavailable, match=f"process {os.getpid()}"):
        third.enter_blocking()
    first.leave()
    for one, other in ((third, first), (first, second), (second, third)):
        assert one.try_enter()
        assert not other.try_enter()
        with open(tmp_path / "gate", "rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        one.leave()
    for gate in (first, second, third):
        gate.close()


def test_who_was_alone_sees_at_its_next_entering_that_another_joined(tmp_path: Path) -> None:
    first = Gate(tmp_path / "gate", 0.01, alone=True)
    second = Gate(tmp_path / "gate", 0.01)
    assert first.try_enter()
    assert not second.try_enter()
    first.leave()
    first.close()
    again = Gate(tmp_path / "gate", 0.01)
    assert second.try_enter()
    assert not again.try_enter()
    second.leave()
    second.close()
    alone = Gate(tmp_path / "gate", 0.01, alone=True)
    assert alone.try_enter()
    alone.leave()
    alone.close()
    again.close()


@pytest.mark.parametrize("asked_for", [True, False])
def test_what_died_inside_while_it_was_alone_is_in_nobodys_way(
    folder: Path, asked_for: bool
) -> None:
    """Also when its parent does not ask what became of it, as some containers' first process."""

    async def run() -> None:
        with Child("stop_in_write", path=folder) as other:
            other.says("open")
            other.tell()
            other.is_stopped()
            async with opened(folder, timeout=WAIT) as grid:
                with pytest.raises(GridUnavailable, match=f"process {other.pid}"):
                    await Visitor(grid).create(b"x")
                if asked_for:
                    other.kill()
                else:
                    os.kill(other.pid, signal.SIGKILL)
                    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
                there = Visitor(grid)
                await there.create(b"y")
                assert (await there.found()).payload == b"y"

    asyncio.run(run())


def test_a_process_is_not_in_its_own_way_after_an_exec(folder: Path) -> None:
    """It was inside when it became another program, and has the same pid now."""

    async def run() -> None:
        with Child("hold_open", path=folder) as other:
            other.says("open")
            with open(folder / "gate", "r+b") as file:
                file.write(os.getpid().to_bytes(8, sys.byteorder))
            async with opened(folder, timeout=WAIT) as grid:
                await Visitor(grid).create(b"x")

    asyncio.run(run())


def test_a_closed_gate_is_shut_and_says_so(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate", 0.01)
    gate.close()
    assert not gate.try_enter()
    with pytest.raises(GridUnavailable, match="closed"):
        gate.enter_blocking()


def test_threads_with_event_loops_of_their_own_lose_no_update(folder: Path) -> None:
    async def create() -> None:
        async with opened(folder) as grid:
            await visitor(grid, 1).create(b"0")

    async def work() -> None:
        async with opened(folder) as grid:
            for _ in range(25):
                await counted(visitor(grid, 1))

    async def check() -> None:
        async with opened(folder) as grid:
            assert (await visitor(grid, 1).found()).payload == b"100"

    asyncio.run(create())
    threads = [threading.Thread(target=lambda: asyncio.run(work())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(check())


def test_no_call_blocks_the_loop_but_lmdb_itself(folder: Path) -> None:
    from blockbuster import blockbuster_ctx

    async def run() -> None:
        async with opened(folder) as grid:
            there, claim = visitor(grid, 1), a_claim()
            with blockbuster_ctx("gridsession"):
                await there.create(b"0")
                await counted(there)
                await there.locked(claim)
                waiter = a_claim()
                await there.queued(waiter)
                await grid.renew([(there.key, claim.token)], 30.0)
                await there.release(claim)
                await there.wait(waiter, 0.01)
                await there.found()
                await grid.sweep(10)
                await grid.remove(there.key)

    asyncio.run(run())


# -- the end of a process whose other threads go on -------------------------------------------


@pytest.mark.parametrize(
    ("inside_for", "durable", "times"), [(0.2, False, 1), (None, False, 5), (None, True, 2)]
)
def test_a_process_ends_while_another_of_its_threads_writes(
    folder: Path, inside_for: float | None, durable: bool, times: int
) -> None:
    """Closed under a thread that was inside, the process and all its neighbours hung for ever."""

    async def run() -> None:
        for _ in range(times):
            with Child(
                "end_beside_a_thread", path=folder, inside_for=inside_for, durable=durable
            ) as other:
                other.says("ending")
                other.ends()
            assert '"clean": true' in (folder / "state.json").read_text()
            async with opened(folder, durable=durable, timeout=WAIT) as grid:
                assert (await visitor(grid, 1).found()).payload == b"kept"
                for number in (1, 2):
                    await grid.remove(visitor(grid, number).key)

    asyncio.run(run())


def test_a_process_ends_beside_a_thread_that_does_not_come_out(folder: Path) -> None:
    """As if it were killed there: nobody says that all was written."""

    async def run() -> None:
        with Child("end_beside_a_thread", path=folder, inside_for=60.0) as other:
            other.says("ending")
            other.ends()
        assert '"clean": false' in (folder / "state.json").read_text()
        async with opened(folder, timeout=WAIT) as grid:
            assert (await visitor(grid, 1).found()).payload == b"kept"
            assert await grid.remove(visitor(grid, 1).key)

    asyncio.run(run())


def test_a_store_closed_under_its_threads_is_unavailable_to_them(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, timeout=0.01) as grid:
            there = visitor(grid, 1)
            await there.create(b"0")
            await asyncio.to_thread(store._close_at_exit)
            async with asyncio.timeout(5.0):
                for call in (there.read, there.create, lambda: grid.sweep(1)):
                    with pytest.raises(GridUnavailable):
                        await call()
            grid._store = None
            grid._bells.close()

    asyncio.run(run())


@pytest.mark.parametrize("then", ["opens it again", "ends"])
def test_a_store_that_could_not_be_closed_is_still_known(
    folder: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Opened beside itself, LMDB's locks would be lost; never closed, nobody says it is whole."""
    monkeypatch.setattr(store, "_LAST_WORDS", 0.01)

    async def run() -> None:
        async with opened(folder) as grid:
            left = store_of(grid)
            await visitor(grid, 1).create(b"0")
            left.gate.threads.acquire()  # as a thread that does not come out
        assert '"clean": false' in (folder / "state.json").read_text()
        left.gate.threads.release()
        if then == "opens it again":
            async with opened(folder) as grid:
                assert store_of(grid) is left
                assert await counted(visitor(grid, 1)) == 1
        else:
            store._close_at_exit()
        assert '"clean": true' in (folder / "state.json").read_text()
        assert store._stores == {}

    asyncio.run(run())


# -- death ------------------------------------------------------------------------------------


def killed_under_load(folder: Path, rounds: int, children: int, durable: bool) -> None:
    """Kill one of several workers at random moments; what each was told has to be there."""
    chance = random.Random(rounds)

    async def run() -> None:
        async with opened(folder, timeout=10.0, durable=durable) as grid:
            told = dict.fromkeys(range(4), 0)
            for number in told:
                await visitor(grid, number).create(b"0")
            for _ in range(rounds):
                with contextlib.ExitStack() as stack:
                    workers = [
                        stack.enter_context(
                            Child(
                                "count",
                                path=folder,
                                numbers=chance.sample(range(4), 4),
                                times=100_000,
                                lease=0.2,
                                durable=durable,
                            )
                        )
                        for _ in range(children)
                    ]
                    for worker in workers:
                        worker.says("open")
                        worker.line()
                    await asyncio.sleep(chance.uniform(0.0, 0.03))
                    for worker in workers:
                        os.kill(worker.pid, signal.SIGKILL)
                    for worker in workers:
                        for line in worker.rest():
                            if said := re.fullmatch(r"(\d+) (\d+)", line):
                                number, count = map(int, said.groups())
                                told[number] = max(told[number], count)
                for number in told:
                    there = visitor(grid, number)
                    async with asyncio.timeout(10.0):
                        count = await counted(there)  # its lock comes free with the lease
                    assert count > told[number], "an acknowledged commit is lost"
                    told[number] = count
                    found = expect(Found, await there.read()).snapshot
                    assert found.version.counter == count + 1, "a version was given out twice"

    asyncio.run(run())


def test_workers_killed_under_load_leave_it_whole(folder: Path) -> None:
    killed_under_load(folder, rounds=2, children=2, durable=False)


def test_durable_workers_killed_under_load_leave_it_whole(folder: Path) -> None:
    killed_under_load(folder, rounds=1, children=2, durable=True)


@pytest.mark.soak
@pytest.mark.parametrize("durable", [False, True])
def test_workers_killed_under_load_for_long(folder: Path, durable: bool) -> None:
    killed_under_load(folder, rounds=300, children=3, durable=durable)


@pytest.mark.parametrize("dirty", [0, 1, 100, 400])
def test_killed_inside_a_write_the_next_is_in_at_once(folder: Path, dirty: int) -> None:
    """With WRITEMAP its pages are in the file already; no tree refers to them."""

    async def run() -> None:
        async with opened(folder, timeout=WAIT) as grid:
            there = visitor(grid, 1)
            await there.create(b"0")
            before = store_of(grid).env.info()["last_txnid"]
            with Child("stop_in_write", path=folder, size=4 * MIB, dirty=dirty) as other:
                other.says("open")
                other.tell()
                other.is_stopped()
                other.kill()
                assert await counted(there) == 1
            assert store_of(grid).env.info()["last_txnid"] == before + 2
            for number in range(2, 20):
                assert await counted(there) == number
            with inside(grid) as transaction:
                assert all(not bytes(key).startswith(b"r torn") for key, _ in transaction.cursor())

    asyncio.run(run())
