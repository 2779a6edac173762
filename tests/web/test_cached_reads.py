"""What browsers get from a worker's client cache: within its interval, and in an outage."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from gridsession import SessionProvider, SessionReadOnly, SessionSettings
from gridsession.grids.contract import Found, Granted
from gridsession.web import access as declarations
from gridsession.web.starlette import SessionMiddleware, session_of
from tests.provider.harness import (
    Outage,
    Spy,
    data_of,
    identity_of,
    in_loop,
    provider_on,
    stored,
)
from tests.web.driver import (
    FRAMEWORKS,
    Asked,
    Browser,
    Exchange,
    Reply,
    browsing,
    start_of_lifespan,
)
from tests.web.live import Refusal, connected, serving

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)
RULES = {
    "/read": "read_only",
    "/wait": "read_only wait_for_writer",
    "/write": "concurrent",
    "/none": "none",
}
IN_OUTAGE: dict[str, Any] = {"access": RULES, "if_grid_unavailable": "read_cached"}
FOR_LONG: dict[str, Any] = {"access": RULES, "client_cache_coherency_interval": 1000.0}


async def shop(asked: Asked) -> Reply:
    if asked.path == "/none":
        return Reply(b"none")
    session = asked.session
    if asked.path.startswith("/add"):
        session["n"] = session.get("n", 0) + 1
    elif asked.path == "/write":
        session["w"] = session.get("w", 0) + 1
    elif asked.path == "/login":
        session.user = "ann"
    elif asked.path == "/logout":
        session.clear()
    return Reply(f"{'stale' if session.is_stale else 'fresh'} {session.get('n')}".encode())


def travelled(grid: Spy) -> list[bytes | None]:
    """The payloads that came from the grid, read by read; and forget them."""
    payloads = [
        outcome.snapshot.payload
        for _, outcome in grid.outcomes
        if isinstance(outcome, Granted | Found)
    ]
    grid.outcomes.clear()
    return payloads


async def read(browser: Browser, path: str = "/read") -> bytes:
    answer = await browser.ask(path=path)
    assert (answer.status, answer.set_cookie) == (200, None)
    assert answer.header("vary") == ["Cookie"]
    return answer.body


# -- while the grid is there ----------------------------------------------------------------------


@ALL
@in_loop
async def test_what_is_unchanged_does_not_travel_again(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid, access=RULES) as browser:
        assert (await browser.ask("POST", "/add")).status == 200
        grid.calls.clear()
        travelled(grid)
        for path in ("/read", "/wait", "/write", "/"):
            assert await read(browser, path) == b"fresh 1"
        assert grid.asked == ["read", "read", "read", "commit_if", "acquire", "release"]
        assert travelled(grid) == [None] * 4


@ALL
@in_loop
async def test_each_request_sees_what_another_worker_stored(grid: Spy, framework: str) -> None:
    async with (
        browsing(framework, shop, grid, access=RULES) as browser,
        browsing(framework, shop, grid, access=RULES) as elsewhere,
    ):
        await browser.ask("POST", "/add")
        elsewhere.cookie = browser.cookie
        for n in range(2, 5):
            assert (await elsewhere.ask("POST", "/add")).status == 200
            assert await read(browser) == f"fresh {n}".encode()


@ALL
@in_loop
async def test_within_the_interval_a_page_that_reads_costs_no_call(
    grid: Spy, framework: str
) -> None:
    async with (
        browsing(framework, shop, grid, **FOR_LONG) as browser,
        browsing(framework, shop, grid, **FOR_LONG) as elsewhere,
    ):
        await browser.ask("POST", "/add")
        elsewhere.cookie = browser.cookie
        grid.calls.clear()
        for _ in range(5):
            assert await read(browser) == b"fresh 1"
        assert grid.asked == []
        # A worker sees its own commits, and another's when the interval is over, or when it writes.
        await browser.ask("POST", "/add")
        assert await read(browser) == b"fresh 2"
        await elsewhere.ask("POST", "/add")
        assert await read(browser) == b"fresh 2"
        assert await read(browser, "/wait") == b"fresh 3"
        assert await read(browser) == b"fresh 3"
        await elsewhere.ask("POST", "/add")
        assert await read(browser, "/") == b"fresh 4"
        assert await read(browser) == b"fresh 4"


@ALL
@in_loop
async def test_a_logout_elsewhere_is_seen_when_the_interval_is_over(
    grid: Spy, framework: str
) -> None:
    options = FOR_LONG | {"client_cache_coherency_interval": 0.0}
    async with (
        browsing(framework, shop, grid, **FOR_LONG) as browser,
        browsing(framework, shop, grid, **options) as at_once,
        browsing(framework, shop, grid) as elsewhere,
    ):
        await browser.ask("POST", "/add")
        at_once.cookie = elsewhere.cookie = before = browser.cookie
        assert await read(browser) == await read(at_once) == b"fresh 1"
        assert (await elsewhere.ask("POST", "/logout")).set_cookie
        assert await read(browser) == b"fresh 1"
        assert await read(at_once) == b"fresh None"
        # Here it is seen at once.
        assert (await browser.ask("POST", "/write")).set_cookie
        assert browser.cookie != before
        browser.cookie = before
        assert await read(browser) == b"fresh None"


@ALL
@in_loop
async def test_the_old_id_of_who_logged_in_here_is_not_read_from_the_cache(
    grid: Spy, framework: str
) -> None:
    async with browsing(framework, shop, grid, **FOR_LONG) as browser:
        await browser.ask("POST", "/add")
        old = browser.cookie
        assert await read(browser) == b"fresh 1"
        assert (await browser.ask("POST", "/login")).set_cookie
        assert await read(browser) == b"fresh 1"
        browser.cookie = old
        refused = await browser.ask(path="/read")
        assert (refused.status, refused.header("retry-after")) == (503, ["1"])


@ALL
@in_loop
async def test_nothing_stale_is_said_where_the_grid_is_there(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid, **IN_OUTAGE) as browser:
        assert (await browser.ask()).body == b"fresh None"  # without a cookie
        await browser.ask("POST", "/add")
        for path in ("/read", "/wait", "/write", "/"):
            assert await read(browser, path) == b"fresh 1"


# -- in an outage ---------------------------------------------------------------------------------


def check_away(answer: Exchange) -> None:
    assert (answer.status, answer.header("retry-after")) == (503, ["1"])
    assert answer.set_cookie is None


@ALL
@in_loop
async def test_in_an_outage_pages_that_read_get_the_last_known_data(
    grid: Spy, framework: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with browsing(framework, shop, grid, **IN_OUTAGE) as browser:
        await browser.ask("POST", "/add")
        before = browser.cookie
        caplog.clear()
        grid.before = away = Outage()
        for _ in range(3):
            assert await read(browser) == await read(browser, "/wait") == b"stale 1"
            for path in ("/", "/add", "/write"):
                check_away(await browser.ask("POST", path))
            assert (await browser.ask(path="/none")).body == b"none"
        assert browser.cookie == before
        refused = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(refused) == 9
        assert all(text.startswith("a request was refused: ") for text in refused)
        away.over()
        assert await read(browser) == b"fresh 1"
        assert (await browser.ask("POST", "/add")).body == b"fresh 2"
        assert await read(browser) == b"fresh 2"


@ALL
@in_loop
async def test_by_default_and_for_what_is_not_known_it_is_503(grid: Spy, framework: str) -> None:
    async with (
        browsing(framework, shop, grid, access=RULES) as by_default,
        browsing(framework, shop, grid, **IN_OUTAGE) as other_worker,
        browsing(framework, shop, grid, **IN_OUTAGE, client_cache_capacity=0) as without,
    ):
        for browser in (by_default, without):
            await browser.ask("POST", "/add")
            await read(browser)
        other_worker.cookie = by_default.cookie
        grid.before = Outage()
        for browser in (by_default, other_worker, without):
            check_away(await browser.ask(path="/read"))
        grid.before = None
        for browser in (by_default, other_worker, without):
            assert await read(browser) == b"fresh 1"


@in_loop
async def test_without_a_cookie_an_outage_changes_nothing(grid: Spy) -> None:
    async with browsing("starlette", shop, grid, **IN_OUTAGE) as browser:
        grid.before = Outage()
        for path in ("/read", "/wait", "/"):
            assert (await browser.ask(path=path)).body == b"fresh None"
        grid.before = None


@in_loop
async def test_who_came_with_another_secret_is_given_nothing(grid: Spy) -> None:
    async with browsing("starlette", shop, grid, **IN_OUTAGE) as browser:
        await browser.ask("POST", "/add")
        cookie = str(browser.cookie)
        browser.cookie = cookie[:-8] + ("A" * 8 if cookie[-8:] != "A" * 8 else "B" * 8)
        grid.before = Outage()
        check_away(await browser.ask(path="/read"))
        browser.cookie = cookie
        assert await read(browser) == b"stale 1"
        grid.before = None


@in_loop
async def test_a_stale_session_cannot_be_written(grid: Spy) -> None:
    notes: list[Any] = []

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        if session.is_stale:
            with pytest.raises(SessionReadOnly):
                session["n"] = 5
            session["list"].append(1)
            notes.append("changed in the depth")
        elif asked.path != "/read":
            session["list"] = []
        return Reply()

    async with browsing("starlette", handler, grid, **IN_OUTAGE) as browser:
        await browser.ask("POST", "/")
        grid.before = away = Outage()
        answer = await browser.ask(path="/read")  # a change in the depth is found, as ever
        assert (answer.status, answer.set_cookie) == (500, None)
        assert notes == ["changed in the depth"]
        away.over()
        assert await data_of(browser.provider, str(browser.cookie)) == {"list": []}


@in_loop
async def test_an_ended_session_is_read_in_an_outage_until_its_deadline(grid: Spy) -> None:
    """As docs/client-cache.md warns: who ended it elsewhere cannot tell this worker."""
    async with (
        browsing("starlette", shop, grid, **IN_OUTAGE, timeout=900) as browser,
        browsing("starlette", shop, grid) as elsewhere,
    ):
        await browser.ask("POST", "/add")
        elsewhere.cookie = browser.cookie
        assert await read(browser) == b"fresh 1"
        await elsewhere.ask("POST", "/logout")
        grid.before = away = Outage()
        first = await browser.ask(path="/read")
        assert (first.status, first.body) == (200, b"stale 1")
        cache: Any = browser.provider.client_cache
        steady = cache.steady
        cache.steady = lambda: steady() + 900
        check_away(await browser.ask(path="/read"))
        cache.steady = steady
        away.over()
        assert await read(browser) == b"fresh None"


@in_loop
async def test_a_websocket_begins_with_the_last_known_data(grid: Spy) -> None:
    async def talk(ws: WebSocket) -> None:
        session = session_of(ws)
        await ws.accept()
        await ws.send_text(f"{session.is_stale} {session['n']}")
        await ws.close()

    async with provider_on(grid, **IN_OUTAGE) as provider:
        app = Starlette(
            routes=[WebSocketRoute("/", talk)],
            middleware=[Middleware(SessionMiddleware, provider=provider)],
        )
        session_id, other = await stored(provider, n=1), await stored(provider, n=2)
        assert provider.client_cache is not None
        provider.client_cache.drop(identity_of(other).key)
        async with serving(app) as port:
            grid.before = away = Outage()
            async with connected(port, "/", session_id) as socket:
                assert (await socket.next_event()).data == "True 1"  # type: ignore[attr-defined]
            with pytest.raises(Refusal) as refusal:
                async with connected(port, "/", other):
                    raise AssertionError("it was accepted")
            assert refusal.value.status == 403
            away.over()
            async with connected(port, "/", session_id) as socket:
                assert (await socket.next_event()).data == "False 1"  # type: ignore[attr-defined]


# -- the page about it ----------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "client-cache.md").read_text("utf-8")


@in_loop
async def test_the_pages_code(grid: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declarations, "in_use", False)
    stale_page, counting = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    app = Starlette()
    names: dict[str, Any] = {
        "PlainTextResponse": PlainTextResponse,
        "Request": Request,
        "Response": Response,
        "SessionMiddleware": SessionMiddleware,
        "SessionProvider": functools.partial(SessionProvider, grid=grid),
        "SessionSettings": SessionSettings,
        "app": app,
        "session_access": declarations.session_access,
    }
    monkeypatch.setenv("GRIDSESSION_IF_GRID_UNAVAILABLE", "read_cached")
    monkeypatch.setenv("GRIDSESSION_SWEEP_INTERVAL", "3600")
    exec(compile(stale_page + counting, "docs", "exec"), names)
    app.add_route("/account", names["account"])
    app.add_route("/metrics", names["metrics"])
    _, stop = await start_of_lifespan(app)
    provider: SessionProvider = names["provider"]
    browser = Browser(app, provider)
    browser.cookie = await stored(provider, orders=[1, 2])
    provider.client_cache.drop(identity_of(browser.cookie).key)  # type: ignore[union-attr]
    grid.calls.clear()
    for _ in range(3):
        assert (await browser.ask(path="/account")).body == b"2 orders"
    assert grid.asked == ["read"]
    said = (await browser.ask(path="/metrics")).body.decode()
    assert said.startswith("CacheCounters(hits=2, misses=1, evictions=0, sessions=1, bytes=")
    cache: Any = provider.client_cache
    steady = cache.steady
    cache.steady = lambda: steady() + 5
    grid.before = away = Outage()
    assert (await browser.ask(path="/account")).body == b"2 orders (as of a while ago)"
    away.over()
    await stop()
