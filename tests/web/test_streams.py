"""Nothing is locked while a stream, a background task or a WebSocket lives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from gridsession import (
    Session,
    SessionClosed,
    SessionGone,
    SessionProvider,
    SessionReadOnly,
    SessionReplaced,
)
from gridsession.web.starlette import SessionMiddleware, session_of
from gridsession.web.types import ASGIApp, Message, Scope
from tests.provider.harness import (
    Outage,
    Spy,
    data_of,
    identity_of,
    in_loop,
    is_free,
    provider_on,
    steps,
    stored,
)
from tests.web.driver import FRAMEWORKS, Asked, Reply, browsing

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)


@ALL
@in_loop
async def test_a_stream_runs_unlocked_and_may_lock_in_between(grid: Spy, framework: str) -> None:
    notes: list[Any] = []

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        session["n"] = 1

        async def chunks() -> AsyncIterator[bytes]:
            notes.append(await is_free(grid, session.id))
            async with browser.provider.open(session.id) as other:
                other["n"] += 10
            notes.append(session["n"])
            with pytest.raises(SessionClosed, match=r"session\.exclusive\(\)"):
                session["n"] = 5
            with pytest.raises(SessionClosed, match=r"session\.exclusive\(\)"):
                session.abandon()
            yield b"one "
            async with session.exclusive() as s:
                s["n"] += 100
                with pytest.raises(SessionClosed, match="headers have left"):
                    s.user = "ann"
                with pytest.raises(SessionClosed, match="headers have left"):
                    s.regenerate_id()
            yield str(session["n"]).encode()

        return Reply(chunks=chunks)

    async with browsing(framework, handler, grid) as browser:
        answer = await browser.ask()
        assert answer.error is None
        assert answer.body == b"one 111"
        assert notes == [True, 1]
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 111}


@ALL
@in_loop
async def test_a_background_task_runs_unlocked(grid: Spy, framework: str) -> None:
    notes: list[Any] = []

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        session["n"] = 1

        async def work() -> None:
            notes.append(await is_free(grid, session.id))
            with pytest.raises(SessionClosed):
                session["n"] = 2
            with pytest.raises(SessionClosed):
                await session.save()
            async with session.exclusive() as s:
                s["n"] += 1

        return Reply(background=work)

    async with browsing(framework, handler, grid) as browser:
        assert (await browser.ask()).error is None
        assert notes == [True]
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 2}


@ALL
@in_loop
async def test_a_new_session_cannot_begin_once_the_headers_have_left(
    grid: Spy, framework: str
) -> None:
    async def handler(asked: Asked) -> Reply:
        session = asked.session
        _ = session.get("n")

        async def chunks() -> AsyncIterator[bytes]:
            with pytest.raises(SessionClosed, match="nothing to lock"):
                async with session.exclusive():
                    pass
            yield b"done"

        return Reply(chunks=chunks)

    async with browsing(framework, handler, grid) as browser:
        answer = await browser.ask()
        assert (answer.body, answer.error, answer.set_cookie) == (b"done", None, None)
    assert grid.asked == []


@ALL
@pytest.mark.parametrize("changed_before", [False, True])
@pytest.mark.parametrize("access", ["exclusive", "read_only"])
@in_loop
async def test_a_nested_change_after_the_end_is_logged_with_its_key(
    grid: Spy,
    framework: str,
    changed_before: bool,
    access: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(asked: Asked) -> Reply:
        session = asked.session
        cart = session["cart"]
        if changed_before and access == "exclusive":
            cart.append("before")

        async def chunks() -> AsyncIterator[bytes]:
            yield b"one"
            cart.append("m4rk3r")
            yield b"two"

        return Reply(chunks=chunks)

    async with browsing(framework, handler, grid, access=access) as browser:
        browser.cookie = await stored(browser.provider, cart=[], other=1)
        answer = await browser.ask()
        assert (answer.status, answer.body) == (200, b"onetwo")
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert "'cart'" in record.getMessage()
        assert "exclusive()" in record.getMessage()
        assert "m4rk3r" not in record.getMessage()
        kept = ["before"] if changed_before and access == "exclusive" else []
        assert (await data_of(browser.provider, browser.cookie))["cart"] == kept


@ALL
@in_loop
async def test_a_stream_that_changes_nothing_logs_nothing(
    grid: Spy, framework: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(asked: Asked) -> Reply:
        session = asked.session

        async def chunks() -> AsyncIterator[bytes]:
            for key, value in session.items():
                yield f"{key}={value} ".encode()

        session["cart"].append(1)
        return Reply(chunks=chunks)

    async with browsing(framework, handler, grid) as browser:
        browser.cookie = await stored(browser.provider, cart=[], b=2)
        assert (await browser.ask()).body == b"cart=[1] b=2 "
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@ALL
@in_loop
async def test_a_stream_begun_before_the_end_goes_on_after_it(grid: Spy, framework: str) -> None:
    async def handler(asked: Asked) -> Reply:
        items = iter(asked.session.items())

        async def chunks() -> AsyncIterator[bytes]:
            for key, value in items:
                yield f"{key}={value} ".encode()

        return Reply(chunks=chunks)

    async with browsing(framework, handler, grid) as browser:
        browser.cookie = await stored(browser.provider, a=[1], b=2)
        assert (await browser.ask()).body == b"a=[1] b=2 "


@in_loop
async def test_an_exception_in_a_stream_undoes_nothing(grid: Spy) -> None:
    async def handler(asked: Asked) -> Reply:
        asked.session["n"] = 2

        async def chunks() -> AsyncIterator[bytes]:
            yield b"one"
            raise ZeroDivisionError

        return Reply(chunks=chunks)

    async with browsing("asgi", handler, grid) as browser:
        browser.cookie = await stored(browser.provider, n=1)
        assert isinstance((await browser.ask()).error, ZeroDivisionError)
        assert await data_of(browser.provider, browser.cookie) == {"n": 2}


@pytest.mark.parametrize("waits", [False, True], ids=["inside", "waits"])
@pytest.mark.parametrize("outcome", ["answers", "fails"])
@ALL
@in_loop
async def test_a_task_that_outlives_its_request_keeps_its_lock(
    grid: Spy, framework: str, outcome: str, waits: bool
) -> None:
    started: list[asyncio.Task[None]] = []
    request_ended = asyncio.Event()

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        await session.release()

        async def count() -> None:
            async with session.exclusive() as s:
                s["n"] += 1
                await request_ended.wait()
                s["n"] += 1

        if waits:
            await holding.__aenter__()
        started.append(asyncio.create_task(count()))
        await steps(10)
        if outcome == "fails":
            raise ZeroDivisionError
        return Reply()

    async with browsing(framework, handler, grid) as browser:
        browser.cookie = await stored(browser.provider, n=1)
        holding = browser.provider.open(browser.cookie)
        answer = await browser.ask()
        assert (answer.error is None) is (outcome == "answers")
        assert await data_of(browser.provider, browser.cookie) == {"n": 1}  # no half of a block
        assert not await is_free(grid, browser.cookie)
        request_ended.set()
        if waits:
            await holding.__aexit__(None, None, None)
        await started[0]
        assert await data_of(browser.provider, browser.cookie) == {"n": 3}
        assert await is_free(grid, browser.cookie)


@in_loop
async def test_a_session_can_be_locked_long_after_its_request(grid: Spy) -> None:
    kept: list[Session] = []

    async def handler(asked: Asked) -> Reply:
        kept.append(asked.session)
        return Reply()

    async with browsing("asgi", handler, grid) as browser:
        browser.cookie = await stored(browser.provider, n=1)
        await browser.ask()
        for _ in range(2):
            async with kept[0].exclusive() as s:
                s["n"] += 1
        assert kept[0]["n"] == 3
        assert await data_of(browser.provider, browser.cookie) == {"n": 3}


# -- WebSockets -----------------------------------------------------------------------------------

Talk = Callable[[WebSocket], Awaitable[None]]


class Socket:
    """A client of a WebSocket, as a server shows it to an application."""

    def __init__(self, app: ASGIApp, session_id: str | None, path: str = "/") -> None:
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.incoming.put_nowait({"type": "websocket.connect"})
        cookies = [] if session_id is None else [(b"cookie", f"session={session_id}".encode())]
        scope: Scope = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "scheme": "ws",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": cookies,
            "subprotocols": [],
            "state": {},
        }

        async def send(message: Message) -> None:
            self.sent.append(dict(message))

        self.task = asyncio.ensure_future(app(scope, self.incoming.get, send))

    async def closed(self) -> list[str]:
        await self.task
        return [m["type"] for m in self.sent]


@contextlib.asynccontextmanager
async def talking(grid: Spy, talk: Talk, **options: Any) -> AsyncIterator[tuple[Any, ...]]:
    async with provider_on(grid, **options) as provider:
        app = Starlette(
            routes=[WebSocketRoute("/{path:path}", talk)],
            middleware=[Middleware(SessionMiddleware, provider=provider)],
        )
        yield provider, app


@in_loop
async def test_a_socket_has_a_snapshot_and_locks_only_in_exclusive(grid: Spy) -> None:
    notes: list[Any] = []

    async def talk(ws: WebSocket) -> None:
        await ws.accept()
        session = session_of(ws)
        notes.append((session["n"], session.access, session.is_read_only))
        with pytest.raises(SessionReadOnly):
            session["n"] = 2
        async with provider.open(session.id) as other:  # nothing is locked
            other["n"] = 2
        notes.append(session["n"])
        async with session.exclusive() as s:
            notes.append(s["n"])
            s["n"] += 1
            with pytest.raises(SessionClosed, match="headers have left"):
                s.user = "ann"
        notes.append(session["n"])
        with pytest.raises(ZeroDivisionError):
            async with session.exclusive() as s:
                s["n"] = 1 // 0
        await ws.close()

    async with talking(grid, talk) as (provider, app):
        session_id = await stored(provider, n=1)
        grid.calls.clear()
        assert await Socket(app, session_id).closed() == ["websocket.accept", "websocket.close"]
        assert notes == [(1, "read_only", True), 1, 2, 3]
        assert grid.asked[0] == "read"
        assert await data_of(provider, session_id) == {"n": 3}
        assert await is_free(grid, session_id)


@in_loop
async def test_sockets_follow_access_rules(grid: Spy) -> None:
    accesses: list[str] = []

    async def talk(ws: WebSocket) -> None:
        accesses.append(ws.scope["session"].access.value)
        await ws.close()

    rules = {"/none/*": "none", "/exclusive": "exclusive"}
    async with talking(grid, talk, access=rules) as (provider, app):
        session_id = await stored(provider, n=1)
        grid.calls.clear()
        for path in ("/none/x", "/exclusive", "/"):
            await Socket(app, session_id, path).closed()
        assert accesses == ["none", "read_only", "read_only"]
        assert grid.asked == ["read", "read"]


@in_loop
async def test_a_socket_without_session_cannot_begin_one(grid: Spy) -> None:
    async def talk(ws: WebSocket) -> None:
        session = session_of(ws)
        assert session.is_new
        with pytest.raises(SessionReadOnly):
            session["n"] = 1
        with pytest.raises(SessionClosed, match="nothing to lock"):
            async with session.exclusive():
                pass
        await ws.accept()
        await ws.close()

    async with talking(grid, talk) as (_, app):
        assert await Socket(app, None).closed() == ["websocket.accept", "websocket.close"]
    assert grid.asked == []


@in_loop
async def test_a_socket_is_refused_while_the_grid_is_away(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(ws: WebSocket) -> None:
        raise AssertionError("the handler ran")

    async with talking(grid, talk) as (provider, app):
        session_id = await stored(provider, n=1)
        grid.before = Outage("read", times=1)
        socket = Socket(app, session_id)
        assert await socket.closed() == ["websocket.close"]
        assert socket.sent[0]["code"] == 1013
        async with provider.open(session_id) as session:
            session.user = "ann"
        assert await Socket(app, session_id).closed() == ["websocket.close"]
    assert len([r for r in caplog.records if "was refused" in r.getMessage()]) == 2


@in_loop
async def test_a_socket_learns_that_its_session_ended(grid: Spy) -> None:
    async def talk(ws: WebSocket) -> None:
        session = session_of(ws)
        await grid.inner.remove(identity_of(session.id).key)
        with pytest.raises(SessionGone):
            async with session.exclusive():
                pass
        await ws.close()

    async with talking(grid, talk) as (provider, app):
        await Socket(app, await stored(provider, n=1)).closed()


@in_loop
async def test_a_socket_learns_that_its_user_changed(grid: Spy) -> None:
    async def talk(ws: WebSocket) -> None:
        session: Session = session_of(ws)
        await _log_in(provider, session.id)
        with pytest.raises(SessionReplaced):
            async with session.exclusive():
                pass
        await ws.close()

    async with talking(grid, talk) as (provider, app):
        session_id = await stored(provider, n=1)
        await Socket(app, session_id).closed()


async def _log_in(provider: SessionProvider, session_id: str) -> None:
    async with provider.open(session_id) as session:
        session.user = "ann"
