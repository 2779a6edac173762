"""Promise 10: what cannot heal keeps a server from starting, and is told once, whole."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from gridsession import GridUnavailable, SessionProvider, SessionSettings, SettingsError
from gridsession.identity import ID_BYTES, new_id
from gridsession.web.asgi import SessionMiddleware
from gridsession.web.starlette import SessionMiddleware as StarletteMiddleware
from gridsession.web.types import Message, Receive, Scope, Send
from tests.farm.peek import peek
from tests.provider.harness import Outage, Spy, in_loop
from tests.web.driver import FRAMEWORKS, Asked, Browser, Reply, plain, start_of_lifespan

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)
WRONG: dict[str, dict[str, Any]] = {
    "unknown option": {"timout": 5},
    "bad value": {"timeout": -5},
    "unknown scheme": {"connection_string": "ridas://:hunter2@host"},
    "bad connection string": {"connection_string": "embedded://host/path"},
    "unreadable connection string": {"connection_string": "embedded://[hunter2/"},
    "bad grid option": {"connection_string": "embedded:///tmp?maxsize=5MiB"},
    "memory with a path": {"connection_string": "memory:///path"},
    "bad rule": {"access": {"nowhere": "none"}},
    "settings of another type": {"settings": {"timeout": 5}},
    "settings of no type": {"settings": {}},
    "settings not made": {"settings": SessionSettings},
    "settings as a provider": {"provider": SessionSettings()},
    "a provider not made": {"provider": SessionProvider},
    "a path that is no text": {"connection_string": "embedded:///tmp/%FFhunter2"},
    "two of three": {"settings": SessionSettings(), "timeout": 5},
}


async def count(asked: Asked) -> Reply:
    asked.session["n"] = asked.session.get("n", 0) + 1
    return Reply(str(asked.session["n"]).encode())


def logged(caplog: pytest.LogCaptureFixture, level: int) -> list[logging.LogRecord]:
    return [r for r in caplog.records if r.levelno >= level and r.name == "gridsession"]


# -- what cannot heal -----------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
@in_loop
async def test_a_wrong_setting_fails_the_start_with_its_cause(
    framework: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    app = FRAMEWORKS[framework](count, **options)  # never raises
    incoming: asyncio.Queue[Message] = asyncio.Queue()
    incoming.put_nowait({"type": "lifespan.startup"})
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "lifespan", "asgi": {"version": "3.0"}}, incoming.get, send)
    (answer,) = sent
    assert answer["type"] == "lifespan.startup.failed"
    (record,) = logged(caplog, logging.WARNING)
    assert record.levelno == logging.ERROR
    assert record.exc_info
    assert isinstance(record.exc_info[1], SettingsError)
    assert str(record.exc_info[1]) in answer["message"]
    assert str(record.exc_info[1]) in record.getMessage()
    assert "hunter2" not in f"{answer} {caplog.text}"


@ALL
@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
@in_loop
async def test_without_lifespan_every_request_is_a_plain_500_and_one_is_logged(
    framework: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    app = FRAMEWORKS[framework](count, **options)
    async with SessionProvider(SessionSettings(connection_string="memory:")) as nobodys:
        browser = Browser(app, nobodys)
        caplog.clear()
        for _ in range(3):
            answer = await browser.ask()
            assert (answer.status, answer.error) == (500, None)
            assert answer.body == b"Internal Server Error\n"
            assert answer.header("retry-after") == []
    (record,) = logged(caplog, logging.WARNING)
    assert record.levelno == logging.ERROR
    assert record.exc_info


def test_an_installed_grid_that_cannot_be_imported_is_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Point:
        name = "datagrid"

        def load(self) -> None:
            raise ImportError("pip install datagrid-client")

    monkeypatch.setattr("gridsession.sources.installed.entry_points", lambda group: [Point()])
    middleware = SessionMiddleware(plain(count), connection_string="datagrid://:hunter2@host")
    assert "pip install datagrid-client" in str(middleware.error)
    assert "hunter2" not in str(middleware.error)


def test_without_its_extra_the_grid_for_redis_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [n for n in sys.modules if n.startswith("gridsession.grids.redis")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hiredis", None)
    middleware = SessionMiddleware(plain(count), connection_string="redis://:hunter2@host")
    assert "pip install 'gridsession[redis]'" in str(middleware.error)
    assert "hunter2" not in str(middleware.error)


@in_loop
async def test_a_grid_that_will_never_open_fails_the_start(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(name: str) -> None:
        if name == "open":
            raise SettingsError("the password is wrong")

    grid.before = refuse
    provider = SessionProvider(grid=grid)
    app = plain(count, provider=provider)
    answer, _ = await start_of_lifespan(app)
    assert answer == {
        "type": "lifespan.startup.failed",
        "message": "gridsession: the password is wrong",
    }
    assert (await Browser(app, provider).ask()).status == 500
    assert len(logged(caplog, logging.WARNING)) == 1


@in_loop
async def test_a_grid_that_fails_in_a_way_of_its_own_fails_the_start(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    """Raised out of the middleware, a server would take it for an application without lifespan."""

    async def fail(name: str) -> None:
        if name == "open":
            raise ZeroDivisionError("hunter2")

    grid.before = fail
    answer, _ = await start_of_lifespan(plain(count, provider=SessionProvider(grid=grid)))
    assert answer == {
        "type": "lifespan.startup.failed",
        "message": "gridsession: the grid cannot be opened: ZeroDivisionError",
    }
    (record,) = logged(caplog, logging.WARNING)
    assert record.levelno == logging.ERROR
    assert record.exc_info


def test_without_file_locks_the_embedded_grid_says_what_to_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows has none of these."""
    for name in [n for n in sys.modules if n.startswith("gridsession.grids.embedded")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    error = SessionMiddleware(plain(count)).error
    assert "use memory:// here" in str(error)


# -- what may heal --------------------------------------------------------------------------------


@ALL
@in_loop
async def test_an_unreachable_grid_is_told_served_503_and_heals(
    grid: Spy, framework: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid.before = away = Outage("open")
    provider = SessionProvider(grid=grid)
    app = FRAMEWORKS[framework](count, provider=provider)
    answer, stop = await start_of_lifespan(app)
    assert answer["type"] == "lifespan.startup.complete"
    (record,) = logged(caplog, logging.WARNING)
    assert record.levelno == logging.ERROR
    assert record.exc_info
    browser = Browser(app, provider)
    browser.cookie = new_id(os.urandom(ID_BYTES))
    for _ in range(2):
        refused = await browser.ask()
        assert (refused.status, refused.header("retry-after")) == (503, ["1"])
        assert refused.set_cookie is None
    away.over()
    assert [(await browser.ask()).body for _ in range(2)] == [b"1", b"2"]
    await stop()
    assert not provider.is_started


@ALL
@in_loop
async def test_promise_6_who_has_no_session_is_served_while_the_grid_is_away(
    grid: Spy, framework: str
) -> None:
    """Also by a worker that has never seen the grid: it stores nothing, and needs none."""

    async def page(asked: Asked) -> Reply:
        return Reply(body=repr(asked.session.get("n")).encode())

    grid.before = Outage("open", "create", "acquire", "read")
    provider = SessionProvider(grid=grid)
    app = FRAMEWORKS[framework](page, provider=provider)
    _, stop = await start_of_lifespan(app)
    browser = Browser(app, provider)
    answer = await browser.ask()
    assert (answer.status, answer.body, answer.set_cookie) == (200, b"None", None)
    browser.cookie = new_id(os.urandom(ID_BYTES))
    assert (await browser.ask()).status == 503
    await stop()


@ALL
@in_loop
async def test_who_wants_it_does_not_start_without_the_grid(
    grid: Spy, framework: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid.before = Outage("open")
    settings = SessionSettings(if_unreachable_at_start="fail")
    app = FRAMEWORKS[framework](count, provider=SessionProvider(settings, grid=grid))
    answer, _ = await start_of_lifespan(app)
    assert answer == {
        "type": "lifespan.startup.failed",
        "message": "gridsession: the grid is away",
    }
    (record,) = logged(caplog, logging.WARNING)
    assert record.levelno == logging.ERROR
    assert record.exc_info
    assert isinstance(record.exc_info[1], GridUnavailable)


# -- start and stop -------------------------------------------------------------------------------


@ALL
@in_loop
async def test_lifespan_opens_and_closes_what_is_its_own(grid: Spy, framework: str) -> None:
    provider = SessionProvider(grid=grid)
    answer, stop = await start_of_lifespan(FRAMEWORKS[framework](count, provider=provider))
    assert answer["type"] == "lifespan.startup.complete"
    assert provider.is_started is True
    await stop()
    assert bool(provider.is_started) is False
    async with provider:
        _, stop = await start_of_lifespan(FRAMEWORKS[framework](count, provider=provider))
        await stop()
        assert provider.is_started  # it was open before: it is another's to close
    assert grid.calls.count("open") == 2


@in_loop
async def test_other_scopes_pass_untouched() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])
        assert "session" not in scope

    async def nothing() -> Message:
        raise AssertionError

    async def nowhere(message: Message) -> None:
        raise AssertionError

    await SessionMiddleware(app, connection_string="memory:")({"type": "x"}, nothing, nowhere)
    assert seen == ["x"]


@ALL
@pytest.mark.parametrize("connection", ["memory:", "embedded"])
@pytest.mark.parametrize("lifespan", [True, False])
def test_test_clients_make_a_loop_for_each_request(
    framework: str, connection: str, lifespan: bool, tmp_path: Path
) -> None:
    if connection == "embedded":
        connection = f"embedded://{tmp_path}/grid?max_size=4MiB"
    provider = SessionProvider(SessionSettings(connection_string=connection, namespace="test"))
    app: Any = FRAMEWORKS[framework](count, provider=provider)
    client = TestClient(app)
    if lifespan:
        with client:
            assert [client.get("/").text for _ in range(3)] == ["1", "2", "3"]
    else:
        assert [client.get("/").text for _ in range(3)] == ["1", "2", "3"]
    assert client.cookies["session"]
    asyncio.run(provider.close())


def test_operators_are_warned_by_log_records_alone(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    with TestClient(plain(count, connection_string="memory://")) as client:
        client.get("/", headers={"cookie": "session=a; session=b"})
    assert not recwarn.list
    texts = [r.getMessage() for r in logged(caplog, logging.WARNING)]
    assert any("this process only" in text for text in texts)
    assert any("came 2 times" in text for text in texts)


# -- the namespace --------------------------------------------------------------------------------

# FastAPI would rather have the server's root path, which comes with requests only.
ROOT_PATH = pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")


@ROOT_PATH
@pytest.mark.parametrize(
    ("root_path", "options", "expected"),
    [
        ("/shop", {}, "/shop"),
        ("shop/", {}, "/shop"),
        ("", {}, "/"),
        (None, {}, "/"),
        ("/shop", {"namespace": "mine"}, "mine"),
    ],
)
@pytest.mark.parametrize("lifespan", ["on", "off"])
def test_the_namespace_is_where_the_application_knows_to_be_mounted(
    root_path: str | None, options: dict[str, Any], expected: str, lifespan: str, tmp_path: Path
) -> None:
    def page(request: Request) -> PlainTextResponse:
        request.session["n"] = 1
        return PlainTextResponse("ok")

    app: Starlette = Starlette() if root_path is None else FastAPI(root_path=root_path)
    app.add_route("/", page)
    place = f"embedded://{tmp_path}/grid?max_size=4MiB"
    app.add_middleware(StarletteMiddleware, connection_string=place, **options)
    # What a server or a proxy says of a request is never taken for it.
    client = TestClient(app, root_path="/from-the-server")
    if lifespan == "on":
        with client:
            assert client.get("/").status_code == 200
    else:
        assert client.get("/").status_code == 200
    made = app.middleware_stack
    while not isinstance(made, SessionMiddleware):
        made = made.app  # type: ignore[union-attr]
    asyncio.run(made.provider.close())
    with peek(tmp_path / "grid", expected) as grid:
        assert grid.record(client.cookies["session"]) is not None


@ROOT_PATH
def test_a_ready_provider_keeps_its_namespace(tmp_path: Path) -> None:
    place = f"embedded://{tmp_path}/grid?max_size=4MiB"
    provider = SessionProvider(SessionSettings(connection_string=place))
    app = FastAPI(root_path="/shop")
    app.add_middleware(StarletteMiddleware, provider=provider)
    app.add_route("/", lambda request: PlainTextResponse(str(request.session.setdefault("n", 1))))
    with TestClient(app) as client:
        client.get("/")
    with peek(tmp_path / "grid", "/") as grid:
        assert grid.record(client.cookies["session"]) is not None
