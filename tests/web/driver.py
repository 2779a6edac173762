"""A browser, a server and an application, for any framework: one suite asks them all.

An adapter joins the suite by an entry in `FRAMEWORKS`, and passes when `pytest tests/web -k NAME`
does: the life cycle of a session, cookies, access, errors, clients that go, streams, tasks beside
the response, many requests at once, hostile ones, and each of them cancelled at any await. The
entry is a function of one handler and of the options of the adapter's middleware; it returns an
ASGI application

- that installs the middleware the way that users of the framework do, with all of the options, of
  which `provider` is always one or they are `SessionOptions`, and serves its lifespan;
- that calls the handler for every path and each of `METHODS`, with the session as the framework
  shows it to its users, the path as it came, and the request's whole body;
- that answers with the `Reply`: its status, headers and body, or its chunks one by one, and then
  runs its background work, by the framework's own means;
- out of which the handler's exceptions leave, as uncaught ones leave the framework.

What a framework has of its own (parameters, decorators, WebSockets) is tested beside the suite, in
files that are not parametrised by `FRAMEWORKS`. One that speaks no ASGI needs a bridge here that
does: `Browser` knows nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import fastapi
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from gridsession import Session, SessionProvider, SessionSettings
from gridsession.grids import Grid
from gridsession.web.asgi import SessionMiddleware
from gridsession.web.starlette import session_of
from gridsession.web.types import ASGIApp, Message, Receive, Scope, Send
from tests.provider.harness import NO_SWEEP

METHODS = ["GET", "HEAD", "POST", "PUT", "OPTIONS"]


@dataclass
class Asked:
    """One request, as a handler of these tests sees it."""

    session_of: Callable[[], Session]
    path: str
    body: Callable[[], Awaitable[bytes]]

    @property
    def session(self) -> Session:
        return self.session_of()


@dataclass
class Reply:
    """What a handler answers."""

    body: bytes = b"ok"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    chunks: Callable[[], AsyncIterator[bytes]] | None = None
    background: Callable[[], Awaitable[None]] | None = None


Handler = Callable[[Asked], Awaitable[Reply]]


def plain(handler: Handler, **options: Any) -> ASGIApp:
    """An application without framework."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return

        async def body() -> bytes:
            whole = bytearray()
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionError("the client is gone")
                whole += message.get("body", b"")
                if not message.get("more_body"):
                    return bytes(whole)

        reply = await handler(Asked(lambda: scope["session"], scope["path"], body))
        headers = [(k.encode(), v.encode()) for k, v in reply.headers.items()]
        start = {"type": "http.response.start", "status": reply.status, "headers": headers}
        await send(start)
        if reply.chunks is not None:
            async for chunk in reply.chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            reply.body = b""
        await send({"type": "http.response.body", "body": reply.body})
        if reply.background is not None:
            await reply.background()

    return SessionMiddleware(app, **options)


async def _lifespan(receive: Receive, send: Send) -> None:
    for phase in ("startup", "shutdown"):
        assert (await receive())["type"] == f"lifespan.{phase}"
        await send({"type": f"lifespan.{phase}.complete"})


def _response(reply: Reply) -> Response:
    background = None if reply.background is None else BackgroundTask(reply.background)
    if reply.chunks is not None:
        return StreamingResponse(reply.chunks(), reply.status, reply.headers, None, background)
    return Response(reply.body, reply.status, reply.headers, None, background)


def starlette(handler: Handler, **options: Any) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        session = functools.partial(getattr, request, "session")
        return _response(await handler(Asked(session, request.url.path, request.body)))

    return Starlette(
        routes=[Route("/{path:path}", endpoint, methods=METHODS)],
        middleware=[Middleware(SessionMiddleware, **options)],
    )


def fast_api(handler: Handler, **options: Any) -> ASGIApp:
    app = fastapi.FastAPI(openapi_url=None)
    app.add_middleware(SessionMiddleware, **options)

    @app.api_route("/{path:path}", methods=METHODS)
    async def endpoint(request: Request) -> Response:
        session = functools.partial(session_of, request)
        return _response(await handler(Asked(session, request.url.path, request.body)))

    return app


FRAMEWORKS: dict[str, Callable[..., ASGIApp]] = {
    "asgi": plain,
    "starlette": starlette,
    "fastapi": fast_api,
}


# -- the other side -----------------------------------------------------------------------------


class Exchange:
    """One request at an application, and what came back.

    Attributes:
        sent: the messages that the application sent.
        error: what left the application, if something did.
    """

    def __init__(self, app: ASGIApp, scope: Scope, body: Iterable[bytes] | None) -> None:
        self.sent: list[Message] = []
        self.error: BaseException | None = None
        self.received = 0
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        if body is not None:
            chunks = list(body) or [b""]
            for number, chunk in enumerate(chunks, 1):
                self.upload(chunk, more=number < len(chunks))
        self.task = asyncio.create_task(self._run(app, scope))

    def upload(self, chunk: bytes, *, more: bool) -> None:
        self._incoming.put_nowait({"type": "http.request", "body": chunk, "more_body": more})

    def leave(self) -> None:
        """The client goes away."""
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def _receive(self) -> Message:
        message = await self._incoming.get()
        self.received += 1
        return message

    async def _send(self, message: Message) -> None:
        self.sent.append(dict(message))

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:
            self.error = error

    async def answered(self) -> Exchange:
        """Wait until the application has returned."""
        await self.task
        return self

    @property
    def status(self) -> int:
        starts = [m["status"] for m in self.sent if m["type"] == "http.response.start"]
        assert len(starts) == 1, self.sent
        return int(starts[0])

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)

    def header(self, name: str) -> list[str]:
        wanted = name.lower().encode()
        return [
            value.decode()
            for message in self.sent
            for key, value in message.get("headers", ())
            if key.lower() == wanted
        ]

    @property
    def set_cookie(self) -> str | None:
        found = self.header("set-cookie")
        assert len(found) <= 1
        return found[0] if found else None


class Browser:
    """Keeps one cookie and asks an application.

    Attributes:
        cookie: the value that is sent, or None.
        name: the cookie's name.
    """

    def __init__(self, app: ASGIApp, provider: SessionProvider, name: str = "session") -> None:
        self.app = app
        self.provider = provider
        self.cookie: str | None = None
        self.name = name

    def start(
        self,
        method: str = "GET",
        path: str = "/",
        *,
        body: Iterable[bytes] | None = (),
        headers: Iterable[tuple[bytes, bytes]] = (),
        root_path: str = "",
    ) -> Exchange:
        """Begin a request, and let it run."""
        raw = [(b"host", b"test"), *headers]
        if self.cookie is not None:
            raw.append((b"cookie", f"{self.name}={self.cookie}".encode()))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": root_path,
            "headers": raw,
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
            "state": {},
        }
        return Exchange(self.app, scope, body)

    async def ask(self, method: str = "GET", path: str = "/", **options: Any) -> Exchange:
        """A whole request; its cookie is kept as a browser keeps it."""
        exchange = await self.start(method, path, **options).answered()
        if (line := exchange.set_cookie) is not None:
            name, _, rest = line.partition("=")
            assert name == self.name
            value = rest.partition(";")[0]
            self.cookie = None if "Max-Age=0" in line else value
        return exchange


@contextlib.asynccontextmanager
async def browsing(
    framework: str, handler: Handler, grid: Grid, **options: Any
) -> AsyncIterator[Browser]:
    """A browser at an application with sessions."""
    settings = SessionSettings(**NO_SWEEP | options)
    async with SessionProvider(settings, grid=grid) as provider:
        app = FRAMEWORKS[framework](handler, provider=provider)
        yield Browser(app, provider, settings.cookie_name)


async def start_of_lifespan(app: ASGIApp) -> tuple[Message, Callable[[], Awaitable[None]]]:
    """Start an application as a server does: its answer, and how to stop it again."""
    incoming: asyncio.Queue[Message] = asyncio.Queue()
    outgoing: asyncio.Queue[Message] = asyncio.Queue()
    incoming.put_nowait({"type": "lifespan.startup"})
    scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    running = asyncio.ensure_future(app(scope, incoming.get, outgoing.put))
    answer = await outgoing.get()

    async def stop() -> None:
        incoming.put_nowait({"type": "lifespan.shutdown"})
        await running

    return answer, stop
