"""Requests of one session that run at the same time, as browsers and applications see them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import fastapi
import pytest
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from gridsession import (
    SessionClosed,
    SessionLockTimeout,
    SessionReadOnly,
)
from gridsession.web import access as declarations
from gridsession.web.starlette import SessionMiddleware, session_access, session_of
from tests.provider.harness import (
    Spy,
    change,
    come_first,
    data_of,
    in_loop,
    is_free,
    provider_on,
    stored,
    until,
)
from tests.web.driver import (
    FRAMEWORKS,
    Asked,
    Browser,
    Exchange,
    Reply,
    browsing,
)
from tests.web.live import connected, serving

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)
CONCURRENT: dict[str, Any] = {"access": "concurrent"}
declares: Callable[[Any], Callable[[Any], Any]] = session_access


@pytest.fixture(autouse=True)
def nothing_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, as yet."""
    monkeypatch.setattr(declarations, "in_use", False)


class Meeting:
    """A handler whose requests wait for each other: `/cart/KEY` adds to what is under that key.

    Attributes:
        inside: how many are in the handler now.
        most: how many there were at once.
        accesses: of each request, in order.
    """

    def __init__(self, number: int = 2) -> None:
        self._barrier = asyncio.Barrier(number)
        self.inside = self.most = 0
        self.accesses: list[str] = []

    async def handler(self, asked: Asked) -> Reply:
        session = asked.session
        self.accesses.append(str(session.access))
        first, *rest = asked.path.strip("/").split("/")
        if first != "cart":
            return Reply(repr(dict(session)).encode())
        key, what = rest if len(rest) > 1 else (rest[0], "mine")
        self.inside += 1
        self.most = max(self.most, self.inside)
        session[key] = [*session.get(key, []), what]
        await self._barrier.wait()
        self.inside -= 1
        return Reply(key.encode())


async def both(browser: Browser, *paths: str) -> list[Exchange]:
    """Requests in flight at once, and what they were answered."""
    asked = [browser.start("POST", path) for path in paths]
    return [await one.answered() for one in asked]


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


# -- which requests are ---------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize(
    "options",
    [
        {"access": {"POST /cart/*": "concurrent"}},
        {"access": "concurrent"},
        {"allow_concurrent_requests_per_session": True},
        {
            "allow_concurrent_requests_per_session": True,
            "access": {"/else": "exclusive", "/static/*": "none"},
        },
    ],
)
@in_loop
async def test_two_in_flight_that_change_different_keys_both_survive(
    grid: Spy, framework: str, options: dict[str, Any]
) -> None:
    meeting = Meeting()
    async with browsing(framework, meeting.handler, grid, **options) as browser:
        browser.cookie = await stored(browser.provider, n=1)
        one, two = await both(browser, "/cart/a", "/cart/b")
        assert [(x.status, x.body, x.set_cookie) for x in (one, two)] == [
            (200, b"a", None),
            (200, b"b", None),
        ]
        assert meeting.accesses == ["concurrent", "concurrent"]
        data = await data_of(browser.provider, browser.cookie)
        assert data == {"n": 1, "a": ["mine"], "b": ["mine"]}
        assert await is_free(grid, browser.cookie)
        assert (browser.provider.merges, browser.provider.key_conflicts) == (1, 0)


@ALL
@in_loop
async def test_a_rule_that_says_exclusive_stays_so(grid: Spy, framework: str) -> None:
    meeting = Meeting(1)
    options = {
        "allow_concurrent_requests_per_session": True,
        "access": {"/cart/*": "exclusive"},
    }
    async with browsing(framework, meeting.handler, grid, **options) as browser:
        browser.cookie = await stored(browser.provider, n=1)
        answers = await both(browser, *["/cart/a"] * 5)
        assert [x.status for x in answers] == [200] * 5
        assert meeting.most == 1
        assert await browser.ask(path="/") is not None
        assert meeting.accesses == ["exclusive"] * 5 + ["concurrent"]
        assert (await data_of(browser.provider, browser.cookie))["a"] == ["mine"] * 5


@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
@in_loop
async def test_a_view_says_it_of_itself(grid: Spy, framework: str) -> None:
    barrier = asyncio.Barrier(2)
    accesses: list[str] = []

    async def set_key(request: Request) -> Response:
        session = session_of(request)
        accesses.append(str(session.access))
        session[request.path_params["key"]] = 1
        await barrier.wait()
        return PlainTextResponse("ok")

    class Cart(HTTPEndpoint):
        @declares("concurrent")
        async def post(self, request: Request) -> Response:
            return await set_key(request)

        async def get(self, request: Request) -> Response:
            accesses.append(str(session_of(request).access))
            return PlainTextResponse("ok")

    view = declares("concurrent")(set_key)
    routes = [Route("/view/{key}", view, methods=["POST"]), Route("/class/{key}", Cart)]
    async with provider_on(grid) as provider:
        app = Starlette(routes=routes) if framework == "starlette" else fastapi.FastAPI()
        if framework == "fastapi":
            app.router.routes.extend(routes)
        app.add_middleware(SessionMiddleware, provider=provider)
        browser = Browser(app, provider)
        for place in ("view", "class"):
            browser.cookie = await stored(provider, n=0)
            answers = await both(browser, f"/{place}/a", f"/{place}/b")
            assert [x.status for x in answers] == [200, 200]
            assert await data_of(provider, browser.cookie) == {"n": 0, "a": 1, "b": 1}
        assert (await browser.ask(path="/class/a")).status == 200
        assert accesses == ["concurrent"] * 4 + ["exclusive"]


@in_loop
async def test_fastapis_parameter(grid: Spy) -> None:
    barrier = asyncio.Barrier(2)
    async with provider_on(grid) as provider:
        app = fastapi.FastAPI()
        app.add_middleware(SessionMiddleware, provider=provider)

        @app.post("/set/{key}")
        @declares("concurrent")
        async def set_key(request: Request, key: str) -> None:
            session_of(request)[key] = 1
            await barrier.wait()

        @app.post("/in-thread/{key}")
        @declares("concurrent")
        def set_in_thread(request: Request, key: str) -> None:
            session_of(request)[key] = 2

        browser = Browser(app, provider)
        browser.cookie = await stored(provider, n=0)
        assert [x.status for x in await both(browser, "/set/a", "/set/b")] == [200, 200]
        threads = await both(browser, "/in-thread/c", "/in-thread/d")
        assert [x.status for x in threads] == [200, 200]
        data = await data_of(provider, browser.cookie)
        assert data == {"n": 0, "a": 1, "b": 1, "c": 2, "d": 2}


@ALL
@in_loop
async def test_it_does_not_wait_for_who_holds_the_lock_but_its_commit_does(
    grid: Spy, framework: str
) -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()
    concurrent_done = asyncio.Event()

    async def handler(asked: Asked) -> Reply:
        if asked.path == "/hold":
            asked.session["held"] = True
            inside.set()
            await go_on.wait()
        else:
            await inside.wait()
            asked.session["mine"] = True
            concurrent_done.set()
        return Reply()

    rules = {"access": {"/cart": "concurrent"}}
    async with browsing(framework, handler, grid, **rules) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        holder, other = browser.start("POST", "/hold"), browser.start("POST", "/cart")
        await concurrent_done.wait()
        await until(lambda: grid.in_line(1))
        assert other.sent == []  # it has nothing to say before it is stored
        go_on.set()
        assert [(await x.answered()).status for x in (holder, other)] == [200, 200]
        data = await data_of(browser.provider, browser.cookie)
        assert data == {"n": 0, "held": True, "mine": True}
        assert await is_free(grid, browser.cookie)


@in_loop
async def test_a_hung_holder_costs_a_concurrent_request_its_answer(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(asked: Asked) -> Reply:
        asked.session["mine"] = True
        return Reply(b"stored")

    rules: dict[str, Any] = {"access": "concurrent", "lock_wait_timeout": 0.2}
    async with browsing("asgi", handler, grid, **rules) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        async with browser.provider.open(browser.cookie, holder="the holder"):
            answer = await browser.ask("POST")
        # Its handler ran, so nobody is told to send it again.
        assert (answer.status, answer.header("retry-after")) == (500, [])
        assert answer.body == b"Internal Server Error\n"
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert record.exc_info
        assert isinstance(record.exc_info[1], SessionLockTimeout)
        assert "the holder" in record.getMessage()
        assert await data_of(browser.provider, browser.cookie) == {"n": 0}
        await grid.settle()
        assert await is_free(grid, browser.cookie)


# -- commits that are refused ---------------------------------------------------------------------


@ALL
@in_loop
async def test_a_session_that_ended_meanwhile_is_a_plain_500(
    grid: Spy, framework: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(asked: Asked) -> Reply:
        asked.session["n"] = 2
        async with browser.provider.open(session_id) as other:
            other.abandon()
        return Reply(b"stored", 200, {"x-made-by": "the handler", "set-cookie": "seen=1"})

    async with browsing(framework, handler, grid, **CONCURRENT) as browser:
        session_id = browser.cookie = await stored(browser.provider, n=1)
        caplog.clear()
        answer = await browser.ask("POST")
        assert (answer.status, answer.error) == (500, None)
        assert answer.body == b"Internal Server Error\n"
        assert answer.header("cache-control") == ["no-store"]
        assert answer.header("x-made-by") == answer.header("set-cookie") == []
        assert answer.header("retry-after") == []
        (text,) = errors(caplog)
        assert text.startswith("a request's session was not stored: The session ended")
        async with browser.provider.open(session_id, access="read_only") as session:
            assert session.is_new


@ALL
@in_loop
async def test_a_value_that_cannot_be_stored_is_a_plain_500(
    grid: Spy, framework: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(asked: Asked) -> Reply:
        asked.session.update(n=2, wrong=object())
        return Reply(b"stored")

    async with browsing(framework, handler, grid, **CONCURRENT) as browser:
        browser.cookie = await stored(browser.provider, n=1)
        caplog.clear()
        answer = await browser.ask("POST")
        assert (answer.status, answer.body) == (500, b"Internal Server Error\n")
        (text,) = errors(caplog)
        assert "wrong" in text
        assert await data_of(browser.provider, browser.cookie) == {"n": 1}
        assert await is_free(grid, browser.cookie)


@ALL
@in_loop
async def test_a_handlers_exception_forgets_what_it_did(grid: Spy, framework: str) -> None:
    async def handler(asked: Asked) -> Reply:
        asked.session["n"] = 2
        raise ZeroDivisionError

    async with browsing(framework, handler, grid, **CONCURRENT) as browser:
        browser.cookie = await stored(browser.provider, n=1)
        answer = await browser.ask("POST")
        assert isinstance(answer.error, ZeroDivisionError)
        assert await data_of(browser.provider, browser.cookie) == {"n": 1}


# -- ids and cookies ------------------------------------------------------------------------------


@ALL
@in_loop
async def test_a_new_session_gets_its_cookie(grid: Spy, framework: str) -> None:
    meeting = Meeting(1)
    async with browsing(framework, meeting.handler, grid, **CONCURRENT) as browser:
        assert (await browser.ask()).set_cookie is None  # nothing is stored
        assert grid.asked == []
        assert (await browser.ask("POST", "/cart/a")).set_cookie
        assert browser.cookie is not None
        assert await data_of(browser.provider, browser.cookie) == {"a": ["mine"]}
        assert await is_free(grid, browser.cookie)
        assert (await browser.ask("POST", "/cart/b")).set_cookie is None
        assert set(await data_of(browser.provider, browser.cookie)) == {"a", "b"}


@ALL
@in_loop
async def test_a_login_sends_the_new_cookie_and_what_was_merged_is_there(
    grid: Spy, framework: str
) -> None:
    async def handler(asked: Asked) -> Reply:
        session = asked.session
        if asked.path == "/login":
            session.user, session["logins"] = "ann", 1
            await change(browser.provider, before, cart=["tea"])
        elif asked.path == "/logout":
            session.clear()
        return Reply(f"{session.user} {sorted(session.items())}".encode())

    async with browsing(framework, handler, grid, **CONCURRENT) as browser:
        before = browser.cookie = await stored(browser.provider, n=1)
        answer = await browser.ask("POST", "/login")
        assert answer.status == 200
        assert answer.set_cookie
        assert browser.cookie not in (None, before)
        seen = await browser.ask()
        assert seen.body == b"ann [('cart', ['tea']), ('logins', 1), ('n', 1)]"
        new, browser.cookie = browser.cookie, before
        refused = await browser.ask()  # the browser has the new one, a thief never gets it
        assert (refused.status, refused.header("retry-after")) == (503, ["1"])
        browser.cookie = new
        assert await is_free(grid, str(new))
        assert "Max-Age=0" in ((await browser.ask("POST", "/logout")).set_cookie or "")
        assert browser.cookie is None


@ALL
@in_loop
async def test_the_cookie_is_rolled_by_who_knows_that_the_id_is_the_newest(
    grid: Spy, framework: str
) -> None:
    meeting = Meeting(1)
    rules = {"/cart/*": "concurrent", "/look": "concurrent", "/read": "read_only"}
    options: dict[str, Any] = {"rolling": True, "max_age": 60, "access": rules}
    async with browsing(framework, meeting.handler, grid, **options) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        assert (await browser.ask("POST", "/read")).set_cookie is None
        for path in ("/cart/a", "/"):
            assert "Max-Age=60" in ((await browser.ask("POST", path)).set_cookie or "")
        assert (await browser.ask("GET", "/look")).set_cookie is None
        assert meeting.accesses == ["read_only", "concurrent", "exclusive", "concurrent"]
        grid.before = come_first(browser.provider, str(browser.cookie))
        locked_at_its_end = await browser.ask("POST", "/cart/a")
        grid.before = None
        assert "Max-Age=60" in (locked_at_its_end.set_cookie or "")


# -- around the response --------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("where", ["stream", "task"])
@in_loop
async def test_after_the_headers_left_assignment_raises(
    grid: Spy, framework: str, where: str
) -> None:
    raised: list[Exception] = []

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        session["n"] = 2

        async def work() -> None:
            changes: list[Callable[[], None]] = [
                *(session.clear, session.abandon),
                lambda: session.update(n=3),
            ]
            for change_it in changes:
                with pytest.raises(SessionClosed) as error:
                    change_it()
                raised.append(error.value)
            async with session.exclusive() as s:
                s["late"] = s["n"] + 1

        async def chunks() -> AsyncIterator[bytes]:
            await work()
            yield b"ok"

        return Reply(chunks=chunks) if where == "stream" else Reply(background=work)

    async with browsing(framework, handler, grid, **CONCURRENT) as browser:
        browser.cookie = await stored(browser.provider, n=1)
        answer = await browser.ask("POST")
        assert (answer.status, answer.body, answer.error) == (200, b"ok", None)
        assert len(raised) == 3
        assert await data_of(browser.provider, browser.cookie) == {"n": 2, "late": 3}
        assert await is_free(grid, browser.cookie)


@ALL
@in_loop
async def test_a_nested_change_after_the_headers_left_is_told(
    grid: Spy, framework: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(asked: Asked) -> Reply:
        cart = asked.session["cart"]

        async def chunks() -> AsyncIterator[bytes]:
            yield b"one"
            cart.append("late")
            yield b"two"

        return Reply(chunks=chunks)

    async with browsing(framework, handler, grid, **CONCURRENT) as browser:
        browser.cookie = await stored(browser.provider, cart=[])
        caplog.clear()
        assert (await browser.ask("POST")).body == b"onetwo"
        (text,) = errors(caplog)
        assert "under 'cart'" in text
        assert await data_of(browser.provider, browser.cookie) == {"cart": []}


@ALL
@in_loop
async def test_check_then_act_is_safe_in_exclusive_only(grid: Spy, framework: str) -> None:
    """What was read is not protected; a block of `exclusive()` sees what is stored."""
    meet = asyncio.Barrier(5)

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        await meet.wait()  # each has read before any has written
        if asked.path == "/unsafe":
            if session["left"] > 0:
                session["left"] -= 1
                return Reply(b"sold")
        else:
            async with session.exclusive() as s:
                if s["left"] > 0:
                    s["left"] -= 1
                    return Reply(b"sold")
        return Reply(b"sold out")

    async with browsing(framework, handler, grid, **CONCURRENT) as browser:
        browser.cookie = await stored(browser.provider, left=2)
        answers = await both(browser, *["/safe"] * 5)
        assert sorted(x.body for x in answers) == [b"sold"] * 2 + [b"sold out"] * 3
        assert await data_of(browser.provider, browser.cookie) == {"left": 0}
        browser.cookie = await stored(browser.provider, left=2)
        answers = await both(browser, *["/unsafe"] * 5)
        assert [x.body for x in answers] == [b"sold"] * 5  # as the documentation says
        assert await data_of(browser.provider, browser.cookie) == {"left": 1}


@pytest.mark.parametrize("how", ["default", "rule", "view"])
@in_loop
async def test_a_websocket_has_a_snapshot_and_writes_in_exclusive(grid: Spy, how: str) -> None:
    async def talk(ws: WebSocket) -> None:
        await ws.accept()
        session = session_of(ws)
        async for text in ws.iter_text():
            with pytest.raises(SessionReadOnly):
                session["n"] = 0
            async with session.exclusive() as s:
                s["n"] += int(text)
            await ws.send_text(f"{session.access} {session['n']}")

    given = {"default": "concurrent", "rule": {"/chat": "concurrent"}}
    options: dict[str, Any] = {} if how == "view" else {"access": given[how]}
    view = declares("concurrent")(talk) if how == "view" else talk
    async with provider_on(grid, **options) as provider:
        app = Starlette(
            routes=[WebSocketRoute("/chat", view)],
            middleware=[Middleware(SessionMiddleware, provider=provider)],
        )
        session_id = await stored(provider, n=1, other=0)
        async with serving(app) as port, connected(port, "/chat", session_id) as socket:
            assert await socket.ask("2") == "read_only 3"
            await change(provider, session_id, n=10)
            assert await is_free(grid, session_id)
            assert await socket.ask("1") == "read_only 11"
        assert await data_of(provider, session_id) == {"n": 11, "other": 0}
