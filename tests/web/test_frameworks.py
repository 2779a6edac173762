"""What Starlette and FastAPI expect, in their own words."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Any, Literal

import fastapi
import pytest
from fastapi import Depends
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware as StarlettesOwn
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from gridsession import SessionNotAvailable
from gridsession.web.starlette import CurrentSession, SessionMiddleware, session_of

MEMORY: dict[str, Any] = {"connection_string": "memory:"}


def test_starlettes_constructor_names_do_what_starlettes_do() -> None:
    same_site: Literal["strict"] = "strict"
    names: dict[str, Any] = {
        "session_cookie": "sid",
        "max_age": 60,
        "path": "/",
        "same_site": same_site,
        "https_only": True,
        "domain": "testserver.local",
        "partitioned": True,
    }

    async def store(request: Request) -> Response:
        request.session["n"] = 1
        return PlainTextResponse("ok")

    attributes = []
    for middleware in (
        Middleware(SessionMiddleware, **MEMORY, **names),
        Middleware(StarlettesOwn, secret_key="x", **names),
    ):
        app = Starlette(routes=[Route("/", store)], middleware=[middleware])
        with TestClient(app, base_url="https://testserver.local") as client:
            name, _, rest = client.get("/").headers["set-cookie"].partition("=")
            assert name == "sid"
            attributes.append({part.strip().lower() for part in rest.split(";")[1:]})
            assert "sid" in client.cookies
    assert attributes[0] == attributes[1]


def test_a_session_is_whatever_starlette_takes_it_for() -> None:
    async def use(request: Request) -> Response:
        session = request.session
        session.setdefault("cart", []).append("tea")
        return JSONResponse({"session": session, "copy": dict(session), "all": {**session}})

    async def read(request: Request) -> Response:
        return JSONResponse(request.session)

    middleware = [Middleware(SessionMiddleware, **MEMORY)]
    app = Starlette(routes=[Route("/use", use), Route("/read", read)], middleware=middleware)
    with TestClient(app) as client:
        for n in (1, 2):
            cart = {"cart": ["tea"] * n}
            assert client.get("/use").json() == {"session": cart, "copy": cart, "all": cart}
            assert client.get("/read").json() == cart


def user(session: CurrentSession) -> str:
    return str(session.get("name"))


async def visits(session: CurrentSession) -> int:
    session["visits"] = session.get("visits", 0) + 1
    return int(session["visits"])


def test_current_session_in_fastapi() -> None:
    app = fastapi.FastAPI()
    app.add_middleware(SessionMiddleware, **MEMORY)

    @app.post("/login")
    async def login(session: CurrentSession, name: str) -> str:
        session["name"] = name
        session.user = name
        return session.id

    @app.get("/")
    def home(
        session: CurrentSession,
        name: Annotated[str, Depends(user)],
        count: Annotated[int, Depends(visits)],
    ) -> dict[str, Any]:
        return {"name": name, "count": count, "session": dict(session)}

    @app.get("/whole")
    async def whole(session: CurrentSession) -> dict[str, Any]:
        return session

    @app.get("/whole untyped", response_model=None)
    async def whole_untyped(session: CurrentSession) -> Any:
        return session

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, session: CurrentSession) -> None:
        await websocket.accept()
        async with session.exclusive() as s:
            s["visits"] += 10
        await websocket.send_text(f"{session['name']} {session['visits']}")
        await websocket.close()

    with TestClient(app) as client:
        assert client.post("/login?name=ann").status_code == 200
        assert client.get("/").json() == {
            "name": "ann",
            "count": 1,
            "session": {"name": "ann", "visits": 1},
        }
        with client.websocket_connect("/ws") as socket:
            assert socket.receive_text() == "ann 11"
        assert client.get("/").json()["count"] == 12
        for path in ("/whole", "/whole untyped"):
            assert client.get(path).json() == {"name": "ann", "visits": 12}
        assert "CurrentSession" not in client.get("/openapi.json").text


def test_a_socket_that_is_refused_looks_so_to_its_client() -> None:
    from starlette.websockets import WebSocketDisconnect

    async def talk(ws: WebSocket) -> None:
        raise AssertionError("the handler ran")

    app = Starlette(
        routes=[WebSocketRoute("/", talk)],
        middleware=[Middleware(SessionMiddleware, timeout=-1)],
    )
    with pytest.raises(WebSocketDisconnect) as raised, TestClient(app).websocket_connect("/"):
        pass
    assert raised.value.code == 1013


@pytest.mark.parametrize(
    "others", [[], [Middleware(StarlettesOwn, secret_key="x")]], ids=["none", "Starlette's own"]
)
def test_without_our_middleware_the_error_says_what_to_add(others: list[Middleware]) -> None:
    async def endpoint(request: Request) -> Response:
        session_of(request)
        return PlainTextResponse("unreachable")

    app = Starlette(routes=[Route("/", endpoint)], middleware=others)
    with pytest.raises(RuntimeError, match=r"add_middleware\(gridsession.web.starlette"):
        TestClient(app).get("/")


def test_session_of_a_path_without_session() -> None:
    async def endpoint(request: Request) -> Response:
        with pytest.raises(SessionNotAvailable):
            session_of(request)
        with pytest.raises(SessionNotAvailable):
            _ = request.session
        return PlainTextResponse("ok")

    app = Starlette(
        routes=[Route("/", endpoint)],
        middleware=[Middleware(SessionMiddleware, access="none", **MEMORY)],
    )
    assert TestClient(app).get("/").text == "ok"


BLOCKED = """
import sys
sys.modules["{module}"] = None
import gridsession
from gridsession.web.asgi import SessionMiddleware
{then}
"""
STARLETTE = "from gridsession.web.starlette import SessionMiddleware, session_of"


@pytest.mark.parametrize(
    ("module", "then", "error"),
    [
        ("itsdangerous", f"{STARLETTE}, CurrentSession", ""),
        ("fastapi", STARLETTE, ""),
        (
            "fastapi",
            "from gridsession.web.starlette import CurrentSession",
            "ImportError: CurrentSession needs FastAPI: pip install gridsession[fastapi]",
        ),
        (
            "starlette.requests",
            STARLETTE,
            "ImportError: gridsession.web.starlette needs Starlette: "
            "pip install gridsession[starlette]",
        ),
        ("starlette", "", ""),
    ],
)
def test_what_is_not_installed_is_asked_for_by_name(module: str, then: str, error: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED.format(module=module, then=then)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == bool(error), done.stderr
    assert done.stderr.strip().splitlines()[-1:] == [error] * bool(error)
