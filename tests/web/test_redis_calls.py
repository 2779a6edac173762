"""What a request asks of a Redis, counted at the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from gridsession.grids.redis import RedisGrid
from tests.provider.harness import in_loop
from tests.redis_server import RedisServer, a_namespace
from tests.web.driver import Asked, Reply, browsing

# What the grid sends; other commands run inside its scripts.
SENT = ("evalsha", "eval", "zadd", "ping", "ssubscribe", "sunsubscribe", "zrange")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def grid(server: RedisServer) -> RedisGrid:
    return RedisGrid.from_connection_string(server.url, namespace=a_namespace(), timeout=2.0)


@pytest.fixture
def sent(server: RedisServer) -> Callable[[], dict[str, int]]:
    """What was sent since it was asked last."""
    before: dict[str, int] = {}

    def look() -> dict[str, int]:
        stats = server.admin.info("commandstats")
        now = {name: stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in SENT}
        answer = {name: now[name] - before.get(name, 0) for name in SENT}
        before.update(now)
        return {name: calls for name, calls in answer.items() if calls}

    return look


Sent = Callable[[], dict[str, int]]


async def handler(asked: Asked) -> Reply:
    session = asked.session
    if asked.path == "/add":
        session["n"] = session.get("n", 0) + 1
    elif asked.path == "/look":
        session.get("n")
    elif asked.path == "/slow":
        session["n"] = session.get("n", 0) + 1
        await asyncio.sleep(0.3)
    return Reply()


@in_loop
async def test_a_request_asks_as_often_as_it_must(grid: RedisGrid, sent: Sent) -> None:
    rules = {"/read": "read_only", "/static": "none"}
    async with browsing("asgi", handler, grid, access=rules) as browser:
        await browser.ask(path="/add")  # each script is sent whole once
        await browser.ask(path="/add")
        await browser.ask(path="/look")
        await browser.ask(path="/read")
        known, browser.cookie = browser.cookie, None
        sent()
        await browser.ask(path="/look")
        assert sent() == {}  # no cookie, nothing stored
        await browser.ask(path="/add")
        assert sent() == {"zadd": 1, "evalsha": 1}  # a creation
        browser.cookie = known
        await browser.ask(path="/look")
        assert sent() == {"evalsha": 2}  # lock and read, unlock
        await browser.ask(path="/add")
        assert sent() == {"evalsha": 2}  # lock and read, write and unlock
        await browser.ask(path="/read")
        assert sent() == {"evalsha": 1}
        await browser.ask(path="/static")
        assert sent() == {}


@in_loop
async def test_a_creation_is_pipelined(grid: RedisGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record does not wait for the answer to its index entry."""
    order: list[str] = []
    async with browsing("asgi", handler, grid) as browser:
        await browser.ask(path="/add")
        link = grid.connections.ends().link

        def watch(name: str) -> None:
            real = getattr(link, name)

            def asked(*words: object, **options: bool) -> asyncio.Future[object]:
                order.append(f"asked by {name}")
                future: asyncio.Future[object] = real(*words, **options)
                future.add_done_callback(lambda _: order.append(f"{name} was answered"))
                return future

            monkeypatch.setattr(link, name, asked)

        watch("call")
        watch("run")
        browser.cookie = None
        await browser.ask(path="/add")
    assert order[:2] == ["asked by call", "asked by run"]


@in_loop
async def test_waiting_asks_little(grid: RedisGrid, sent: Sent) -> None:
    async with browsing("asgi", handler, grid) as browser:
        await browser.ask(path="/add")
        slow = browser.start(path="/slow")
        await asyncio.sleep(0.1)
        sent()
        waiting = browser.start(path="/add")
        await slow.answered()
        await waiting.answered()
        calls = sent()
    # Ask, ask again while it is listened for, take, commit; and the holder's own commit.
    assert calls.pop("ssubscribe") == 1
    calls.pop("sunsubscribe", None)
    assert calls == {"evalsha": 3 + 1 + 1}
