"""The connection that all coroutines of an event loop share, and how it behaves in hard times."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.selector_events import _SelectorSocketTransport  # type: ignore[attr-defined]
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridsession import GridUnavailable
from gridsession.grids.redis import RedisGrid, wire
from gridsession.grids.redis.link import Link
from gridsession.grids.redis.server import Server
from gridsession.grids.redis.wire import MOST_PENDING
from gridsession.sources.connection_string import RedisAddress, parse
from gridsession.testing import FaultProxy
from gridsession.testing.contract_hooks import Visitor
from tests.grids.resp_server import RespServer, text
from tests.provider.harness import (
    data_of,
    in_loop,
    is_free,
    provider_on,
    run,
    steps,
    stored,
    until,
)
from tests.redis_server import RedisServer, a_namespace, shared_server

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
MIB = bytes(1 << 20)
LATE = 0.25  # seconds that a busy machine may add to a time that is promised


def link_to(url: str, *, timeout: float = 1.0) -> Link:
    address = parse(url)
    assert isinstance(address, RedisAddress)
    return Link(Server.at(address), timeout=timeout)


@contextlib.contextmanager
def linked(url: str, *, timeout: float = 1.0) -> Iterator[Link]:
    it = link_to(url, timeout=timeout)
    try:
        yield it
    finally:
        it.close()


def grid_at(url: str, *, timeout: float = 1.0, name: str | None = None) -> RedisGrid:
    """Args:
    name: under which its connections are in the server's list.
    """
    if name is not None:
        url += f"?client_name={name}"
    return RedisGrid.from_connection_string(url, namespace=a_namespace(), timeout=timeout)


def connections(name: str) -> list[str]:
    """The server's numbers of the connections of that name."""
    return [one["id"] for one in shared_server().admin.client_list() if one["name"] == name]


async def answered(*calls: asyncio.Future[Any]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


# -- many callers, one connection ---------------------------------------------------------------


@LOOPS
@in_loop
async def test_a_thousand_callers_share_a_connection(loop: str) -> None:
    name = a_namespace()
    grid = grid_at(shared_server().url, name=name)
    sessions = [Visitor(grid) for _ in range(1000)]  # not opened: the first call connects
    await asyncio.gather(*(one.create(b"%d" % n) for n, one in enumerate(sessions)))
    found = await asyncio.gather(*(one.found() for one in sessions))
    assert [one.payload for one in found] == [b"%d" % n for n in range(1000)]
    assert len(connections(name)) == 1
    await grid.close()


@in_loop
async def test_what_is_asked_within_a_turn_of_the_loop_leaves_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    write = _SelectorSocketTransport.write

    def counted(self: Any, data: bytes) -> None:
        sizes.append(len(data))
        write(self, data)

    with linked(shared_server().url) as it:
        await it.open()
        monkeypatch.setattr(_SelectorSocketTransport, "write", counted)
        calls = [it.call(b"ECHO", b"%04d" % n) for n in range(1000)]
        assert await asyncio.gather(*calls) == [b"%04d" % n for n in range(1000)]
        assert len(sizes) <= 2  # the first need not wait for the others
        assert sum(sizes) == 1000 * len(b"*2\r\n$4\r\nECHO\r\n$4\r\n0000\r\n")


@in_loop
async def test_one_timer_serves_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    timers: list[float] = []
    call_at = loop.call_at

    def counted(when: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
        timers.append(when)
        return call_at(when, *args, **options)

    with linked(shared_server().url) as it:
        await it.open()
        monkeypatch.setattr(loop, "call_at", counted)
        for _ in range(10):
            await asyncio.gather(*(it.call(b"PING") for _ in range(100)))
        assert len(timers) <= 10  # one at most for each time that calls began to be under way


# -- everybody gets his own reply ---------------------------------------------------------------

# For each call: its size, the turns of the loop after it, and which call is cancelled then, if any.
PLANS = st.lists(
    st.tuples(st.sampled_from([0, 0, 100, 90_000]), st.integers(0, 3), st.integers(0, 100)),
    max_size=60,
)


@LOOPS
@settings(max_examples=50)
@given(plan=PLANS)
def test_nobody_gets_anothers_reply_whoever_is_cancelled(
    loop: str, plan: list[tuple[int, int, int]]
) -> None:
    async def main() -> None:
        with linked(shared_server().url) as it:
            calls = []
            for number, (size, turns, victim) in enumerate(plan):
                word = b"%d:" % number + bytes(size)
                calls.append((word, it.call(b"ECHO", word)))
                await steps(turns)
                if victim < len(calls):
                    calls[victim][1].cancel()
            for word, call in calls:
                with contextlib.suppress(asyncio.CancelledError):
                    assert await call == word
            assert await it.call(b"ECHO", b"last") == b"last"

    run(main(), loop=loop)


@in_loop
async def test_a_reply_that_comes_too_late_is_nobodys(server: RedisServer) -> None:
    with linked(server.url, timeout=1.0) as it:
        await it.open()
        first, second = (it.call(b"DEBUG", b"SLEEP", b"0.65") for _ in range(2))
        await first
        later = [it.call(b"ECHO", b"%d" % n) for n in range(100)]  # in time, behind what is not
        with pytest.raises(GridUnavailable, match=r"did not answer within 1 s"):
            await second
        assert await asyncio.gather(*later) == [b"%d" % n for n in range(100)]


@in_loop
async def test_false_is_a_reply() -> None:
    with linked(shared_server().url) as it:
        words = ((b"ECHO", b"a"), (b"DEBUG", b"PROTOCOL", b"FALSE"), (b"ECHO", b"b"))
        calls = [it.call(*some) for some in words]
        assert await asyncio.gather(*calls) == [b"a", False, b"b"]


@in_loop
async def test_pushes_of_the_server_are_no_replies(server: RedisServer) -> None:
    with linked(server.url) as it:
        await it.call(b"CLIENT", b"TRACKING", b"ON", b"BCAST")
        for number in range(50):
            calls = [it.call(b"ECHO", b"%d" % n) for n in range(20)]
            server.admin.mset({f"{number}-{n}": 1 for n in range(20)})  # a push for each
            calls += [it.call(b"SET", b"mine", number), it.call(b"GET", b"mine")]
            *echoed, ok, got = await asyncio.gather(*calls)
            assert echoed == [b"%d" % n for n in range(20)]
            assert (ok, got) == (b"OK", b"%d" % number)


PUSH = b">2\r\n$10\r\ninvalidate\r\n*1\r\n$3\r\nkey\r\n"


@pytest.mark.parametrize("push", [PUSH, b">1\r\n+x\r\n", b">0\r\n", b">3\r\n_\r\n:1\r\n#t\r\n"])
@in_loop
async def test_a_push_between_or_without_replies_is_no_reply(push: bytes) -> None:
    async with RespServer({b"ECHO": lambda words: push + text(words[1]) + push}) as server:
        with linked(server.url) as it:
            await it.open()
            server.send(push * 3)
            calls = [it.call(b"ECHO", b"%d" % n) for n in range(200)]
            assert await asyncio.gather(*calls) == [b"%d" % n for n in range(200)]


@in_loop
async def test_a_reply_that_nobody_asked_for_ends_the_connection() -> None:
    async with RespServer() as server:
        with linked(server.url) as it:
            await it.open()
            server.send(b"+OK\r\n")
            await until(lambda: len(server.accepted) == 2)  # or the next caller would be given it
            assert await it.call(b"ECHO", b"mine") == b"mine"


@in_loop
async def test_what_a_server_says_before_it_is_asked_is_why_it_hangs_up() -> None:
    told = b"-ERR max number of clients reached\r\n"

    async def late() -> tuple[None, str]:
        await asyncio.sleep(0.05)  # by then the server has spoken
        return None, "token"

    async with RespServer(greeting=told, hangs_up=True) as server:
        host, port = server.url.removeprefix("redis://").removesuffix("/0").split(":")
        it = Link(Server(where="it", hosts=((host, int(port)),), credentials=late), timeout=1.0)
        with pytest.raises(GridUnavailable, match="it has as many connections as its maxclients"):
            await it.open()
        it.close()


# -- what a cancelled caller leaves -------------------------------------------------------------


@pytest.mark.parametrize("cancelled", ["on its way", "unsent"])
@in_loop
async def test_a_lock_granted_to_a_caller_that_was_cancelled_is_given_back(
    server: RedisServer, cancelled: str
) -> None:
    grid = grid_at(server.url, timeout=2.0)
    async with provider_on(grid, lock_lease=30.0) as provider:
        session_id = await stored(provider, a=1)
        for turns in range(2 if cancelled == "unsent" else 8):

            async def visit() -> None:
                async with provider.open(session_id):
                    raise AssertionError("it was cancelled")

            with server.frozen():
                task = asyncio.create_task(visit())
                await (steps(turns) if cancelled == "unsent" else asyncio.sleep(0.02 * turns))
                task.cancel()
                await steps(5)
            with pytest.raises(asyncio.CancelledError):
                await task
            await free_within(grid, session_id, 2.0)
        assert await data_of(provider, session_id) == {"a": 1}


async def free_within(grid: RedisGrid, session_id: str, seconds: float) -> None:
    async with asyncio.timeout(seconds):  # far less than a lease
        while not await is_free(grid, session_id):  # noqa: ASYNC110 - nobody tells when it is
            await asyncio.sleep(0.01)


# -- a server that does not keep up -------------------------------------------------------------


@in_loop
async def test_calls_under_way_are_bounded_and_the_link_recovers(server: RedisServer) -> None:
    with linked(server.url) as it:
        await it.open()
        with server.frozen():
            calls = [it.call(b"PING") for _ in range(MOST_PENDING)]
            with pytest.raises(GridUnavailable, match="does not keep up with what it is asked"):
                await it.call(b"PING")
            assert not any(call.done() for call in calls)
        assert set(await asyncio.gather(*calls)) == {b"PONG"}
        assert await it.call(b"ECHO", b"again") == b"again"


@in_loop
async def test_calls_that_wait_for_a_connection_are_bounded() -> None:
    async with RespServer() as server:
        server.replies[b"HELLO"] = None
        with linked(server.url, timeout=0.5) as it:
            calls = [it.call(b"PING") for _ in range(MOST_PENDING)]
            with pytest.raises(GridUnavailable, match="too many calls wait for a connection"):
                await it.call(b"PING")
            errors = await answered(*calls)
            assert {type(error) for error in errors} == {GridUnavailable}
            began = asyncio.get_running_loop().time()  # it is known by now, and nobody waits
            for _ in range(100):
                with pytest.raises(GridUnavailable):
                    await it.call(b"PING")
            assert asyncio.get_running_loop().time() - began < 0.25


@pytest.mark.parametrize("is_connected", [True, False], ids=["connected", "not connected"])
@in_loop
async def test_bytes_that_nobody_takes_are_bounded_and_the_link_recovers(
    server: RedisServer, is_connected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MOST_UNSENT", 8 << 20)
    with linked(server.url) as it:
        if is_connected:
            await it.open()
        with server.frozen():
            calls: list[asyncio.Future[Any]] = []
            with contextlib.suppress(GridUnavailable):
                for _ in range(64):
                    calls.append(it.call(b"ECHO", MIB))
                    await steps(2)
                    if calls[-1].done():
                        break
            refused = await answered(*(call for call in calls if call.done()))
            # What the kernel takes of it is the server's in all but name.
            assert 8 <= len(calls) - len(refused) < 32
            assert all(isinstance(error, GridUnavailable) for error in refused)
        await answered(*calls)
        async with asyncio.timeout(1.5):
            await again(it)
        assert await it.call(b"ECHO", MIB) == MIB


@in_loop
async def test_writing_waits_for_a_server_that_does_not_read(server: RedisServer) -> None:
    with linked(server.url, timeout=5.0) as it:
        await it.open()
        words = [b"%d" % n + MIB for n in range(16)]
        with server.frozen():
            calls = []
            for word in words:
                calls.append(it.call(b"ECHO", word))
                await steps(2)
            last = it.call(b"ECHO", b"last")
        assert await asyncio.gather(*calls) == words  # whole, and in order
        assert await last == b"last"


# -- silence ------------------------------------------------------------------------------------


@LOOPS
@in_loop
async def test_no_call_takes_longer_than_its_time(loop: str, server: RedisServer) -> None:
    timeout = 0.4
    took: list[float] = []
    running = asyncio.get_running_loop()

    async def ask_after(seconds: float) -> None:
        await asyncio.sleep(seconds)
        began = running.time()
        with pytest.raises(GridUnavailable):
            await it.call(b"PING")
        took.append(running.time() - began)

    with linked(server.url, timeout=timeout) as it:
        await it.open()
        with server.frozen():
            await asyncio.gather(*(ask_after(n * 0.001) for n in range(1000)))
    assert len(took) == 1000
    assert max(took) < 1.25 * timeout + LATE


@LOOPS
@in_loop
async def test_a_connection_that_was_forgotten_on_the_way_is_noticed_and_replaced(
    loop: str,
) -> None:
    running = asyncio.get_running_loop()
    timeout = 0.4
    async with FaultProxy("127.0.0.1", shared_server().port) as proxy:
        with linked(f"redis://127.0.0.1:{proxy.port}", timeout=timeout) as it:
            await it.open()
            proxy.partition()
            burst = [it.call(b"PING") for _ in range(1000)]
            began = running.time()
            errors = await answered(*burst)
            assert {type(error) for error in errors} == {GridUnavailable}
            assert running.time() - began < 1.25 * timeout + LATE
            await asyncio.sleep(0.1)
            began = running.time()  # from now on it is known, and nobody waits
            for _ in range(100):
                with pytest.raises(GridUnavailable):
                    await it.call(b"PING")
            assert running.time() - began < timeout / 2
            proxy.heal()
            healed = running.time()
            await again(it)
            assert running.time() - healed < 1.0 + LATE


@in_loop
async def test_a_server_that_has_gone_fails_calls_at_once(server: RedisServer) -> None:
    running = asyncio.get_running_loop()
    with linked(server.url) as it:
        await it.open()
        server.kill()
        await answered(it.call(b"PING"))
        began = running.time()
        errors = await asyncio.gather(*(ask(it) for _ in range(1000)), return_exceptions=True)
        assert running.time() - began < LATE
        assert {type(error) for error in errors} == {GridUnavailable}
        server.start()
        began = running.time()
        await again(it)
        assert running.time() - began < 1.0 + LATE


async def ask(it: Link) -> Any:
    return await it.call(b"PING")


async def again(it: Link) -> None:
    """Ask until somebody answers."""
    while True:
        with contextlib.suppress(GridUnavailable):
            assert await it.call(b"ECHO", b"again") == b"again"
            return
        await asyncio.sleep(0.01)


@in_loop
async def test_tries_to_connect_become_rarer_up_to_half_a_second_and_are_spread() -> None:
    async with contextlib.AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(RespServer(hangs_up=True, greeting=b""))
            for _ in range(8)
        ]
        links = [stack.enter_context(linked(server.url)) for server in servers]
        await answered(*(it.call(b"PING") for it in links))
        await asyncio.sleep(2.5)
        pauses = []
        for server in servers:
            times = server.accepted
            assert 5 <= len(times) <= 16
            between = [after - before for before, after in pairwise(times)]
            assert between[0] < 0.02 + LATE
            assert max(between) < 0.5 + LATE
            pauses += between[5:]
        assert min(pauses) > 0.24
        assert max(pauses) - min(pauses) > 0.05  # a farm comes back in turn
