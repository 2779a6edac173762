"""A WebSocket has its session at connect, locks nothing, and can begin one before it accepts."""

# ruff: noqa: PT012 - what is raised comes from the end of a block, after the statements in it

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from gridsession import (
    GridUnavailable,
    Session,
    SessionClosed,
    SessionGone,
    SessionNotAvailable,
    SessionProvider,
    SessionReadOnly,
    SessionReplaced,
)
from gridsession.web.starlette import SessionMiddleware, session_of
from gridsession.web.types import ASGIApp, Message, Scope
from tests.provider.harness import (
    OnTheWay,
    Outage,
    Spy,
    data_of,
    identity_of,
    in_loop,
    is_free,
    provider_on,
    stored,
    until,
)
from tests.web.driver import Browser
from tests.web.live import Refusal, connected, cookie_of, serving, values_of

NOT_KNOWN = "A" * 64  # of the right shape; nothing is stored under it

Talk = Callable[[WebSocket], Awaitable[None]]


class Socket:
    """A client of a WebSocket, as a server shows it to an application.

    Attributes:
        sent: the messages that the application sent.
    """

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
            "extensions": {"websocket.http.response": {}},
        }

        async def send(message: Message) -> None:
            self.sent.append(dict(message))

        self.task = asyncio.ensure_future(app(scope, self.incoming.get, send))

    async def closed(self) -> list[str]:
        """Wait until the application has returned; the types of what it sent."""
        await self.task
        return [m["type"] for m in self.sent]

    def header(self, name: bytes) -> list[str]:
        """Of the accept, or of the response in its place."""
        return [v.decode() for k, v in self.sent[0].get("headers", ()) if k.lower() == name]

    @property
    def cookie(self) -> str | None:
        lines = self.header(b"set-cookie")
        assert len(lines) <= 1
        return cookie_of(lines[0]) if lines else None


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


@in_loop
async def test_a_socket_that_would_wait_for_too_long_is_refused(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(ws: WebSocket) -> None:
        raise AssertionError("the handler ran")

    options = {"lock_wait_timeout": 0.1, "request_queue_limit_per_session": 1}
    async with talking(grid, talk, access="read_only wait_for_writer", **options) as (
        provider,
        app,
    ):
        session_id = await stored(provider, n=1)
        async with provider.open(session_id, holder="the holder"):
            first = Socket(app, session_id)
            await until(lambda: "wait" in grid.calls)
            for socket in (Socket(app, session_id), first):
                assert await socket.closed() == ["websocket.close"]
                assert socket.sent[0]["code"] == 1013
        assert await is_free(grid, session_id)
    full, late = [r.getMessage() for r in caplog.records if "was refused" in r.getMessage()]
    assert "1 requests wait for this session already; the holder" in full
    assert "gave up" in late


@in_loop
async def test_a_nested_change_of_the_snapshot_is_logged_with_its_key(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(ws: WebSocket) -> None:
        await ws.accept()
        session_of(ws)["cart"].append("m4rk3r")
        await ws.close()

    async with talking(grid, talk) as (provider, app):
        session_id = await stored(provider, cart=[])
        await Socket(app, session_id).closed()
        assert await data_of(provider, session_id) == {"cart": []}
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.levelno == logging.ERROR
    assert "'cart'" in record.getMessage()
    assert "exclusive()" in record.getMessage()
    assert "m4rk3r" not in record.getMessage()


@in_loop
async def test_a_socket_that_asked_for_no_session_has_none(grid: Spy) -> None:
    async def talk(ws: WebSocket) -> None:
        with pytest.raises(SessionNotAvailable):
            session_of(ws)
        with pytest.raises(SessionNotAvailable):
            ws.scope["session"].exclusive()
        await ws.accept(headers=[(b"x-own", b"1")])
        await ws.close()

    async with talking(grid, talk, access="none") as (_, app):
        socket = Socket(app, None)
        await socket.closed()
        assert socket.sent[0]["headers"] == [(b"x-own", b"1")]
    assert grid.asked == []


# -- before the accept ----------------------------------------------------------------------------


@pytest.mark.parametrize("came_with", [None, "nonsense", NOT_KNOWN])
@in_loop
async def test_a_new_session_begins_before_the_accept_and_its_cookie_leaves_with_it(
    grid: Spy, came_with: str | None
) -> None:
    ids: list[str] = []

    async def talk(ws: WebSocket) -> None:
        session = session_of(ws)
        assert session.is_new
        with pytest.raises(SessionReadOnly):
            session["n"] = 1
        async with session.exclusive() as s:
            assert (s.is_new, s.is_read_only, dict(s)) == (True, False, {})
            s["n"] = 1
            s.timeout = 60
            ids.append(s.id)
        assert (session["n"], session.timeout, session.is_new) == (1, 60, False)
        assert session.is_read_only
        ids.append(session.id)
        await ws.accept("chat", headers=[(b"x-own", b"1")])
        async with session.exclusive() as s:
            s["n"] += 1
        assert session["n"] == 2
        await ws.close()

    async with talking(grid, talk) as (provider, app):
        socket = Socket(app, came_with)
        assert await socket.closed() == ["websocket.accept", "websocket.close"]
        assert socket.sent[0]["subprotocol"] == "chat"
        assert socket.header(b"x-own") == ["1"]
        assert socket.cookie is not None
        assert ids == [socket.cookie, socket.cookie]
        assert socket.cookie != came_with  # never adopted
        assert await data_of(provider, socket.cookie) == {"n": 2}
        assert await is_free(grid, socket.cookie)


@pytest.mark.parametrize("how", ["user", "id"])
@pytest.mark.parametrize("known", [True, False])
@in_loop
async def test_a_login_in_the_handshake_leaves_with_the_accept(
    grid: Spy, known: bool, how: str
) -> None:
    async def talk(ws: WebSocket) -> None:
        session = session_of(ws)
        async with session.exclusive() as s:
            s["n"] = s.get("n", 0) + 1
            if how == "user":
                s.user = "ann"
            else:
                s.regenerate_id()
        await ws.accept()
        with pytest.raises(SessionClosed, match="headers have left"):
            async with session.exclusive() as s:
                s.user = "bob"
        async with session.exclusive() as s:
            s["n"] += 1
        await ws.close()

    async with talking(grid, talk) as (provider, app):
        before = await stored(provider, n=1) if known else None
        socket = Socket(app, before)
        await socket.closed()
        assert socket.cookie is not None
        assert socket.cookie != before
        async with provider.open(socket.cookie, access="read_only") as session:
            assert session.user == ("ann" if how == "user" else None)
            assert dict(session) == {"n": 3 if known else 2}
        if how == "user" and before is not None:
            with pytest.raises(SessionReplaced):
                await data_of(provider, before)


@in_loop
async def test_a_logout_in_the_handshake_removes_the_cookie(grid: Spy) -> None:
    async def talk(ws: WebSocket) -> None:
        session = session_of(ws)
        async with session.exclusive() as s:
            s.clear()
        with pytest.raises(SessionClosed, match="has ended it"):  # not a new one by oversight
            async with session.exclusive():
                pass
        await ws.accept()
        with pytest.raises(SessionClosed, match="has ended it"):
            async with session.exclusive():
                pass
        await ws.close()

    async with talking(grid, talk) as (provider, app):
        session_id = await stored(provider, user="ann", n=1)
        socket = Socket(app, session_id)
        await socket.closed()
        (line,) = socket.header(b"set-cookie")
        assert "Max-Age=0" in line
        assert await data_of(provider, session_id) == {}


@in_loop
async def test_who_stores_nothing_begins_nothing(grid: Spy) -> None:
    async def talk(ws: WebSocket) -> None:
        session = session_of(ws)
        async with session.exclusive() as s:
            assert s.get("n") is None
        with pytest.raises(ZeroDivisionError):
            async with session.exclusive() as s:
                s["n"] = 1 // 0
        assert session.is_new
        await ws.accept()
        await ws.close()

    async with talking(grid, talk) as (_, app):
        socket = Socket(app, None)
        await socket.closed()
        assert socket.sent[0].get("headers", []) == []
    assert grid.asked == []


@in_loop
async def test_after_the_accept_no_session_can_begin(grid: Spy) -> None:
    async def talk(ws: WebSocket) -> None:
        await ws.accept()
        session = session_of(ws)
        with pytest.raises(SessionReadOnly):
            session["n"] = 1
        with pytest.raises(SessionClosed, match=r"`session\.exclusive\(\)` ahead of accept"):
            async with session.exclusive():
                raise AssertionError("the block ran")
        await ws.close()

    async with talking(grid, talk) as (_, app):
        for session_id in (None, NOT_KNOWN):
            assert await Socket(app, session_id).closed() == ["websocket.accept", "websocket.close"]
    assert grid.asked == ["read"]


@in_loop
async def test_an_accept_inside_the_block_is_too_early(grid: Spy) -> None:
    async def talk(ws: WebSocket) -> None:
        with pytest.raises(SessionClosed, match="headers have left"):
            async with session_of(ws).exclusive() as s:
                s["n"] = 1
                await ws.accept()
        await ws.close()

    async with talking(grid, talk) as (_, app):
        socket = Socket(app, None)
        await socket.closed()
        assert socket.cookie is None
    assert grid.asked == []


@in_loop
async def test_a_block_that_had_to_wait_past_the_accept_does_not_run(grid: Spy) -> None:
    inside, may_end = asyncio.Event(), asyncio.Event()

    async def first(session: Session) -> None:
        async with session.exclusive() as s:
            s["n"] = 1
            inside.set()
            await may_end.wait()

    async def second(session: Session) -> None:
        async with session.exclusive():
            raise AssertionError("the block ran")

    async def talk(ws: WebSocket) -> None:
        tasks = [asyncio.create_task(block(session_of(ws))) for block in (first, second)]
        await inside.wait()
        await ws.accept()
        may_end.set()
        await asyncio.wait(tasks)
        assert [type(task.exception()) for task in tasks] == [SessionClosed] * 2
        await ws.close()

    async with talking(grid, talk) as (_, app):
        await Socket(app, None).closed()
    assert grid.asked == []


@in_loop
async def test_nothing_begins_after_a_socket_that_was_never_answered(grid: Spy) -> None:
    tasks: list[asyncio.Task[None]] = []
    has_left = asyncio.Event()

    async def work(session: Session) -> None:
        await has_left.wait()
        with pytest.raises(SessionClosed, match="ahead of accept"):
            async with session.exclusive() as s:
                s["n"] = 1

    async def talk(ws: WebSocket) -> None:
        tasks.append(asyncio.create_task(work(session_of(ws))))
        raise ZeroDivisionError

    async with talking(grid, talk) as (_, app):
        with pytest.raises(ZeroDivisionError):
            await Socket(app, None).closed()
        has_left.set()
        await tasks[0]
    assert grid.asked == []


@in_loop
async def test_what_save_has_begun_is_kept_when_its_block_fails(grid: Spy) -> None:
    async def talk(ws: WebSocket) -> None:
        with pytest.raises(ZeroDivisionError):
            async with session_of(ws).exclusive() as s:
                s["n"] = 1
                await s.save()
                s["n"] = 1 // 0
        await ws.accept()
        await ws.close()

    async with talking(grid, talk) as (provider, app):
        socket = Socket(app, None)
        await socket.closed()
        assert socket.cookie is not None
        assert await data_of(provider, socket.cookie) == {"n": 1}
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert await is_free(grid, socket.cookie)


@in_loop
async def test_a_beginning_that_failed_can_be_repeated(grid: Spy) -> None:
    ids: list[str] = []

    async def begin(session: Session) -> None:
        async with session.exclusive() as s:
            ids.append(s.id)
            s["n"] = 1

    async def talk(ws: WebSocket) -> None:
        with pytest.raises(GridUnavailable):
            await begin(session_of(ws))
        await begin(session_of(ws))
        await ws.accept()
        await ws.close()

    async with talking(grid, talk) as (provider, app):
        grid.after = Outage("create", times=1)  # it was written, and the answer was lost
        socket = Socket(app, None)
        await socket.closed()
        assert socket.cookie == ids[1]
        assert ids[0] != ids[1]
        assert await data_of(provider, ids[1]) == {"n": 1}


@pytest.mark.parametrize("way", ["there", "back"])
@pytest.mark.parametrize("known", [True, False])
@in_loop
async def test_the_accept_waits_for_the_id_that_another_task_is_about_to_store(
    grid: Spy, known: bool, way: str
) -> None:
    on_the_way = OnTheWay(grid, "commit" if known else "create", way)

    async def log_in(session: Session) -> None:
        async with session.exclusive() as s:
            s.user = "ann"

    async def talk(ws: WebSocket) -> None:
        task = asyncio.create_task(log_in(session_of(ws)))
        await on_the_way.reached.wait()
        await ws.accept()
        assert task.done()
        await task
        await ws.close()

    async with talking(grid, talk) as (provider, app):
        session_id = None
        if known:
            grid.before, before = None, grid.before
            grid.after, after = None, grid.after
            session_id = await stored(provider, n=1)
            grid.before, grid.after = before, after
        socket = Socket(app, session_id)
        await socket.closed()
        assert socket.cookie is not None
        async with provider.open(socket.cookie, access="read_only") as session:
            assert session.user == "ann"


@in_loop
async def test_who_came_with_a_replaced_id_is_given_no_cookie(grid: Spy) -> None:
    async def talk(ws: WebSocket) -> None:
        async with session_of(ws).exclusive() as s:
            s["n"] += 1
            s.regenerate_id()
        await ws.accept()
        await ws.close()

    async with talking(grid, talk) as (provider, app):
        session_id = await stored(provider, n=1)
        async with provider.open(session_id) as session:
            session.regenerate_id()
        socket = Socket(app, session_id)
        await socket.closed()
        assert socket.sent[0].get("headers", []) == []
        assert await data_of(provider, session_id) == {"n": 2}


# -- a response in place of the accept -------------------------------------------------------------


@pytest.mark.parametrize("writes", [True, False])
@in_loop
async def test_a_response_in_place_of_the_accept_carries_the_cookie(
    grid: Spy, writes: bool
) -> None:
    async def talk(ws: WebSocket) -> None:
        if writes:
            async with session_of(ws).exclusive() as s:
                s["after_login"] = "/chat"
        response = PlainTextResponse("log in first", 401, {"vary": "Origin"})
        await ws.send_denial_response(response)

    async with talking(grid, talk) as (provider, app):
        socket = Socket(app, None)
        await socket.closed()
        assert socket.sent[0]["type"] == "websocket.http.response.start"
        assert socket.sent[0]["status"] == 401
        assert socket.sent[1]["body"] == b"log in first"
        assert socket.header(b"content-type") == ["text/plain; charset=utf-8"]
        if writes:
            assert socket.header(b"vary") == ["Origin, Cookie"]
            assert socket.cookie is not None
            assert await data_of(provider, socket.cookie) == {"after_login": "/chat"}
        else:
            assert socket.header(b"vary") == ["Origin"]
            assert socket.cookie is None


@in_loop
async def test_a_response_that_looked_into_the_session_varies_by_its_cookie(grid: Spy) -> None:
    async def talk(ws: WebSocket) -> None:
        status = 403 if session_of(ws).get("banned") else 401
        with pytest.raises(SessionClosed):
            async with session_of(ws).exclusive() as s:
                s["n"] = 1
                await ws.send_denial_response(Response(status_code=status))

    async with talking(grid, talk) as (_, app):
        socket = Socket(app, None)
        await socket.closed()
        assert socket.header(b"vary") == ["Cookie"]
        assert socket.cookie is None


@pytest.mark.parametrize("writes", [True, False])
@in_loop
async def test_a_close_in_place_of_the_accept_carries_no_cookie_and_that_is_logged(
    grid: Spy, writes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ids: list[str] = []

    async def talk(ws: WebSocket) -> None:
        if writes:
            async with session_of(ws).exclusive() as s:
                s["n"] = 1
                ids.append(s.id)
        await ws.close(4000)

    async with talking(grid, talk) as (_, app):
        socket = Socket(app, None)
        assert await socket.closed() == ["websocket.close"]
        assert (socket.sent[0]["code"], socket.header(b"set-cookie")) == (4000, [])
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == writes
    if writes:
        assert "send_denial_response" in warnings[0]
        assert ids[0] not in warnings[0]


# -- over the wire --------------------------------------------------------------------------------


async def chat(ws: WebSocket) -> None:
    """Logs in by its handshake, counts messages, and answers with what is stored then."""
    session = session_of(ws)
    if (name := ws.query_params.get("login")) is not None:
        async with session.exclusive() as s:
            s.user = name
            s.setdefault("seen", 0)
    if session.user is None:
        async with session.exclusive() as s:
            s["after_login"] = ws.url.path
        await ws.send_denial_response(PlainTextResponse("log in first", 401))
        return
    await ws.accept()
    async for text in ws.iter_text():
        async with session.exclusive() as s:
            s["seen"] += 1
        await ws.send_text(f"{text} {session.user} {session['seen']}")


async def count(request: Request) -> Response:
    request.session["seen"] += 10
    return PlainTextResponse(f"{session_of(request).user} {request.session['seen']}")


@in_loop
async def test_over_a_real_server(real_grid: Spy) -> None:
    async with provider_on(real_grid) as provider:
        app = Starlette(
            routes=[WebSocketRoute("/chat", chat), Route("/count", count, methods=["POST"])],
            middleware=[Middleware(SessionMiddleware, provider=provider)],
        )
        browser = Browser(app, provider)
        async with serving(app) as port:
            with pytest.raises(Refusal) as refused:
                async with connected(port, "/chat"):
                    pass
            assert (refused.value.status, refused.value.body) == (401, b"log in first")
            assert values_of(refused.value.headers, "vary") == ["Cookie"]
            (line,) = values_of(refused.value.headers, "set-cookie")
            visitor = cookie_of(line)
            assert "httponly" in line.lower()
            assert await data_of(provider, visitor) == {"after_login": "/chat"}

            async with connected(port, "/chat?login=ann", visitor) as client:
                (line,) = client.set_cookies
                browser.cookie = cookie_of(line)
                assert browser.cookie != visitor
                assert await is_free(real_grid, browser.cookie)
                assert await client.ask("a") == "a ann 1"
                assert (await browser.ask("POST", "/count")).body == b"ann 11"
                assert await client.ask("b") == "b ann 12"
                async with connected(port, "/chat", browser.cookie) as second:
                    assert second.set_cookies == []
                    assert await second.ask("c") == "c ann 13"
                    assert await client.ask("d") == "d ann 14"

            real_grid.before = Outage("read")
            with pytest.raises(Refusal) as refused:
                async with connected(port, "/chat", browser.cookie):
                    pass
            assert refused.value.status == 403  # the server's word for a close before the accept
            assert values_of(refused.value.headers, "set-cookie") == []  # nobody is logged out
            real_grid.before = None
        assert await data_of(provider, browser.cookie) == {"after_login": "/chat", "seen": 14}
