"""The view that is found ahead of the router is the one that the router picks, for any routes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import fastapi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Host, Mount, Route, Router, WebSocketRoute
from starlette.websockets import WebSocket

from gridsession.access import Use
from gridsession.web import access, routes
from gridsession.web.starlette import SessionMiddleware
from gridsession.web.types import Message, Scope

# Few enough to meet often: what matters is which of several routes that match is picked.
SEGMENTS = ["a", "b", "{p}", "{p:int}", "{p:path}"]
PATHS = st.lists(st.sampled_from(SEGMENTS), max_size=2).map(lambda parts: "/" + "/".join(parts))
PREFIXES = st.sampled_from(["/a", "/b", "/{q}"])
METHODS = st.sampled_from([["GET"], ["POST"], ["GET", "POST"]])
LEAVES = st.one_of(
    st.tuples(st.just("view"), PATHS, METHODS),
    st.tuples(st.just("socket"), PATHS, st.none()),
)
KINDS = ["router", "application", "middleware", "mount's middleware", "host", "included"]


def _around(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(st.sampled_from(KINDS), PREFIXES, st.lists(inner, min_size=1, max_size=3))


TREES = st.lists(st.recursive(LEAVES, _around, max_leaves=6), min_size=1, max_size=5)
ASKED = st.tuples(
    st.sampled_from(["http", "http", "websocket"]),
    st.sampled_from(["GET", "HEAD", "POST", "PUT"]),
    st.lists(st.sampled_from(["a", "b", "7", ""]), max_size=4).map(lambda s: "/" + "/".join(s)),
    st.sampled_from([b"test", b"API.test:80"]),
)


def _unique(path: str, depth: int) -> str:
    return path.replace("{p", f"{{p{depth}").replace("{q", f"{{q{depth}")


def build(tree: list[Any], views: list[Any], *, fast_api: bool, depth: int = 0) -> list[BaseRoute]:
    found: list[BaseRoute] = []
    for number, (kind, raw, rest) in enumerate(tree):
        path = "/".join(_unique(part, depth * 10 + n) for n, part in enumerate(raw.split("/")))
        if kind == "view":

            async def view(request: Request) -> Response:
                return PlainTextResponse("ok")

            views.append(view)
            found.append(_view(path, view, rest, fast_api=fast_api))
            continue
        if kind == "socket":

            async def socket(websocket: WebSocket) -> None:
                await websocket.close()

            views.append(socket)
            found.append(WebSocketRoute(path, socket))
            continue
        inner = build(rest, views, fast_api=fast_api, depth=depth + 1)
        gzip = [Middleware(GZipMiddleware)]
        if kind == "included" and fast_api:
            outer, router = fastapi.APIRouter(), fastapi.APIRouter(routes=inner)
            outer.include_router(router, prefix=path)
            found += outer.routes
        elif kind == "host":
            found.append(Host("api.test", Router(inner)))
        elif kind == "mount's middleware":
            found.append(Mount(path, routes=inner, middleware=gzip))
        elif kind == "middleware":
            found.append(Mount(path, Starlette(routes=inner, middleware=gzip)))
        elif kind == "application":
            app = fastapi.FastAPI if fast_api else Starlette
            found.append(Mount(path, app(routes=inner)))
        else:
            found.append(Mount(path, Router(inner, redirect_slashes=number % 2 == 0)))
    return found


def _view(path: str, view: Any, methods: list[str], *, fast_api: bool) -> BaseRoute:
    if not fast_api:
        return Route(path, view, methods=methods)
    return fastapi.routing.APIRoute(path, view, methods=methods, response_model=None)


async def ask(app: Any, kind: str, method: str, path: str, host: bytes) -> Scope:
    """One request; its scope afterwards."""
    came: list[Message] = [{"type": "websocket.connect"}, {"type": "http.disconnect"}]
    if kind == "http":
        came[0] = {"type": "http.request", "body": b""}

    async def receive() -> Message:
        return came.pop(0)

    async def send(message: Message) -> None:
        pass

    scope: Scope = {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", host)],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
        "state": {},
    }
    if kind == "http":
        scope["method"] = method
    await app(scope, receive, send)
    return scope


@pytest.mark.parametrize("fast_api", [False, True], ids=["starlette", "fastapi"])
@settings(max_examples=200)
@given(tree=TREES, asked=st.lists(ASKED, min_size=1, max_size=6))
def test_the_view_is_the_one_that_the_router_picks(
    fast_api: bool, tree: list[Any], asked: list[Any]
) -> None:
    views: list[Any] = []
    found: list[Any] = []
    seen: Callable[..., Use | None] = routes.use_of_endpoint

    def noted(endpoint: object, scope: Scope) -> Use | None:
        found.append(endpoint)
        return seen(endpoint, scope)

    class Watched(SessionMiddleware):
        def check_declared(self, scope: Scope, use: Use) -> None:
            pass

    app = (fastapi.FastAPI if fast_api else Starlette)(
        routes=build(tree, views, fast_api=fast_api),
        middleware=[
            Middleware(Watched, connection_string="memory:", access="none"),
            Middleware(GZipMiddleware),
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(access, "in_use", True)
        patch.setattr(routes, "use_of_endpoint", noted)
        for request in asked:
            found.clear()
            scope = asyncio.run(ask(app, *request))
            picked = scope.get("endpoint")
            assert [e for e in found if e in views] == [picked] * (picked in views)
