"""What must hold on a Redis, through networks and servers that fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from gridsession import GridUnavailable, SessionGone, SessionLockLost, SessionProvider
from gridsession.grids.contract import Found
from gridsession.grids.redis import RedisGrid
from gridsession.testing import FaultProxy
from gridsession.testing.contract_hooks import payload_of
from tests.grids.redis_attack import (
    DEAD_IN_LINE,
    GRID_TIMEOUT,
    LEASE,
    SLACK,
    Process,
    Told,
    Worker,
    a_provider,
    attack,
    check_sessions,
    longest_lock,
    make_sessions,
)
from tests.provider.harness import identity_of, in_loop, until
from tests.redis_peek import Peek
from tests.redis_server import RedisServer, a_namespace

DURABLE = {"appendonly": "yes", "appendfsync": "always"}
HEALS_WITHIN = 1.0  # seconds after which a server that is back is used again


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis", **DURABLE) as server:
        yield server


async def put(provider: SessionProvider, session_id: str, value: int) -> None:
    async with provider.open(session_id) as session:
        session["n"] = value


async def value_of(provider: SessionProvider, session_id: str) -> object:
    async with provider.open(session_id, access="read_only") as session:
        return session.get("n")


# -- faults at random ---------------------------------------------------------------------------


def test_promises_1_4_5_7_hold_through_a_network_that_fails(
    server: RedisServer, tmp_path: Path
) -> None:
    async def main() -> str:
        async with asyncio.timeout(60):
            return await attack(server, tmp_path, sessions=50, increments=1500, processes=2, seed=1)

    print(asyncio.run(main()))


@pytest.mark.soak
@pytest.mark.parametrize("seed", [2, 3])
def test_promises_1_4_5_7_fifty_thousand_increments(
    server: RedisServer, tmp_path: Path, seed: int
) -> None:
    async def main() -> str:
        return await attack(
            server,
            tmp_path,
            sessions=1_000,
            increments=50_000,
            processes=4,
            seed=seed,
            longest=1.5,
            progress=10.0,
        )

    print(asyncio.run(main()))


@in_loop
async def test_promises_4_5_a_commit_whose_answer_is_lost_is_repeated_and_not_done_twice(
    server: RedisServer,
) -> None:
    """Each few milliseconds a connection ends in the midst of the server's replies."""
    namespace = a_namespace()
    async with a_provider(server.url, namespace) as provider:
        ids = await make_sessions(provider, 40)
    async with FaultProxy("127.0.0.1", server.port) as proxy:
        cuts = 0

        async def cut() -> None:
            nonlocal cuts
            while True:
                await asyncio.sleep(0.015)
                for connection in proxy.connections:
                    connection.cut_within("down")
                    cuts += 1

        url = f"redis://127.0.0.1:{proxy.port}/0"
        async with a_provider(url, namespace, lock_lease=15.0) as provider:  # none runs out
            worker = Worker("cut", ids, provider)
            cutting = asyncio.create_task(cut())
            await worker.run(1_000, 40)
            cutting.cancel()
            await asyncio.wait([cutting])
    await check_sessions(server.url, namespace, ids, worker.told)
    # The repetition says how it was: nobody is told that nothing was stored, or has to guess.
    assert worker.told.refused == []
    assert cuts > 30


@in_loop
async def test_promise_1_commits_that_come_after_their_lease_are_not_kept(
    server: RedisServer,
) -> None:
    """What one worker sends is held up on its way for longer than its leases, and then arrives."""
    namespace, lease = a_namespace(), 0.3
    async with FaultProxy("127.0.0.1", server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        async with (
            a_provider(url, namespace, lock_lease=lease) as slow,
            a_provider(server.url, namespace, lock_lease=lease) as prompt,
        ):
            ids = await make_sessions(prompt, 10)
            workers = [Worker("slow", ids, slow), Worker("prompt", ids, prompt)]
            async with asyncio.TaskGroup() as group:
                for worker in workers:
                    group.create_task(worker.run(1_000_000, 20))
                for _ in range(5):
                    await asyncio.sleep(0.3)
                    proxy.freeze("up")
                    await asyncio.sleep(1.5 * lease)
                    proxy.thaw()
                for worker in workers:
                    worker.is_stopped = True
    told = Told()
    for worker in workers:
        assert len(worker.told.acknowledged) > 100
        told.add(worker.told)
    await check_sessions(server.url, namespace, ids, told)


@pytest.mark.parametrize("are_waited_for", [False, True])
@in_loop
async def test_promise_7_killed_workers_locks_are_free_after_their_lease(
    server: RedisServer, tmp_path: Path, are_waited_for: bool
) -> None:
    """Three processes that hold twenty locks, or hold some and wait for others, are killed."""
    namespace = a_namespace()
    async with a_provider(server.url, namespace) as provider:
        ids = await make_sessions(provider, 20)
    what: dict[str, Any] = {"url": server.url, "namespace": namespace}
    peek = Peek(server, namespace)
    if are_waited_for:
        what |= {"number": 10**6, "callers": 20, "loops": 1}
        workers = [Process(tmp_path, f"w{n}", ids=ids[:5], **what) for n in range(3)]
    else:
        workers = [Process(tmp_path, f"w{n}", ids=ids[n::3], **what) for n in range(3)]
    try:
        if are_waited_for:
            await until(lambda: sum(peek.tickets(x) > 0 for x in ids) >= 3)
        else:
            await until(lambda: all(peek.is_locked(x) for x in ids))
            await asyncio.sleep(LEASE)  # renewed meanwhile
            assert all(peek.is_locked(x) for x in ids)
    finally:
        for worker in workers:
            worker.kill()
    took = await longest_lock(server.url, namespace, ids, time.monotonic())
    print(f"with a lease of {LEASE:g} s, all were free {took:.2f} s after")
    assert 0.2 * LEASE < took < (DEAD_IN_LINE if are_waited_for else LEASE) + SLACK


# -- a server that fails ------------------------------------------------------------------------


@in_loop
async def test_promise_6_a_server_that_stands_still_empties_no_session(server: RedisServer) -> None:
    async with a_provider(server.url, a_namespace(), lock_lease=15.0) as provider:
        loop = asyncio.get_running_loop()
        ids = await make_sessions(provider, 200)

        async def is_refused(session_id: str) -> float:
            began = loop.time()
            with pytest.raises(GridUnavailable):
                await put(provider, session_id, 1)
            return loop.time() - began

        async with provider.open(ids[0]) as held:
            held["n"] = 7
            with server.frozen():
                took = await asyncio.gather(*map(is_refused, ids))
                assert max(took) < GRID_TIMEOUT + SLACK
                took = [await is_refused(x) for x in ids]  # it is known to be away: nobody waits
                assert sum(took) < GRID_TIMEOUT
                await asyncio.sleep(5.0 - 2 * GRID_TIMEOUT)
            began = loop.time()
            while True:
                try:
                    await put(provider, ids[1], 2)
                except GridUnavailable:
                    assert loop.time() - began < HEALS_WITHIN
                    await asyncio.sleep(0.01)
                else:
                    break
        # Its lease outlived the outage; what was refused has left neither lock nor change.
        assert await value_of(provider, ids[0]) == 7
        for session_id in ids[2:]:
            assert await value_of(provider, session_id) is None
        async with asyncio.timeout(SLACK):
            await asyncio.gather(*(put(provider, x, 3) for x in ids))


@pytest.mark.parametrize("how", ["stop", "kill"])
@in_loop
async def test_promise_6_a_server_that_restarts_with_its_data_is_as_before(
    server: RedisServer, how: str
) -> None:
    async with a_provider(server.url, a_namespace(), lock_lease=15.0) as provider:
        ids = await make_sessions(provider, 50)
        await asyncio.gather(*(put(provider, x, 1) for x in ids))
        async with provider.open(ids[0]) as held:
            held["n"] = 2
            getattr(server, how)()
            with pytest.raises(GridUnavailable):
                await put(provider, ids[1], 5)
            server.start()
            await heals(provider, ids[1])
        # With the same lock as before: nobody was let in meanwhile.
        assert await value_of(provider, ids[0]) == 2
        assert [await value_of(provider, x) for x in ids[1:]] == [1] * 49


async def heals(provider: SessionProvider, session_id: str) -> None:
    """Until a session can be had again; not longer than the promise says."""
    async with asyncio.timeout(HEALS_WITHIN + SLACK):
        while True:
            try:
                async with provider.open(session_id):
                    return
            except GridUnavailable:
                await asyncio.sleep(0.01)


@in_loop
async def test_a_server_that_restarts_empty_gives_new_sessions_and_keeps_every_other_promise(
    tmp_path: Path,
) -> None:
    with RedisServer(tmp_path) as server:
        async with a_provider(server.url, a_namespace(), lock_lease=15.0) as provider:
            ids = await make_sessions(provider, 20)
            peek, go = Peek(server, provider.namespace), asyncio.Event()

            async def hold_through_its_loss() -> None:
                async with provider.open(ids[0]) as held:
                    held["n"] = 2
                    await go.wait()

            # The holder's work is refused, and it is told so (4); nothing comes back (2).
            refused = asyncio.create_task(hold_through_its_loss())
            await until(lambda: peek.is_locked(ids[0]))
            waiting = asyncio.create_task(new_id_of(provider, ids[0]))
            await until(lambda: peek.tickets(ids[0]) == 1)
            server.kill()
            server.start()
            await heals(provider, ids[1])
            go.set()
            with pytest.raises(SessionGone):
                await refused
            with suppress(GridUnavailable):  # who waited was told that, or has a new session
                assert await waiting != ids[0]
            new = [await new_id_of(provider, session_id) for session_id in ids]
            assert set(new).isdisjoint(ids)
            assert len(set(new)) == len(new)
            assert [await value_of(provider, x) for x in new] == [1] * len(new)
            await asyncio.gather(*(count(provider, new[0]) for _ in range(50)))
            assert await value_of(provider, new[0]) == 51


async def new_id_of(provider: SessionProvider, session_id: str) -> str:
    """The id of the session that is made where this one is gone."""
    async with provider.open(session_id) as session:
        assert session.is_new
        session["n"] = 1
    return session.id


async def count(provider: SessionProvider, session_id: str) -> None:
    async with provider.open(session_id) as session:
        n = session["n"]
        await asyncio.sleep(0)
        session["n"] = n + 1


@in_loop
async def test_promise_4_a_killed_server_loses_nothing_that_was_acknowledged(
    server: RedisServer,
) -> None:
    """Killed five times under load, with what it acknowledged on its disk each time."""
    lost = told = unknown = 0
    async with a_provider(server.url, a_namespace()) as provider:
        ids = await make_sessions(provider, 10)
        acknowledged: dict[str, set[int]] = {x: set() for x in ids}
        tried: dict[str, set[int]] = {x: set() for x in ids}
        numbers = iter(range(10**6))
        stopped = asyncio.Event()

        async def client(session_id: str) -> None:
            nonlocal unknown
            while not stopped.is_set():
                n = next(numbers)
                try:
                    async with provider.open(session_id) as session:
                        session["done"] = [*session["done"], n]
                        tried[session_id].add(n)
                except (GridUnavailable, SessionLockLost):
                    unknown += n in tried[session_id]
                    await asyncio.sleep(0.01)
                else:
                    acknowledged[session_id].add(n)

        async with asyncio.TaskGroup() as group:
            for session_id in ids * 2:
                group.create_task(client(session_id))
            for _ in range(5):
                await asyncio.sleep(0.2)
                server.kill()
                await asyncio.to_thread(server.start)
                before = sum(map(len, acknowledged.values()))
                await until(lambda: sum(map(len, acknowledged.values())) > before + 20)  # noqa: B023
            stopped.set()
        for session_id in ids:
            async with provider.open(session_id) as session:
                done = session["done"]
            assert len(done) == len(set(done))
            assert set(done) <= tried[session_id]
            lost += len(acknowledged[session_id] - set(done))
            told += len(acknowledged[session_id])
    print(f"5 kills, {told} acknowledged, {lost} lost, {unknown} without an answer")
    assert lost == 0


@in_loop
async def test_scripts_flushed_and_killed_again_and_again_are_noticed_by_nobody(
    server: RedisServer,
) -> None:
    async with a_provider(server.url, a_namespace(), grid_timeout=5.0) as provider:
        (session_id,) = await make_sessions(provider, 1)
        await put(provider, session_id, 0)
        stopped = asyncio.Event()
        flushes = 0

        async def flush() -> None:
            nonlocal flushes
            while not stopped.is_set():
                server.admin.script_flush()
                flushes += 1
                await asyncio.sleep(0.002)

        flushing = asyncio.create_task(flush())
        await asyncio.gather(*(count(provider, session_id) for _ in range(300)))
        stopped.set()
        await flushing
        assert flushes > 10
        assert await value_of(provider, session_id) == 300


@in_loop
async def test_another_users_endless_script_is_an_outage_until_it_is_killed(
    server: RedisServer,
) -> None:
    server.admin.config_set("busy-reply-threshold", 50)
    async with a_provider(server.url, a_namespace()) as provider:
        (session_id,) = await make_sessions(provider, 1)
        await put(provider, session_id, 1)
        endless = asyncio.create_task(asyncio.to_thread(server.admin.eval, "while true do end", 0))
        await asyncio.sleep(0.2)  # a script of ours is never as long, so it waits, then is refused
        with pytest.raises(GridUnavailable) as told:
            await put(provider, session_id, 2)
        assert "SCRIPT KILL" in str(told.value)
        with redis.Redis(port=server.port) as killer:
            killer.script_kill()
        with pytest.raises(Exception, match="SCRIPT KILL"):
            await endless
        await heals(provider, session_id)
        assert await value_of(provider, session_id) == 1


# -- replies ------------------------------------------------------------------------------------


@in_loop
async def test_no_caller_gets_anothers_reply_through_cuts_and_cancellations(
    server: RedisServer,
) -> None:
    namespace = a_namespace()
    async with a_provider(server.url, namespace) as provider:
        ids = await make_sessions(provider, 100)
        for n, session_id in enumerate(ids):
            await put(provider, session_id, n)
    answered = 0
    async with FaultProxy("127.0.0.1", server.port) as proxy:
        grid = RedisGrid.from_connection_string(
            f"redis://127.0.0.1:{proxy.port}/0", namespace=namespace, timeout=GRID_TIMEOUT
        )
        await grid.open()

        async def reader(first: int) -> None:
            nonlocal answered
            for n in range(200):
                which = (first + n) % len(ids)
                _, key, secret = identity_of(ids[which])
                try:
                    async with asyncio.timeout(0.0005 if n % 5 == 0 else 5):
                        found = await grid.read(key, secret)
                except (TimeoutError, GridUnavailable):
                    await asyncio.sleep(0.001)
                    continue
                assert isinstance(found, Found)
                # The session's name is its number; nobody else's payload carries it.
                assert payload_of(found.snapshot).count(b"name" + payload_int(which)) == 1
                answered += 1

        def payload_int(n: int) -> bytes:
            return bytes([0xC4, 1, n])  # msgpack: the value's own bytes, one of them

        async def cut() -> None:
            while True:
                await asyncio.sleep(0.02)
                for connection in proxy.connections:
                    connection.cut_within("down")

        cutting = asyncio.create_task(cut())
        await asyncio.gather(*(reader(first) for first in range(40)))
        cutting.cancel()
        await asyncio.wait([cutting])
        await grid.close()
        assert proxy.accepted > 5
    assert answered > 4000
