"""Connections that end at an awkward moment are made again; an event loop held up harms nobody."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from gridsession.errors import GridUnavailable
from gridsession.grids.contract import Found
from gridsession.grids.redis import RedisGrid
from gridsession.grids.redis import notices as notices_module
from gridsession.testing.contract_hooks import Visitor, a_claim, expect
from tests.grids.resp_server import RespServer, hello
from tests.provider.harness import in_loop, provider_on, stored, until
from tests.redis_server import RedisServer, a_namespace, shared_server

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
# Beside the answer to the greeting, in one read: what ends the connection, as over TLS the server's
# farewell may.
AND_THE_END = hello() + b"no protocol\r\n"


def grid_at(url: str, timeout: float = 1.0) -> RedisGrid:
    return RedisGrid.from_connection_string(url, namespace=a_namespace(), timeout=timeout)


def is_listening(grid: RedisGrid) -> bool:
    return grid.connections.ends().notices._ears is not None


async def opened_soon(grid: RedisGrid, seconds: float = 3.0) -> None:
    """A worker that is asked again and again serves before long."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                await grid.open()
            except GridUnavailable:
                await asyncio.sleep(0.02)
            else:
                return


@LOOPS
@in_loop
async def test_a_connection_that_ends_with_its_greeting_is_not_used(loop: str) -> None:
    async with RespServer({b"HELLO": AND_THE_END}) as server:
        grid = grid_at(server.url)
        with pytest.raises(GridUnavailable):
            await grid.open()
        server.replies[b"HELLO"] = hello()
        await opened_soon(grid)
        assert await grid.connections.ask(b"ECHO", b"ours") == b"ours"
        await grid.close()


@LOOPS
@in_loop
async def test_a_notices_connection_that_ends_with_its_greeting_is_not_used(loop: str) -> None:
    async with RespServer({b"HELLO": AND_THE_END}) as server:
        grid = grid_at(server.url, timeout=0.2)
        await grid.wait(bytes(32), bytes(16), 0.3)
        assert not is_listening(grid)
        server.replies[b"HELLO"] = hello()
        server.replies[b"SSUBSCRIBE"] = lambda words: (
            b">3\r\n$10\r\nssubscribe\r\n$%d\r\n%b\r\n:1\r\n" % (len(words[1]), words[1])
        )
        await grid.wait(bytes(32), bytes(16), 0.3)
        assert is_listening(grid)
        await grid.close()


@in_loop
async def test_a_connecting_task_that_somebody_cancels_is_begun_anew() -> None:
    """Some servers and test clients cancel every task that they find."""
    async with RespServer(greeting=b"-LOADING soon\r\n", hangs_up=True) as server:
        grid = grid_at(server.url)
        with pytest.raises(GridUnavailable):
            await grid.open()
        connecting = grid.connections.ends().link._connecting
        assert connecting is not None
        connecting.cancel()
        server._greeting, server._hangs_up = b"", False
        await opened_soon(grid)
        await grid.close()


class Moody:
    """A credential provider that fails, and then says that it was cancelled."""

    def __init__(self) -> None:
        self.asked = 0

    def get_credentials(self) -> tuple[str, str]:
        raise AssertionError("the other is asked")

    async def get_credentials_async(self) -> tuple[str, str]:
        self.asked += 1
        if self.asked == 1:
            raise ConnectionError
        if self.asked == 2:
            raise asyncio.CancelledError
        return "shop", "secret"


@in_loop
async def test_a_credential_provider_that_cancels_does_not_end_the_trying() -> None:
    provider = Moody()
    async with RespServer() as server:
        grid = RedisGrid.from_connection_string(
            server.url, namespace=a_namespace(), credential_provider=provider
        )
        with pytest.raises(GridUnavailable):
            await grid.open()
        await opened_soon(grid)
        assert provider.asked == 3
        await grid.close()


@LOOPS
@in_loop
async def test_work_that_holds_up_the_event_loop_is_not_taken_for_silence(loop: str) -> None:
    grid = grid_at(shared_server().url, timeout=0.4)
    await grid.open()
    visitor = Visitor(grid)
    await visitor.create()
    asking = [asyncio.create_task(visitor.read()) for _ in range(3)]
    await asyncio.sleep(0)  # asked, but for the first not written yet
    time.sleep(1.0)  # noqa: ASYNC251 - what the test is about
    for asked in asking:
        expect(Found, await asked)
    await grid.close()


@LOOPS
@in_loop
async def test_a_handler_that_holds_up_the_event_loop_loses_nobody_s_work(loop: str) -> None:
    grid = grid_at(shared_server().url, timeout=0.4)
    async with provider_on(grid) as provider:
        ids = [await stored(provider, n=0) for _ in range(3)]
        go_on = asyncio.Event()

        async def request(session_id: str) -> None:
            async with provider.open(session_id) as session:
                session["n"] += 1
                await go_on.wait()

        async def hold_up() -> None:
            await go_on.wait()
            time.sleep(1.0)  # noqa: ASYNC251 - what the test is about

        async with asyncio.TaskGroup() as tasks:
            for session_id in ids:
                tasks.create_task(request(session_id))
            await asyncio.sleep(0.1)
            tasks.create_task(hold_up())
            await asyncio.sleep(0.05)
            go_on.set()
        for session_id in ids:
            async with provider.open(session_id) as session:
                assert session["n"] == 1
    await grid.close()


@in_loop
async def test_a_notices_connection_that_nobody_wants_any_more_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who asked for it has gone before it was there."""
    monkeypatch.setattr(notices_module, "_LINGER_SECONDS", 0.01)
    monkeypatch.setattr(notices_module, "_IDLE_SECONDS", 0.05)
    grid = grid_at(shared_server().url)
    await grid.open()
    visitor, waiter = Visitor(grid), a_claim()
    await visitor.create(claim=a_claim())
    notices = grid.connections.ends().notices
    reach = notices._server.reach

    async def slowly(*args: object, **options: float) -> object:
        await asyncio.sleep(0.1)
        return await reach(*args, **options)  # type: ignore[arg-type]

    object.__setattr__(notices._server, "reach", slowly)
    try:
        await visitor.queued(waiter)
        waiting = asyncio.create_task(visitor.wait(waiter, 0.05))
        await asyncio.sleep(0.01)
        await visitor.release(waiter)
        await waiting
        await until(lambda: notices._ears is not None)
        await until(lambda: notices._ears is None)
    finally:
        object.__delattr__(notices._server, "reach")
    await grid.close()


async def keep_busy(turns: float) -> None:
    """Work that leaves the event loop little time for anything else."""
    while True:
        time.sleep(turns)  # noqa: ASYNC251 - what the tests are about
        await asyncio.sleep(0)


@LOOPS
@in_loop
async def test_a_silent_server_is_noticed_by_an_event_loop_that_is_always_busy(
    loop: str, tmp_path: Path
) -> None:
    with RedisServer(tmp_path) as server:
        grid = grid_at(server.url, timeout=0.4)
        await grid.open()
        visitor = Visitor(grid)
        await visitor.create()
        busy = asyncio.create_task(keep_busy(0.1))
        with server.frozen(), pytest.raises(GridUnavailable):
            async with asyncio.timeout(3.0):
                await visitor.read()
        busy.cancel()
        await grid.close()


@LOOPS
@in_loop
async def test_a_busy_event_loop_can_connect(loop: str) -> None:
    busy = asyncio.create_task(keep_busy(0.15))
    grid = grid_at(shared_server().url)
    await opened_soon(grid, 5.0)
    busy.cancel()
    await grid.close()


@in_loop
async def test_a_connection_that_ends_while_nobody_asks_is_nobody_s_concern(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Servers close connections that are idle for long (`timeout`)."""
    with RedisServer(tmp_path, appendonly="yes") as server:
        grid = grid_at(server.url)
        await grid.open()
        visitor = Visitor(grid)
        await visitor.create()
        caplog.clear()
        for _ in range(3):
            before = server.admin.info("stats")["total_connections_received"]
            server.admin.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.1)
            assert server.admin.info("stats")["total_connections_received"] == before
            expect(Found, await visitor.read())
        assert caplog.text == ""
        await grid.close()


@in_loop
async def test_a_server_that_greets_and_closes_is_not_run_against() -> None:
    async with RespServer({b"EVALSHA": b":0\r\n"}) as server:
        grid = grid_at(server.url)
        await grid.open()
        server.replies[b"EVALSHA"] = lambda words: server.cut()
        for _ in range(3):
            with pytest.raises(GridUnavailable):
                await grid.touch(bytes(32))
        made = len(server.accepted)
        async with asyncio.timeout(10.0):
            began = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() - began < 1.0:
                with contextlib.suppress(GridUnavailable):
                    await grid.touch(bytes(32))
        assert len(server.accepted) - made < 20
        await grid.close()


@in_loop
async def test_what_a_server_refuses_at_once_is_not_withdrawn_again_and_again(
    tmp_path: Path,
) -> None:
    with RedisServer(tmp_path) as server:
        grid = grid_at(server.url)
        async with provider_on(grid) as provider:
            session_id = await stored(provider, n=1)
            server.admin.config_set("min-replicas-to-write", 1)
            server.admin.config_resetstat()
            for _ in range(20):
                with pytest.raises(GridUnavailable, match="fewer replicas"):
                    async with provider.open(session_id):
                        pass
            await asyncio.sleep(0.3)
            refused = server.admin.info("errorstats")["errorstat_NOREPLICAS"]["count"]
            assert refused == 20
            server.admin.config_set("min-replicas-to-write", 0)
        await grid.close()
