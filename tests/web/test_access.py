"""`session_access`: what a view declares is what its requests are given."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastapi
import pytest
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from gridsession import Access, SettingsError
from gridsession.access import Use
from gridsession.provider.visit import Visit
from gridsession.web import access, asgi
from gridsession.web.access import declared
from gridsession.web.starlette import SessionMiddleware, session_access
from gridsession.web.types import ASGIApp, Receive, Scope, Send
from tests.provider.harness import Spy, in_loop, provider_on, stored, until
from tests.web.driver import Browser

EXCLUSIVE, READ_ONLY, NONE = map(Use, (Access.EXCLUSIVE, Access.READ_ONLY, Access.NONE))
WAITING = Use(Access.READ_ONLY, wait_for_writer=True)
ROOT = Path(__file__).parents[2]
MEMORY: dict[str, Any] = {"connection_string": "memory:"}
Given = list[Use]


@pytest.fixture(autouse=True)
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    """What each request was given, in order; nothing is declared yet in this process."""
    uses: Given = []

    class Seen(Visit):
        def __init__(self, provider: Any, session_id: Any, use: Use, holder: str) -> None:
            uses.append(use)
            super().__init__(provider, session_id, use, holder)

    monkeypatch.setattr(asgi, "Visit", Seen)
    monkeypatch.setattr(access, "in_use", False)
    return uses


async def view(request: Request) -> Response:
    return PlainTextResponse("ok")


def new_view() -> Callable[[Request], Any]:
    async def one(request: Request) -> Response:
        return PlainTextResponse("ok")

    return one


read_only, none = session_access("read_only"), session_access("none")
exclusive = session_access("exclusive")


def starlette(*routes: BaseRoute, **options: Any) -> Starlette:
    options = options if "provider" in options else MEMORY | options
    return Starlette(routes=routes, middleware=[Middleware(SessionMiddleware, **options)])


def fast_api(*routes: BaseRoute, **options: Any) -> Starlette:
    options = options if "provider" in options else MEMORY | options
    app = fastapi.FastAPI(routes=list(routes), openapi_url=None)
    app.add_middleware(SessionMiddleware, **options)
    return app


BOTH = pytest.mark.parametrize("framework", [starlette, fast_api])


def ask(app: ASGIApp, path: str, method: str = "GET", **options: Any) -> int:
    """One request, redirects not followed; its status."""
    client = TestClient(app, raise_server_exceptions=False, follow_redirects=False)
    return client.request(method, path, **options).status_code


# -- declaring -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "use"),
    [
        (("exclusive", False), EXCLUSIVE),
        (("read_only", False), READ_ONLY),
        (("read_only", True), WAITING),
        (("none", False), NONE),
        ((Access.NONE, False), NONE),
        ((Access.READ_ONLY, True), WAITING),
    ],
)
def test_a_view_is_returned_as_it_came_with_its_declaration(arguments: Any, use: Use) -> None:
    assert not access.in_use
    one = new_view()
    assert session_access(arguments[0], wait_for_writer=arguments[1])(one) is one
    assert declared(one) == use
    assert access.in_use


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("readonly", False), "access 'readonly' is unknown; use one of: exclusive, concurrent"),
        (("", False), "access '' is unknown"),
        ((None, False), "access None is unknown"),
        ((None, True), "access 'None wait_for_writer' is unknown"),
        (("exclusive", True), "wait_for_writer goes with read_only only"),
        (("none", True), "wait_for_writer goes with read_only only"),
        (("read_only", "yes"), "wait_for_writer='yes' must be True or False"),
        ((view, False), r'needs to be told which access: @session_access\("read_only"\)'),
    ],
)
def test_wrong_arguments_are_told_at_decoration(arguments: Any, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        session_access(arguments[0], wait_for_writer=arguments[1])
    assert not access.in_use


class Views:
    async def one(self, request: Request) -> Response:
        return PlainTextResponse("ok")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("/catalog", "goes on views and applications, not on '/catalog'"),
        (None, "not on None"),
        (Views().one, "Views.one cannot carry a declaration; decorate the function"),
        (len, "len cannot carry a declaration"),
        (staticmethod(view), "goes below @staticmethod: write @staticmethod above @session_access"),
        (classmethod(view), "goes below @classmethod"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_declared_is_told_at_decoration(what: Any, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        none(what)
    assert not access.in_use


def test_two_declarations_of_one_view_are_told() -> None:
    one = none(new_view())
    assert none(one) is one
    with pytest.raises(
        SettingsError, match=r"is declared none already.*session_access\(…\)\(Route"
    ):
        read_only(one)
    assert declared(one) == NONE


def test_a_declaration_is_found_behind_what_wraps_it() -> None:
    one = none(new_view())

    @functools.wraps(one)
    async def wrapper(request: Request) -> Response:
        return await one(request)  # type: ignore[no-any-return]

    assert declared(wrapper) == NONE
    assert declared(functools.partial(functools.partial(wrapper))) == NONE
    assert declared(functools.partial(read_only(functools.partial(one)))) == READ_ONLY
    del wrapper.__dict__["__gridsession_access__"]  # as a wrapper that copies no attributes
    assert declared(wrapper) == NONE
    assert declared(read_only(wrapper)) == READ_ONLY  # the outer one is nearer to the route

    class Bound:
        @exclusive
        async def one(self, request: Request) -> None: ...

    class Below(Bound):
        pass

    assert declared(Below().one) == EXCLUSIVE
    assert declared(none(Below)) == declared(Below()) == NONE
    assert declared(Bound()) is declared(view) is declared(None) is None


@BOTH
def test_a_callable_object_is_declared_at_its_call(
    framework: Callable[..., Starlette], given: Given
) -> None:
    class Page:
        @none
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await PlainTextResponse("ok")(scope, receive, send)

    @read_only
    class Below(Page):
        pass

    assert ask(framework(Route("/", Page())), "/") == 200
    assert ask(framework(Route("/", functools.partial(Below()))), "/") == 200
    assert given == [NONE, READ_ONLY]
    assert declared(Page) is None  # calling it makes one, and answers nothing


def test_wrappers_in_a_circle_end() -> None:
    one = new_view()
    one.__wrapped__ = one  # type: ignore[attr-defined]
    assert declared(one) is None


# -- what requests are given -----------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("decorate", [read_only, none, exclusive])
def test_the_view_wins_over_rules_and_the_default(
    framework: Callable[..., Starlette], decorate: Callable[[Any], Any], given: Given
) -> None:
    one = decorate(new_view())
    for options in ({}, {"access": "none"}, {"access": {"/a": "none", "*": "read_only"}}):
        assert ask(framework(Route("/a", one), Route("/b", view), **options), "/a") == 200
        assert given.pop() == declared(one)


@BOTH
def test_rules_speak_for_what_declares_nothing(
    framework: Callable[..., Starlette], given: Given
) -> None:
    rules = {"GET /b": "read_only wait_for_writer", "/b": "none"}
    app = framework(
        Route("/a", none(new_view())), Route("/b", view, methods=["GET", "PUT"]), access=rules
    )
    requests = (("/b", "GET"), ("/b", "PUT"), ("/c", "GET"), ("/a", "GET"))
    assert [ask(app, *request) for request in requests] == [200, 200, 404, 200]
    assert given == [WAITING, NONE, EXCLUSIVE, NONE]


@BOTH
@in_loop
async def test_what_declared_views_cost_the_grid(
    grid: Spy, framework: Callable[..., Starlette]
) -> None:
    async def use(request: Request) -> Response:
        session = request.scope["session"]
        return PlainTextResponse(f"{session.access} {session.get('n')}")

    waits = session_access("read_only", wait_for_writer=True)
    async with provider_on(grid, access="none") as provider:
        app = framework(
            Route("/exclusive", exclusive(functools.partial(use))),
            Route("/read_only", read_only(functools.partial(use))),
            Route("/waits", waits(functools.partial(use))),
            Route("/none", none(new_view())),
            Route("/undeclared", new_view()),
            provider=provider,
        )
        browser = Browser(app, provider)
        browser.cookie = await stored(provider, n=1)
        for path, body, calls in (
            ("/exclusive", b"exclusive 1", ["acquire", "release"]),
            ("/read_only", b"read_only 1", ["read"]),
            ("/waits", b"read_only 1", ["read"]),
            ("/none", b"ok", []),
            ("/undeclared", b"ok", []),
        ):
            grid.calls.clear()
            answer = await browser.ask(path=path)
            assert (answer.status, answer.body) == (200, body)
            assert grid.asked == calls


@in_loop
async def test_wait_for_writer_waits_for_the_writer(grid: Spy) -> None:
    @session_access("read_only", wait_for_writer=True)
    async def use(request: Request) -> Response:
        return PlainTextResponse(str(request.session["n"]))

    async with provider_on(grid) as provider:
        browser = Browser(starlette(Route("/", use), provider=provider), provider)
        browser.cookie = await stored(provider, n=1)
        async with provider.open(browser.cookie) as session:
            reading = browser.start()
            await until(lambda: "wait" in grid.calls)
            session["n"] = 2
        assert (await reading.answered()).body == b"2"


@BOTH
def test_methods_of_an_endpoint_class(framework: Callable[..., Starlette], given: Given) -> None:
    @read_only
    class Cart(HTTPEndpoint):
        async def get(self, request: Request) -> Response:
            return PlainTextResponse("ok")

        @exclusive
        async def post(self, request: Request) -> Response:
            return PlainTextResponse("ok")

        @none
        def head(self, request: Request) -> Response:
            return PlainTextResponse("ok")

    class Page(HTTPEndpoint):
        @none
        async def get(self, request: Request) -> Response:
            return PlainTextResponse("ok")

        async def put(self, request: Request) -> Response:
            return PlainTextResponse("ok")

    app = framework(Route("/cart", Cart), Route("/page", Page), access="read_only")
    for path, method, status, use in (
        ("/cart", "GET", 200, READ_ONLY),
        ("/cart", "POST", 200, EXCLUSIVE),
        ("/cart", "HEAD", 200, NONE),
        ("/cart", "DELETE", 405, READ_ONLY),
        ("/page", "GET", 200, NONE),
        ("/page", "HEAD", 200, NONE),
        ("/page", "PUT", 200, READ_ONLY),
        ("/page", "PURGE", 405, READ_ONLY),
    ):
        assert ask(app, path, method) == status
        assert given.pop() == use, (path, method)


def test_decorators_of_others_above_and_below(given: Given) -> None:
    class Everybody(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: Any) -> Response:
            request.scope["auth"] = type("Auth", (), {"scopes": ["in"]})
            response: Response = await call_next(request)
            return response

    app = Starlette(
        routes=[
            Route("/above", none(requires("in")(new_view()))),
            Route("/below", requires("in")(none(new_view()))),
        ],
        middleware=[
            Middleware(SessionMiddleware, **MEMORY),
            Middleware(Everybody),
            Middleware(GZipMiddleware),
        ],
    )
    assert [ask(app, path) for path in ("/above", "/below")] == [200, 200]
    assert given == [NONE, NONE]


def test_fastapis_decorators_above_and_below(given: Given) -> None:
    app = fastapi.FastAPI()
    app.add_middleware(SessionMiddleware, **MEMORY)

    @app.get("/above/{n}")
    @session_access("none")
    async def above(n: int) -> int:
        return n

    @session_access("read_only")
    @app.get("/below")
    @app.post("/below")
    def below() -> str:
        return "ok"

    @app.delete("/below")
    async def undeclared() -> str:
        return "ok"

    requests = (("/above/1", "GET"), ("/below", "POST"), ("/below", "GET"), ("/below", "DELETE"))
    assert [ask(app, *request) for request in requests] == [200] * 4
    assert given == [NONE, READ_ONLY, READ_ONLY, EXCLUSIVE]


# -- routers and applications ------------------------------------------------------------------


@BOTH
def test_the_innermost_declaration_wins(
    framework: Callable[..., Starlette], given: Given, tmp_path: Any
) -> None:
    (tmp_path / "a.css").touch()
    inner = Starlette(
        routes=[
            Route("/own", exclusive(new_view())),
            Route("/routes", new_view()),
            Mount("/deep", Router([Route("/", view), Route("/own", none(new_view()))])),
            none(Mount("/mount", routes=[Route("/", view)])),
            none(Route("/route", view)),
        ],
        middleware=[Middleware(GZipMiddleware)],
    )
    app = framework(
        Mount("/shop", read_only(inner)),
        Mount("/static", none(StaticFiles(directory=tmp_path))),
        Mount("/router", read_only(Router([Route("/", view)]))),
        Mount("/wrapped", routes=[Route("/", none(new_view()))], middleware=[_gzip]),
        Mount("/hidden", read_only(Router([Route("/", view)])), middleware=[_hiding]),
        Host("api.test", read_only(Router([Route("/", view)]))),
        Route("/", view),
        access={"/*": "read_only wait_for_writer"},
    )
    for path, status, use in (
        ("/shop/own", 200, EXCLUSIVE),
        ("/shop/routes", 200, READ_ONLY),
        ("/shop/deep/", 200, READ_ONLY),
        ("/shop/deep/own", 200, NONE),
        ("/shop/mount/", 200, NONE),
        ("/shop/route", 200, NONE),
        ("/shop/nowhere", 404, READ_ONLY),
        ("/shop/own/", 307, READ_ONLY),
        ("/static/a.css", 200, NONE),
        ("/static/b.css", 404, NONE),
        ("/router/", 200, READ_ONLY),
        ("/wrapped/", 200, NONE),
        ("/hidden/", 200, READ_ONLY),
        ("/", 200, WAITING),
        ("/nowhere", 404, WAITING),
    ):
        assert ask(app, path) == status, path
        assert given.pop() == use, path
    assert ask(app, "/", headers={"host": "api.test:80"}) == 200
    assert given.pop() == READ_ONLY


class _Hiding:
    """Middleware that does not show what it wraps."""

    def __init__(self, app: ASGIApp) -> None:
        self._wrapped = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._wrapped(scope, receive, send)


_gzip, _hiding = Middleware(GZipMiddleware), Middleware(_Hiding)


def test_routers_that_fastapi_includes(given: Given) -> None:
    catalog = fastapi.APIRouter(prefix="/catalog")
    deep = fastapi.APIRouter()
    plain = fastapi.APIRouter(prefix="/plain")
    app = fastapi.FastAPI(openapi_url=None)
    app.add_middleware(SessionMiddleware, access={"/other*": "none"}, **MEMORY)

    @catalog.get("/{sku}")
    async def article(sku: str) -> str:
        return sku

    @catalog.post("/{sku}/review")
    @session_access("exclusive")
    async def review(sku: str) -> str:
        return sku

    @plain.get("/")
    @session_access("none")
    async def one() -> str:
        return "ok"

    @deep.get("/deep/{n:int}")
    async def two(n: int) -> str:
        return "ok"

    @deep.websocket("/socket")
    async def socket(ws: WebSocket) -> None:
        await ws.accept()
        await ws.close()

    catalog.mount("/files", none(Router([Route("/", view)])))
    deep.routes.append(Host("api.test", none(Router([Route("/", view)]))))
    catalog.include_router(deep, prefix="/in")
    app.include_router(read_only(catalog), prefix="/v1")
    app.include_router(plain)
    app.include_router(catalog, prefix="/other")
    sub = fastapi.FastAPI(routes=[Route("/", none(new_view()))], openapi_url=None)
    sub.root_path = "/else"  # a deprecated option
    app.mount("/sub", read_only(sub))

    @catalog.get("/later/on")
    async def later() -> str:
        return "ok"

    for path, method, status, use in (
        ("/v1/catalog/tea", "GET", 200, READ_ONLY),
        ("/v1/catalog/tea", "PUT", 405, READ_ONLY),
        ("/v1/catalog/tea/review", "POST", 200, EXCLUSIVE),
        ("/v1/catalog/in/deep/5", "GET", 200, READ_ONLY),
        ("/v1/catalog/later/on", "GET", 200, READ_ONLY),
        ("/v1/files/", "GET", 200, NONE),
        ("/other/catalog/tea", "GET", 200, READ_ONLY),
        ("/other/catalog/tea/review", "POST", 200, EXCLUSIVE),
        ("/other/nowhere", "GET", 404, NONE),
        ("/plain/", "GET", 200, NONE),
        ("/plain", "GET", 307, EXCLUSIVE),
        ("/v1/nowhere", "GET", 404, EXCLUSIVE),
        ("/v1/catalog/in/deep/x", "GET", 404, EXCLUSIVE),
        ("/sub/", "GET", 404, READ_ONLY),  # it takes itself to be at /else
    ):
        assert ask(app, path, method) == status, path
        assert given.pop() == use, (path, method)
    at_host = {"host": "api.test"}
    assert [ask(app, f"/v1{p}/in/", headers=at_host) for p in ("/catalog", "")] == [200, 404]
    assert given == [NONE, READ_ONLY]
    given.clear()
    with TestClient(app).websocket_connect("/v1/catalog/in/socket"):
        assert given == [READ_ONLY]


def test_the_application_that_has_the_middleware(given: Given) -> None:
    app = none(
        starlette(Route("/", view), Route("/own", exclusive(new_view())), access="read_only")
    )
    outer = Starlette(routes=[Mount("/app", app)])
    assert [ask(app, "/"), ask(app, "/own"), ask(outer, "/app/own")] == [200] * 3
    assert given == [NONE, EXCLUSIVE, EXCLUSIVE]


@pytest.mark.parametrize("root_path", ["", "/prefix"])
def test_middleware_of_every_place(root_path: str, given: Given) -> None:
    session = Middleware(SessionMiddleware, **MEMORY)
    routes = [Route("/none", none(new_view())), Route("/", view)]
    app = Starlette(
        routes=[
            Mount("/mount", routes=routes, middleware=[session]),
            Mount("/app", Starlette(routes=routes), middleware=[session]),
            Mount("/its", Starlette(routes=routes, middleware=[session, _hiding])),
            Mount("/router", Router(routes, middleware=[session])),
            Mount("/around", SessionMiddleware(Starlette(routes=routes), **MEMORY)),
            Mount("/files", read_only(StaticFiles(directory=".")), middleware=[session]),
            Route("/route", none(new_view()), middleware=[session]),
            Route("/undeclared", view, middleware=[session]),
        ]
    )
    for path, use in (
        ("/mount/none", NONE),
        ("/mount/", EXCLUSIVE),
        ("/app/none", NONE),
        ("/its/none", NONE),
        ("/its/", EXCLUSIVE),
        ("/router/none", NONE),
        ("/around/none", NONE),
        ("/files/pyproject.toml", READ_ONLY),
        ("/route", NONE),
        ("/undeclared", EXCLUSIVE),
    ):
        client = TestClient(app, root_path=root_path)
        assert client.get(root_path + path).status_code == 200, path
        assert given.pop() == use, path


def test_what_a_router_hands_over_to(given: Given) -> None:
    files = none(StaticFiles(directory="."))
    sub = Router([Route("/sub", read_only(new_view()))], default=files)
    app = Starlette(middleware=[Middleware(SessionMiddleware, **MEMORY)])
    app.router.routes.append(Route("/a/", view))
    app.router.default = sub
    for path, status, use in (
        ("/a/", 200, EXCLUSIVE),
        ("/a", 307, EXCLUSIVE),
        ("/sub", 200, READ_ONLY),
        ("/pyproject.toml", 200, NONE),
        ("/", 404, NONE),
    ):
        assert ask(app, path) == status, path
        assert given.pop() == use, path


def test_frontends_come_before_what_a_router_hands_over_to(given: Given) -> None:
    app = fastapi.FastAPI(openapi_url=None)
    app.add_middleware(SessionMiddleware, **MEMORY)
    app.frontend("/ui", directory=ROOT / "docs")
    app.router.default = none(Router([Route("/z", view)]))
    assert [ask(app, path) for path in ("/ui/access.md", "/z")] == [200, 200]
    assert given == [EXCLUSIVE, NONE]


# -- sessions inside of sessions ---------------------------------------------------------------


OWN = MEMORY | {"session_cookie": "inner"}
_inner = Middleware(SessionMiddleware, **OWN)


def test_the_outer_one_sees_nothing_inside_of_the_inner_one(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    routes = [Route("/", none(new_view()))]
    app = starlette(
        Mount("/around", SessionMiddleware(Starlette(routes=routes), **OWN)),
        Mount("/hidden", SessionMiddleware(hiding(Starlette(routes=routes)), **OWN)),
        Mount("/its", Starlette(routes=routes, middleware=[_gzip, _inner])),
        Mount("/wrapped", GZipMiddleware(Starlette(routes=routes, middleware=[_inner]))),
        Mount("/router", Router(routes, middleware=[_gzip, _inner])),
        Mount("/mount", routes=routes, middleware=[_gzip, _inner]),
        Mount("/plain", asgi.SessionMiddleware(Starlette(routes=routes), **OWN)),
        Route("/route", none(new_view()), middleware=[_gzip, _inner]),
        access={"/route": "read_only wait_for_writer", "*": "read_only"},
    )
    for path, outer, inner in (
        ("/around/", READ_ONLY, NONE),
        ("/hidden/", READ_ONLY, EXCLUSIVE),
        ("/its/", READ_ONLY, NONE),
        ("/wrapped/", READ_ONLY, NONE),
        ("/router/", READ_ONLY, NONE),
        ("/mount/", READ_ONLY, NONE),
        ("/plain/", READ_ONLY, EXCLUSIVE),
        ("/route", WAITING, NONE),
    ):
        assert ask(app, path) == 200
        assert given == [outer, inner], path
        given.clear()
        assert len(warnings(caplog)) == (path == "/hidden/")  # the inner one's own
        caplog.clear()


def test_what_leads_to_the_inner_one_counts_for_the_outer_one(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Starlette(routes=[Route("/", exclusive(new_view()))], middleware=[_inner])
    app = starlette(
        none(Mount("/mount", inner)),
        Mount("/app", none(Starlette(routes=inner.routes, middleware=[_inner]))),
        none(Route("/route", exclusive(new_view()), middleware=[_inner])),
        Mount("/router", read_only(Router(inner.routes, middleware=[_inner]))),
    )
    for path, outer in (
        ("/mount/", NONE),
        ("/app/", NONE),
        ("/route", NONE),
        ("/router/", READ_ONLY),
    ):
        assert ask(app, path) == 200
        assert given == [outer, EXCLUSIVE], path
        given.clear()
    assert ask(SessionMiddleware(inner, access="read_only", **MEMORY), "/") == 200
    assert given == [READ_ONLY, EXCLUSIVE]
    assert warnings(caplog) == []


def test_the_inner_one_asks_no_router_further_out(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    sub = SessionMiddleware(hiding(Starlette(routes=[Route("/x", view)])), **OWN)
    app = starlette(
        Route("/x", none(new_view())),
        Mount(
            "/m",
            routes=[
                Route("/x", view, middleware=[_inner]),
                Route("/y", read_only(new_view()), middleware=[_inner]),
            ],
        ),
        Mount("/sub", sub),
        Route("/y", none(new_view())),
    )
    for path, inner in (("/m/x", EXCLUSIVE), ("/m/y", READ_ONLY), ("/sub/x", EXCLUSIVE)):
        assert ask(app, path) == 200
        assert given == [EXCLUSIVE, inner], path
        given.clear()
    assert warnings(caplog) == []


def test_what_carries_the_middleware_is_heeded(given: Given) -> None:
    session = Middleware(SessionMiddleware, **MEMORY)
    routes = [
        none(Route("/route", view, middleware=[session])),
        none(Route("/view", read_only(new_view()), middleware=[session])),
        read_only(Mount("/mount", routes=[Route("/", view)], middleware=[session])),
        Mount("/router", none(Router([Route("/", view, middleware=[session])]))),
        none(Mount("/app", read_only(Starlette(routes=[Route("/", view)], middleware=[session])))),
    ]
    app = exclusive(Starlette(routes=routes))
    for path, use in (
        ("/route", NONE),
        ("/view", READ_ONLY),
        ("/mount/", READ_ONLY),
        ("/router/", EXCLUSIVE),  # the router is further out
        ("/app/", READ_ONLY),
    ):
        assert ask(app, path) == 200
        assert given.pop() == use, path


# -- WebSockets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declare", "use"),
    [
        (none, NONE),
        (read_only, READ_ONLY),
        (exclusive, READ_ONLY),
        (session_access("read_only", wait_for_writer=True), WAITING),
        (lambda one: one, NONE),
    ],
)
@BOTH
def test_websockets(
    framework: Callable[..., Starlette], declare: Callable[[Any], Any], use: Use, given: Given
) -> None:
    async def talk(ws: WebSocket) -> None:
        await ws.accept()
        await ws.close()

    class Talk(WebSocketEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await talk(websocket)

    app = framework(
        WebSocketRoute("/f", declare(talk)),
        WebSocketRoute("/c", declare(Talk)),
        Route("/f", exclusive(new_view())),
        access="none",
    )
    for path in ("/f", "/c"):
        with TestClient(app).websocket_connect(path):
            assert given == [use]
        given.clear()


# -- the match ---------------------------------------------------------------------------------


class Counting(Route):
    """Notes how often it is asked whether it matches."""

    asked = 0

    def matches(self, scope: Any) -> Any:
        self.asked += 1
        return super().matches(scope)


@BOTH
def test_routes_are_asked_once_more_and_only_where_something_is_declared(
    framework: Callable[..., Starlette], given: Given
) -> None:
    route = Counting("/a", new_view())
    app = framework(route)
    assert ask(app, "/a") == 200
    assert route.asked == 1
    app.router.routes.append(Route("/b", none(new_view())))
    assert [ask(app, "/a"), ask(app, "/b")] == [200, 200]
    assert route.asked == 5
    assert given == [EXCLUSIVE, EXCLUSIVE, NONE]


def test_the_match_leaves_the_scope_as_it_was() -> None:
    before: list[Any] = []
    after: list[Any] = []

    class Watched(SessionMiddleware):
        def declared_use(self, scope: Scope) -> Use | None:
            before.append({**scope, "headers": list(scope["headers"])})
            use = super().declared_use(scope)
            after.append(dict(scope))
            return use

    included = fastapi.APIRouter()
    included.get("/a/{n}")(none(lambda n: n))
    app = fastapi.FastAPI()
    app.add_middleware(Watched, **MEMORY)
    app.include_router(included, prefix="/in")
    app.mount("/sub", sub := fastapi.FastAPI())
    sub.root_path = "/else"
    assert [ask(app, "/in/a/1"), ask(app, "/sub/")] == [200, 404]
    assert before == after


# -- where it cannot be known ------------------------------------------------------------------


def hiding(app: ASGIApp) -> ASGIApp:
    """Middleware that is a function."""

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    return inner


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert all(r.name == "gridsession" for r in caplog.records if r.levelno >= logging.WARNING)
    return [text for text in found if "memory:// keeps" not in text]


def test_behind_middleware_that_hides_the_router_the_application_shows_it(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    app = Starlette(
        routes=[Route("/", none(new_view()))],
        middleware=[Middleware(SessionMiddleware, **MEMORY), Middleware(hiding)],
    )
    assert ask(app, "/") == 200
    made = Starlette(
        routes=[Route("/", none(new_view()))],
        middleware=[Middleware(lambda app: SessionMiddleware(hiding(app), **MEMORY))],
    )
    assert ask(made, "/") == 200
    assert given == [NONE, NONE]
    assert warnings(caplog) == []


def test_where_the_router_is_hidden_rules_decide_and_one_warning_says_so(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Starlette(routes=[Route("/", none(new_view()))])
    app = SessionMiddleware(hiding(inner), access="read_only", **MEMORY)
    assert [ask(app, "/"), ask(app, "/")] == [200, 200]
    assert given == [READ_ONLY, READ_ONLY]
    (text,) = warnings(caplog)
    assert "which view a request will reach cannot be known" in text
    assert "Middleware hides the router" in text


def test_a_route_that_fails_to_match_fails_in_the_application(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Route):
        def matches(self, scope: Any) -> Any:
            raise ZeroDivisionError

    async def sorry(request: Request, error: Exception) -> Response:
        return PlainTextResponse("sorry", 418)

    app = starlette(Failing("/", none(new_view())), access="read_only")
    app.add_exception_handler(ZeroDivisionError, sorry)
    assert [ask(app, "/"), ask(app, "/")] == [418, 418]
    assert given == [READ_ONLY, READ_ONLY]
    assert warnings(caplog) == [
        "a route failed to match (ZeroDivisionError); access went by path rules"
    ]
    assert all(record.exc_info is None for record in caplog.records)


class Moving:
    """Middleware that changes the path."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "path" in scope:
            scope["path"] = scope["path"].removeprefix("/v1")
        await self.app(scope, receive, send)


def moved(*routes: BaseRoute, **options: Any) -> Starlette:
    """An application whose middleware moves requests to another view than was found for them."""
    app = starlette(*routes, **options)
    app.user_middleware.append(Middleware(Moving))
    return app


def test_no_stranger_silences_a_warning(given: Given, caplog: pytest.LogCaptureFixture) -> None:
    app = moved(Route("/item/{n:int}", view), Route("/a", none(new_view())))
    assert ask(app, "/item/" + "9" * 5000) == 500
    assert ask(app, "/v1/a") == 200
    first, second = warnings(caplog)
    assert "a route failed to match (ValueError)" in first
    assert "was run with 'exclusive'" in second


def test_a_missed_declaration_is_told_where_the_view_fails_of_it(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    @exclusive
    async def writes(request: Request) -> Response:
        request.session["n"] = 1
        return PlainTextResponse("ok")

    assert ask(moved(Route("/a", writes), access="none"), "/v1/a") == 500
    (text,) = warnings(caplog)
    assert "writes declares session_access 'exclusive' and was run with 'none'" in text


def test_a_missed_declaration_of_a_websocket_is_told(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(ws: WebSocket) -> None:
        await ws.accept()
        await ws.close()

    async def fails(ws: WebSocket) -> None:
        raise ZeroDivisionError

    client = TestClient(moved(WebSocketRoute("/a", exclusive(functools.partial(talk)))))
    with client.websocket_connect("/v1/a"):
        pass
    assert given == [READ_ONLY]  # which is what exclusive is there
    assert warnings(caplog) == []
    for view in (talk, fails):
        client = TestClient(moved(WebSocketRoute("/a", none(view))))
        with contextlib.suppress(ZeroDivisionError), client.websocket_connect("/v1/a"):
            pass
        (text,) = warnings(caplog)
        assert "declares session_access 'none' and was run with 'read_only'" in text
        caplog.clear()


def test_a_mounts_application_is_no_view(given: Given, caplog: pytest.LogCaptureFixture) -> None:
    async def default(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    router = Router([Route("/q", view)], default=read_only(default))
    app = starlette(Mount("/m", none(router)), Host("api.test", none(router)))
    assert ask(app, "/m/else") == ask(app, "/", headers={"host": "api.test"}) == 200
    assert given == [READ_ONLY, READ_ONLY]
    assert warnings(caplog) == []


@pytest.mark.parametrize("kind", ["path", "hidden"])
def test_a_view_that_was_run_with_another_access_is_named_once(
    kind: str, given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    one = read_only(new_view())
    one.__qualname__ = "catalog"
    if kind == "path":
        app = moved(Route("/a", one), Route("/b", none(new_view())))
        path = "/v1/a"
    else:
        app = starlette(Mount("/v1", hiding(Starlette(routes=[Route("/a", one)]))))
        path = "/v1/a"
    assert [ask(app, path), ask(app, path)] == [200, 200]
    assert given == [EXCLUSIVE, EXCLUSIVE]
    (text,) = warnings(caplog)
    assert "the view catalog declares session_access 'read_only' and was run with" in text
    assert "'exclusive'" in text
    if kind == "path":
        assert [ask(app, "/v1/nowhere"), ask(app, "/b")] == [404, 200]
        assert given[2:] == [EXCLUSIVE, NONE]


def test_any_other_middleware_heeds_no_declaration(given: Given) -> None:
    inner = Starlette(routes=[Route("/", none(new_view()))])
    assert ask(asgi.SessionMiddleware(inner, **MEMORY), "/") == 200
    assert given == [EXCLUSIVE]


# -- the page about it -------------------------------------------------------------------------


def blocks() -> list[dict[str, Any]]:
    """What each block of the page's code defines."""
    page = (ROOT / "docs" / "access.md").read_text(encoding="utf-8")
    found = []
    for source in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        names: dict[str, Any] = {"__name__": "shop"}
        exec(compile(source, "docs/access.md", "exec"), names)
        found.append(names)
    return found


def test_the_pages_starlette(given: Given) -> None:
    client = TestClient(blocks()[0]["app"])
    for method, path, text, use in (
        ("GET", "/catalog", '{"seen":0}', READ_ONLY),
        ("GET", "/health", "ok", NONE),
        ("POST", "/cart", "added", EXCLUSIVE),
        ("GET", "/cart", '["tea"]', WAITING),
    ):
        assert client.request(method, path).text == text
        assert given.pop() == use


def test_the_pages_fastapi(given: Given) -> None:
    client = TestClient(blocks()[1]["app"])
    with client.websocket_connect("/chat") as chat:
        assert given.pop(0) == READ_ONLY
        headers: Any = chat.extra_headers
        (cookie,) = [value for name, value in headers if name == b"set-cookie"]
        client.cookies["session"] = cookie.decode().partition("=")[2].partition(";")[0]
    given.clear()
    assert client.get("/catalog").text == "1"
    with client.websocket_connect("/ticker") as ticker:
        assert ticker.receive_text() == "42"
    assert given == [READ_ONLY, NONE]


def test_the_pages_routers(given: Given) -> None:
    client = TestClient(blocks()[2]["app"])
    for method, path, text, use in (
        ("GET", "/catalog/tea", '"tea for None"', READ_ONLY),
        ("POST", "/catalog/tea/review", "null", EXCLUSIVE),
        ("GET", "/static/nothing.css", '{"detail":"Not Found"}', NONE),
        ("GET", "/internal/load", "0.5", NONE),
        ("POST", "/cart?sku=tea", "null", EXCLUSIVE),
        ("GET", "/cart", '{"detail":"Method Not Allowed"}', READ_ONLY),
    ):
        assert client.request(method, path).text == text
        assert given.pop() == use
