"""A Redis grid from its first event loop to its last: loops, processes, its end, its waiters."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from gridsession import GridUnavailable
from gridsession.grids.redis import RedisGrid
from gridsession.testing import FaultProxy
from gridsession.testing.contract_hooks import Visitor, a_change, a_claim, a_token
from tests.grids.resp_server import RespServer, hello
from tests.provider.harness import in_loop, run, steps
from tests.redis_server import RedisServer, a_namespace, shared_server

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


def grid_at(url: str, *, name: str = "") -> RedisGrid:
    """`name`: under which its connections are in the server's list."""
    if name:
        url += f"?client_name={name}"
    return RedisGrid.from_connection_string(url, namespace=a_namespace())


def connections(name: str) -> list[str]:
    """The server's numbers of the connections of that name."""
    return [one["id"] for one in shared_server().admin.client_list() if one["name"] == name]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


# -- event loops --------------------------------------------------------------------------------


@LOOPS
def test_a_loop_that_ends_without_close_leaves_nothing_open(loop: str) -> None:
    name = a_namespace()
    grid = grid_at(shared_server().url, name=name)

    async def main() -> None:
        await grid.open()
        session = Visitor(grid)
        await session.create(claim=a_claim())
        waiting = a_claim()
        await session.queued(waiting)
        await grid.wait(session.key, waiting.token, 1.0)  # it listens from now on
        assert len(connections(name)) == 2

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(main(), loop=loop)
        run(main(), loop=loop)  # the same grid, on another loop
        gc.collect()
    assert [str(one.message) for one in told] == []
    assert connections(name) == []


def test_event_loops_of_several_threads_use_a_grid_at_once() -> None:
    grid = grid_at(shared_server().url)
    all_there = threading.Barrier(4)
    done: list[int] = []

    async def main() -> None:
        await grid.open()
        all_there.wait(10.0)
        session = Visitor(grid)
        await session.create(b"0")
        for number in range(200):
            claim = a_claim()
            assert (await session.locked(claim)).version.counter == number + 1
            await session.commit(claim, a_change(b"%d" % number), release=True)
        await grid.close()
        done.append(1)

    threads = [threading.Thread(target=run, args=(main(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4


# -- its end ------------------------------------------------------------------------------------


@LOOPS
@in_loop
async def test_calls_under_way_are_answered_before_it_closes(loop: str) -> None:
    shared_server().admin.script_flush()  # so that they are asked twice
    name = a_namespace()
    grid = grid_at(shared_server().url, name=name)
    sessions = [Visitor(grid) for _ in range(100)]
    await asyncio.gather(*(one.create() for one in sessions))
    calls = [asyncio.create_task(one.found()) for one in sessions]
    await steps(1)
    await grid.close()
    assert {one.payload for one in await asyncio.gather(*calls)} == {b"new"}
    assert connections(name) == []
    await grid.close()


@in_loop
async def test_calls_that_a_closing_grid_cannot_get_answered_fail(server: RedisServer) -> None:
    grid = grid_at(server.url)
    session = Visitor(grid)
    await session.create()
    with server.frozen():
        calls = [asyncio.create_task(session.found()) for _ in range(100)]
        await steps(1)
        await grid.close()
        done, _ = await asyncio.wait(calls, timeout=1.0)
    assert len(done) == 100
    assert all(isinstance(call.exception(), GridUnavailable) for call in done)


@in_loop
async def test_calls_that_wait_for_a_connection_fail_when_the_grid_closes() -> None:
    async with RespServer({b"HELLO": None}) as server:
        grid = grid_at(server.url)
        calls = [asyncio.create_task(Visitor(grid).found()) for _ in range(10)]
        await steps(5)
        await grid.close()
        done, _ = await asyncio.wait(calls, timeout=1.0)
        assert len(done) == 10
        assert all(isinstance(call.exception(), GridUnavailable) for call in done)


@pytest.mark.parametrize("is_listening", [True, False], ids=["listening", "connecting"])
@in_loop
async def test_whoever_waits_for_a_bell_is_let_go_and_not_cancelled_when_the_grid_closes(
    is_listening: bool,
) -> None:
    greetings = iter([hello(), None])  # none for the second connection
    async with RespServer() as scripted:
        scripted.replies[b"HELLO"] = lambda _: next(greetings)
        grid = grid_at(shared_server().url if is_listening else scripted.url)
        await grid.open()
        key, token = bytes(32), a_token()
        if is_listening:
            await grid.wait(key, token, 5.0)  # begins to listen
        waiting = asyncio.create_task(grid.wait(key, token, 5.0))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await grid.close()
        await asyncio.wait([waiting], timeout=1.0)
        assert waiting.done()
        assert not waiting.cancelled()
        assert waiting.exception() is None


# -- processes ----------------------------------------------------------------------------------


@LOOPS
@in_loop
async def test_a_forked_child_opens_for_itself_and_leaves_its_parents_connections_alone(
    loop: str,
) -> None:
    name = a_namespace()
    grid = grid_at(shared_server().url, name=name)
    session = Visitor(grid)
    claim = a_claim()
    await session.create(b"of the parent", claim=claim)
    ours = connections(name)

    async def visit() -> None:
        await grid.open()
        assert (await session.found()).payload == b"of the parent"
        await session.commit(claim, a_change(b"of the child"))
        await grid.close()

    def child() -> None:
        threading.Thread(target=run, args=(visit(),), kwargs={"loop": loop}).start()

    process = multiprocessing.get_context("fork").Process(target=child)
    under_way = asyncio.create_task(session.found())
    await steps(1)
    process.start()
    while process.is_alive():  # noqa: ASYNC110 - nobody tells when it is not
        await asyncio.sleep(0.01)
    assert process.exitcode == 0
    assert (await under_way).payload == b"of the parent"
    assert (await session.found()).payload == b"of the child"
    assert connections(name) == ours
    await grid.close()


# -- those who wait -----------------------------------------------------------------------------


def scripts_run(server: RedisServer) -> int:
    told = server.admin.info("commandstats")
    return sum(one["calls"] for name, one in told.items() if name.startswith("cmdstat_eval"))


@pytest.mark.parametrize("why", ["no connection left", "not permitted"])
@in_loop
async def test_whoever_cannot_listen_asks_once_a_second_and_not_all_the_time(
    server: RedisServer, why: str
) -> None:
    server.admin.execute_command("ACL", "SETUSER", "web", "on", "nopass", "+@all", "~*", "&*")
    grid = grid_at(server.url.replace("redis://", "redis://web:any@"))
    await grid.open()
    session, holder = Visitor(grid), a_claim()
    await session.create(claim=holder)
    if why == "not permitted":
        server.admin.execute_command("ACL", "SETUSER", "web", "-ssubscribe")
    else:
        server.admin.config_set("maxclients", "2")  # with the test's own
    before = scripts_run(server)
    waiting = asyncio.create_task(session.taken(a_claim()))
    await asyncio.sleep(1.5)
    assert scripts_run(server) - before <= 5
    await grid.release(session.key, holder.token)
    async with asyncio.timeout(1.5):  # a safety poll
        await waiting
    await grid.close()


@in_loop
async def test_a_connection_for_bells_that_was_forgotten_on_the_way_is_replaced() -> None:
    async with FaultProxy("127.0.0.1", shared_server().port) as proxy:
        grid = grid_at(f"redis://127.0.0.1:{proxy.port}")
        loop = asyncio.get_running_loop()
        took = []
        for number in range(4):
            session, holder, waiter = Visitor(grid), a_claim(), a_claim()
            await session.create(claim=holder)
            waiting = asyncio.create_task(session.taken(waiter))
            await asyncio.sleep(0.3)
            if number == 0:
                proxy.connections[1].lose()
            released_at = loop.time()
            await grid.release(session.key, holder.token)
            await waiting
            took.append(loop.time() - released_at)
        assert min(took[1:]) < 0.2  # rung again, not found by a poll
        await grid.close()


@in_loop
async def test_a_push_that_is_no_bell_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    odd = b">2\r\n$10\r\ninvalidate\r\n_\r\n" + b">4\r\n+pmessage\r\n+a\r\n+b\r\n+c\r\n"

    def subscribed(words: list[bytes]) -> bytes:
        return odd + b">3\r\n+ssubscribe\r\n$%d\r\n%b\r\n:1\r\n" % (len(words[1]), words[1])

    async with RespServer({b"SSUBSCRIBE": subscribed}) as scripted:
        grid = grid_at(scripted.url)
        await grid.open()
        key, token = bytes(32), a_token()
        await grid.wait(key, token, 1.0)
        waiting = asyncio.create_task(grid.wait(key, token, 5.0))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        scripted.send(odd + b">3\r\n+smessage\r\n+any\r\n$16\r\n" + token + b"\r\n")
        async with asyncio.timeout(1.0):
            await waiting
        assert caplog.text == ""
        await grid.close()
