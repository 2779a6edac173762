"""A lock goes from one worker to another through Redis by a notice, and without it by a poll."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gridsession import SessionProvider
from gridsession.grids.contract import SAFETY_POLL_SECONDS
from gridsession.grids.redis import notices
from gridsession.testing import FaultProxy
from tests.grids.redis_attack import SLACK, a_provider, make_sessions
from tests.provider.harness import in_loop, until
from tests.redis_peek import Peek
from tests.redis_server import RedisServer, a_namespace

BY_NOTICE = 0.5  # seconds within which a notice wakes who waits, on two busy cores
BY_POLL = SAFETY_POLL_SECONDS + BY_NOTICE  # where the notice is lost


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


async def its_turn(waiter: SessionProvider, session_id: str) -> float:
    """The loop's second at which a request that changes its session had its turn."""
    async with waiter.open(session_id) as session:
        session["n"] = session.get("n", 0) + 1
        return asyncio.get_running_loop().time()


@asynccontextmanager
async def held_and_waited_for(
    holder: SessionProvider, waiter: SessionProvider, peek: Peek, session_id: str
) -> AsyncIterator[asyncio.Task[float]]:
    """A session that one holds and the other waits for, whose task answers when it had its turn."""
    async with holder.open(session_id):
        waiting = asyncio.create_task(its_turn(waiter, session_id))
        await until(lambda: peek.tickets(session_id) == 1)
        await until(lambda: len(peek.ears()) >= 1)  # it listens
        yield waiting


@asynccontextmanager
async def two_providers(
    server: RedisServer, **options: Any
) -> AsyncIterator[tuple[SessionProvider, SessionProvider, Peek, str]]:
    """Two workers' and a session; the second may come by way of a proxy."""
    namespace = a_namespace()
    url = options.pop("url", server.url)
    async with (
        a_provider(server.url, namespace, lock_lease=15.0, **options) as holder,
        a_provider(url, namespace, lock_lease=15.0, **options) as waiter,
    ):
        (session_id,) = await make_sessions(holder, 1)
        async with waiter.open(session_id, access="read_only"):
            pass  # it is connected
        yield holder, waiter, Peek(server, namespace), session_id


@in_loop
async def test_a_lock_is_handed_on_by_notice_and_with_few_calls(server: RedisServer) -> None:
    loop = asyncio.get_running_loop()
    held_for = 2.5  # seconds
    async with two_providers(server) as (holder, waiter, peek, session_id):
        took = []
        for _ in range(10):
            async with held_and_waited_for(holder, waiter, peek, session_id) as waiting:
                await asyncio.sleep(0.02)
                released = loop.time()
            took.append(await waiting - released)
        assert sorted(took)[5] < 0.05  # the safety poll alone would make it about half a second
        async with held_and_waited_for(holder, waiter, peek, session_id) as waiting:
            before = peek.calls()
            # Two of the waiter's calls are behind it, and the looks of this test.
            await asyncio.sleep(held_for)
            between = peek.calls() - before
        await waiting
        after = peek.calls() - before - between
        # A poll each second for the waiter; then the holder's release, the confirmation, and the
        # waiter's own commit.
        assert between <= held_for + 1
        assert after <= 3


@in_loop
async def test_calls_of_a_request_that_waits(server: RedisServer) -> None:
    """At most 4, and one for each second of waiting."""
    async with two_providers(server) as (holder, waiter, peek, session_id):
        async with held_and_waited_for(holder, waiter, peek, session_id) as waiting:
            pass  # from now on the server knows each script
        await waiting
        for seconds in (0.1, 1.6):
            async with holder.open(session_id):
                before = peek.calls()
                waiting = asyncio.create_task(its_turn(waiter, session_id))
                await asyncio.sleep(seconds)
            await waiting
            calls = peek.calls() - before - 1  # the holder's own release
            assert calls <= 4 + seconds


@in_loop
async def test_a_notices_connection_that_is_killed_costs_at_most_a_poll(
    server: RedisServer,
) -> None:
    loop = asyncio.get_running_loop()
    async with two_providers(server) as (holder, waiter, peek, session_id):
        for _ in range(3):
            async with held_and_waited_for(holder, waiter, peek, session_id) as waiting:
                assert server.admin.client_kill_filter(_type="pubsub") == 1
                released = loop.time()
            assert await waiting - released < BY_POLL
        # Killed while it waits on, it listens anew.
        async with held_and_waited_for(holder, waiter, peek, session_id) as waiting:
            server.admin.client_kill_filter(_type="pubsub")
            await until(lambda: [ears["ssub"] for ears in peek.ears()] == ["1"])
            released = loop.time()
        assert await waiting - released < BY_NOTICE


@in_loop
async def test_promise_5_notices_cut_off_again_and_again_lose_nothing(server: RedisServer) -> None:
    """Who waits asks once for each connection that is lost, and does not fall into a spin."""
    async with two_providers(server, request_queue_limit_per_session=200) as both:
        holder, waiter, peek, session_id = both
        before = peek.calls()
        waiting = [asyncio.create_task(its_turn(one, session_id)) for one in (holder, waiter) * 75]
        kills = 0
        while not all(one.done() for one in waiting):
            kills += server.admin.client_kill_filter(_type="pubsub")
            await asyncio.sleep(0.02)
        await asyncio.gather(*waiting)
        async with holder.open(session_id, access="read_only") as session:
            assert session["n"] == len(waiting)
        assert kills > 1
        # Each has its own four; and each that waits two more for each connection that was lost.
        assert peek.calls() - before < len(waiting) * (4 + 2 * kills)


@pytest.mark.parametrize("moment", [0.1, 0.6, 1.05])
@in_loop
async def test_a_notices_connection_that_stalls_costs_at_most_a_poll(
    server: RedisServer, moment: float
) -> None:
    """Or a lock that is handed over would be passed on, after two seconds, as one of the dead."""
    loop = asyncio.get_running_loop()
    async with FaultProxy("127.0.0.1", server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        async with two_providers(server, url=url, grid_timeout=1.0) as (holder, waiter, peek, it):
            async with held_and_waited_for(holder, waiter, peek, it) as waiting:
                proxy.connections[-1].freeze()  # with somebody who listens there
                released = loop.time()
            assert await waiting - released < BY_POLL
            # The next finds a connection that is there and says nothing.
            async with holder.open(it):
                waiting = asyncio.create_task(its_turn(waiter, it))
                await until(lambda: peek.tickets(it) == 1)
                await asyncio.sleep(moment)
                released = loop.time()
            assert await waiting - released < BY_POLL


@in_loop
async def test_a_server_that_refuses_notices_is_not_asked_without_pause(
    server: RedisServer,
) -> None:
    """As after a change of its ACLs: who waits does so by polling."""
    async with two_providers(server) as (holder, waiter, peek, session_id):
        server.admin.acl_setuser(
            "default",
            enabled=True,
            nopass=True,
            keys=["*"],
            commands=["+@all"],
            reset_channels=True,
        )
        async with holder.open(session_id):
            before = peek.calls()
            waiting = asyncio.create_task(its_turn(waiter, session_id))
            await asyncio.sleep(1.5)  # seconds
            calls = peek.calls() - before
        await waiting
        assert calls <= 4 + 1.5


@in_loop
async def test_notices_are_listened_for_only_while_somebody_waits(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "_IDLE_SECONDS", 0.3)
    monkeypatch.setattr(notices, "_LINGER_SECONDS", 0.05)
    async with two_providers(server) as (holder, waiter, peek, session_id):
        without = len(server.admin.client_list())
        assert peek.ears() == []
        for _ in range(2):
            async with held_and_waited_for(holder, waiter, peek, session_id) as waiting:
                (ears,) = peek.ears()
                assert ears["ssub"] == "1"
                assert len(server.admin.client_list()) == without + 1
            await waiting
            began = asyncio.get_running_loop().time()
            await until(lambda: peek.ears() == [])  # it listens for nothing any more
            await until(lambda: len(server.admin.client_list()) == without)
            assert 0.2 < asyncio.get_running_loop().time() - began < 0.3 + SLACK
        async with held_and_waited_for(holder, waiter, peek, session_id) as waiting:
            (ears,) = peek.ears()
        await waiting
        # Who waits again before that keeps it, for as long as it takes.
        async with held_and_waited_for(holder, waiter, peek, session_id) as waiting:
            await asyncio.sleep(0.4)
            assert [x["id"] for x in peek.ears()] == [ears["id"]]
        await waiting
