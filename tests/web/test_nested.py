"""A `SessionMiddleware` inside of another one: no request waits for itself."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from gridsession import SessionProvider
from gridsession.web.starlette import SessionMiddleware, session_of
from gridsession.web.types import ASGIApp, Receive, Scope, Send
from tests.provider.harness import NO_SWEEP, Spy, data_of, in_loop, is_free, provider_on, stored
from tests.web.driver import Browser
from tests.web.test_sockets import Socket


async def count(request: Request) -> Response:
    session = session_of(request)
    session["n"] = session.get("n", 0) + 1
    return PlainTextResponse(str(session["n"]))


async def talk(ws: WebSocket) -> None:
    async with session_of(ws).exclusive() as session:
        session["n"] = session.get("n", 0) + 1
    await ws.accept()
    await ws.close()


def nested(provider: SessionProvider, /, **inner: Any) -> ASGIApp:
    """An application with sessions that mounts another one with sessions."""
    routes = [Route("/n", count), WebSocketRoute("/ws", talk)]
    sub = Starlette(routes=routes, middleware=[Middleware(SessionMiddleware, **inner)])
    return Starlette(
        routes=[*routes, Mount("/sub", sub)],
        middleware=[Middleware(SessionMiddleware, provider=provider)],
    )


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [r for r in caplog.records if r.levelno >= logging.WARNING]
    return [text for r in records if "memory:" not in (text := r.getMessage())]


@pytest.mark.parametrize("kind", ["one provider", "a grid of its own"])
@in_loop
async def test_with_one_cookie_the_outer_ones_session_is_used(
    grid: Spy, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with provider_on(grid, lock_wait_timeout=1) as provider:
        own = {"provider": provider} if kind == "one provider" else {"connection_string": "memory:"}
        browser = Browser(nested(provider, **own), provider)
        answers = [await browser.ask(path=path) for path in ("/sub/n", "/sub/n", "/n", "/sub/n")]
        assert [a.body for a in answers] == [b"1", b"2", b"3", b"4"]
        assert [a.set_cookie is not None for a in answers] == [True, False, False, False]
        sockets = [Socket(browser.app, browser.cookie, path) for path in ("/sub/ws", "/ws")]
        for socket in sockets:
            assert await socket.closed() == ["websocket.accept", "websocket.close"]
        assert await data_of(provider, str(browser.cookie)) == {"n": 6}
        assert await is_free(grid, str(browser.cookie))
    (text,) = said(caplog)
    assert "inside of another one whose cookie is session as well" in text
    for remedy in ("remove one", "give the inner one another session_cookie", "the access none"):
        assert remedy in text


@in_loop
async def test_a_websocket_says_so_too(grid: Spy, caplog: pytest.LogCaptureFixture) -> None:
    async with provider_on(grid, lock_wait_timeout=1) as provider:
        app = nested(provider, provider=provider)
        for _ in range(2):
            socket = Socket(app, None, "/sub/ws")
            assert await socket.closed() == ["websocket.accept", "websocket.close"]
            assert socket.cookie is not None
            assert await data_of(provider, socket.cookie) == {"n": 1}
    assert len(said(caplog)) == 1


@in_loop
async def test_with_another_cookie_both_work(grid: Spy, caplog: pytest.LogCaptureFixture) -> None:
    async with provider_on(grid) as provider:
        options = NO_SWEEP | {"connection_string": "memory:", "session_cookie": "inner"}
        app = nested(provider, **options)
        outer, inner = Browser(app, provider), Browser(app, provider, "inner")
        assert (await outer.ask(path="/n")).body == b"1"
        for n in (b"1", b"2"):
            assert (await inner.ask(path="/sub/n")).body == n
        assert (await outer.ask(path="/n")).body == b"2"
    assert said(caplog) == []


@in_loop
async def test_where_the_outer_one_gives_none_the_inner_one_works(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    async with provider_on(grid, access={"/sub/*": "none"}) as outer, provider_on(grid) as inner:
        browser = Browser(nested(outer, provider=inner), inner)
        answers = [await browser.ask(path=path) for path in ("/sub/n", "/n", "/sub/n")]
        assert [a.body for a in answers] == [b"1", b"2", b"3"]
        assert await Socket(browser.app, browser.cookie, "/sub/ws").closed() == [
            "websocket.accept",
            "websocket.close",
        ]
        assert await data_of(inner, str(browser.cookie)) == {"n": 4}
    assert said(caplog) == []


@in_loop
async def test_a_scope_that_is_used_again_has_no_session_any_more(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    """As by middleware that repeats a request."""
    async with provider_on(grid) as provider:
        inner = Starlette(routes=[Route("/", count)])
        sessions = SessionMiddleware(inner, provider=provider)

        async def twice(scope: Scope, receive: Receive, send: Send) -> None:
            async def nowhere(message: Any) -> None:
                pass

            await sessions(scope, receive, nowhere)
            await sessions(scope, receive, send)

        browser = Browser(twice, provider)
        browser.cookie = await stored(provider, n=1)
        answer = await browser.ask()
        assert (answer.status, answer.body) == (200, b"3")
        assert await data_of(provider, browser.cookie) == {"n": 3}
    assert said(caplog) == []
