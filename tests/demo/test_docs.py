"""The code in docs/ runs, and does what the text around it says."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from gridsession import (
    Session,
    SessionGone,
    SessionProvider,
    SessionReplaced,
    SessionSettings,
)
from gridsession.grids.redis import RedisGrid
from gridsession.sources.connection_string import RedisAddress, parse
from gridsession.web.starlette import SessionMiddleware, session_of
from tests.redis_server import RedisServer
from tests.web.live import cookie_of

ROOT = Path(__file__).parents[2]
STREAMS = (ROOT / "docs" / "streams.md").read_text(encoding="utf-8")
CSRF = (ROOT / "docs" / "csrf.md").read_text(encoding="utf-8")
FARM = (ROOT / "docs" / "farm.md").read_text(encoding="utf-8")
# What the pages' code takes as imported.
NAMES: dict[str, Any] = {
    "AsyncIterator": AsyncIterator,
    "Awaitable": Awaitable,
    "BackgroundTask": BackgroundTask,
    "Callable": Callable,
    "Middleware": Middleware,
    "PlainTextResponse": PlainTextResponse,
    "Request": Request,
    "Response": Response,
    "Route": Route,
    "Session": Session,
    "SessionGone": SessionGone,
    "SessionMiddleware": SessionMiddleware,
    "SessionProvider": SessionProvider,
    "SessionReplaced": SessionReplaced,
    "SessionSettings": SessionSettings,
    "Starlette": Starlette,
    "StreamingResponse": StreamingResponse,
    "WebSocket": WebSocket,
    "WebSocketRoute": WebSocketRoute,
    "secrets": secrets,
    "session_of": session_of,
}


def blocks(page: str, language: str = "python") -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found
    return found


def run(*sources: str, **names: Any) -> dict[str, Any]:
    """Run the code of a page from its top to its end; the names that it leaves."""
    left = NAMES | names
    for source in sources:
        exec(compile(source, "docs", "exec"), left)
    return left


@pytest.fixture
def sent_mails() -> list[str]:
    return []


@pytest.fixture
def page(sent_mails: list[str]) -> dict[str, Any]:
    async def send_mail() -> None:
        sent_mails.append("thank you")

    return run(*blocks(STREAMS), send_mail=send_mail)


@pytest.fixture
def client(page: dict[str, Any]) -> TestClient:
    return TestClient(page["app"])


def data_of(page: dict[str, Any], client: TestClient) -> dict[str, Any]:
    async def read() -> dict[str, Any]:
        provider: SessionProvider = page["provider"]
        async with provider.open(client.cookies["session"], access="read_only") as session:
            return {**session, "user": session.user}

    return asyncio.run(read())


def test_a_stream(page: dict[str, Any], client: TestClient) -> None:
    assert client.get("/export").text == "row 0\nrow 1\nrow 2\n"
    assert data_of(page, client) == {"exports": 1, "complete exports": 1, "user": None}


def test_server_sent_events(page: dict[str, Any], client: TestClient) -> None:
    assert client.get("/events").text == "id: 1\ndata: 9.5\n\nid: 2\ndata: 9.7\n\n"
    assert client.get("/events").text == ""  # all were sent before
    assert data_of(page, client) == {"last_price": 2, "user": None}


def test_a_background_task(page: dict[str, Any], client: TestClient, sent_mails: list[str]) -> None:
    client.get("/export")  # so that the order gives a stored session a new id
    client.post("/order")
    assert sent_mails == ["thank you"]
    data = data_of(page, client)
    assert (data["user"], data["mails"], data["confirmed"]) == ("ann", 1, True)


def test_a_socket(page: dict[str, Any], client: TestClient) -> None:
    with client.websocket_connect("/chat") as socket:
        headers: list[tuple[bytes, bytes]] = socket.extra_headers or []
        (line,) = [value.decode() for name, value in headers if name == b"set-cookie"]
        socket.send_text("hello")
        assert socket.receive_text() == "guest #1: hello"
        client.cookies["session"] = cookie_of(line)
        with client.websocket_connect("/chat") as other:
            assert not other.extra_headers
            other.send_text("hi")
            assert other.receive_text() == "guest #2: hi"
        change(page, client, lambda s: s.update(banned=True))
        with pytest.raises(WebSocketDisconnect) as denied:
            client.websocket_connect("/chat").__enter__()
        response: Any = denied.value
        assert isinstance(response, WebSocketDenialResponse)
        assert (response.status_code, response.headers["vary"]) == (403, "Cookie")
        change(page, client, lambda s: s.abandon())
        socket.send_text("still there?")
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert closed.value.code == 4401


def change(page: dict[str, Any], client: TestClient, how: Callable[[Session], None]) -> None:
    async def open_and_change() -> None:
        provider: SessionProvider = page["provider"]
        async with provider.open(client.cookies["session"]) as session:
            how(session)

    asyncio.run(open_and_change())


def test_nothing_of_it_is_logged(
    page: dict[str, Any], client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.get("/export")
    client.get("/events")
    client.post("/order")
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []


# -- CSRF -----------------------------------------------------------------------------------------


def test_the_code_about_csrf_is_that_of_its_example() -> None:
    """Which has tests of its own: tests/demo/test_csrf.py."""
    example = ROOT / "examples" / "csrf"
    *of_example, _ = blocks(CSRF)
    assert len(of_example) == 4
    source = (example / "app.py").read_text(encoding="utf-8")
    for block in of_example:
        assert block in source
    (field,) = blocks(CSRF, "html")
    template = (example / "templates" / "account.html").read_text(encoding="utf-8")
    assert field.strip() in template
    assert template.count(field.strip()) == template.count('method="post"')


def test_a_socket_of_another_site_is_refused() -> None:
    *_, block = blocks(CSRF)
    chat = run(block)["chat"]
    client = TestClient(Starlette(routes=[WebSocketRoute("/", chat)]))
    with client.websocket_connect("/", headers={"origin": "https://shop.example"}) as socket:
        assert socket.receive()["code"] == 1000
    for headers in ({}, {"origin": "https://evil.example"}):
        with pytest.raises(WebSocketDisconnect) as closed:
            client.websocket_connect("/", headers=headers).__enter__()
        assert closed.value.code == 1008


# -- a farm ---------------------------------------------------------------------------------------


def test_a_farm(tmp_path: Path) -> None:
    with_provider, with_client = blocks(FARM)
    asked_for: list[str] = []

    def read(name: str) -> str:
        asked_for.append(name)
        return "hunter2"

    async def count(request: Request) -> Response:
        request.session["n"] = request.session.get("n", 0) + 1
        return PlainTextResponse(str(request.session["n"]))

    with RedisServer(tmp_path, appendonly="yes") as server:
        server.admin.acl_setuser(
            "shop",
            enabled=True,
            passwords=["+hunter2"],
            keys=["*"],
            channels=["*"],
            commands=["+@all"],
        )
        app = Starlette(routes=[Route("/", count)])
        address = "rediss://cache-1:6379/0"
        assert with_provider.count(address) == 1
        run(with_provider.replace(address, server.url), app=app, vault=SimpleNamespace(read=read))
        with TestClient(app, base_url="https://shop.example") as client:
            assert [client.get("/").text for _ in range(3)] == ["1", "2", "3"]
        assert set(asked_for) == {"redis/shop"}
        assert list(server.admin.scan_iter("gs:shop:*"))

        client_of_their_own: Any = Redis(port=server.port, username="shop", password="hunter2")
        grid = run(with_client, client=client_of_their_own, RedisGrid=RedisGrid)["grid"]

        async def use() -> None:
            async with (
                SessionProvider(SessionSettings(), grid=grid) as provider,
                provider.open(None) as session,
            ):
                session["n"] = 1
            await grid.close()

        asyncio.run(use())
        assert len([x for x in server.admin.scan_iter("gs:shop:*") if b":due:" not in x]) == 2


def test_the_addresses_on_the_page_about_farms() -> None:
    named = re.findall(r"^\| `([^`]+)` \|", FARM, re.MULTILINE)
    addresses = [text.replace("…", "x") for text in named if "://" in text or "Gateways" in text]
    assert len(addresses) == 8
    for address in addresses:
        assert isinstance(parse(address), RedisAddress)
