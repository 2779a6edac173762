"""The applications under load: one handler, under each kind of session.

`uvicorn --factory benchmarks.apps:make`, with `BENCH_APP` saying which and `BENCH_GRID` where
sessions lie: a connection string. aiohttp's, which has a server of its own, is in `aiohttp_app`.

Paths: `/new?size=KIB` stores a session; `/count` adds one to a number in it; `/change` changes one
of its larger values in place; `/read` reads the number, `/value` answers it; `/hold?seconds=S` is
`/count` that takes its time; `/plain` leaves the session alone. `queue` and `shared`, at the end,
have paths of their own.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from gridsession.grids import make_grid
from gridsession.grids.contract import (
    Busy,
    Claim,
    Granted,
    Grid,
    Missing,
    QueueFull,
    Replaced,
    Version,
)
from gridsession.provider import SessionProvider
from gridsession.settings import SessionSettings
from gridsession.web.starlette import SessionMiddleware as GridSessions

SessionMiddleware: Any = GridSessions  # mypy cannot match a ParamSpec with `app` and **options
DAY = 86_400.0  # seconds; nothing expires while it is measured
HANDLER_SECONDS = 0.005
KINDS = (
    *("bare", "ours", "read_only", "counted", "queue", "shared"),
    *("hit", "asked", "uncached"),
    *("starsessions", "starsessions_redis", "cookie", "litestar", "litestar_redis"),
)
NAMESPACE = "benchmark"


def contents(kib: int) -> dict[str, Any]:
    """A session of about so many KiB: a number, and values as shops keep them.

    1 KiB is in 13 keys and their number; more is in keys of 2 KiB each.
    """
    keys, lines = (13, 1) if kib == 1 else (kib // 2, 20)
    line = {"sku": "B-0042/blue", "name": "Bread, whole grain, sliced", "qty": 1, "price": "2.75"}
    line |= {"note": "no nuts, please", "tags": ["food", "fresh"]} if kib > 1 else {}
    return {"n": 0} | {f"basket{i:02}": [dict(line) for _ in range(lines)] for i in range(keys)}


async def new(request: Request) -> Response:
    request.session.update(contents(int(request.query_params["size"])))
    return PlainTextResponse("ok")


async def count(request: Request) -> Response:
    session = request.session
    session["n"] = session["n"] + 1
    return PlainTextResponse("ok")


async def change(request: Request) -> Response:
    line = request.session["basket00"][0]
    line["qty"] = line["qty"] + 1
    return PlainTextResponse("ok")


async def read(request: Request) -> Response:
    assert request.session["n"] >= 0
    return PlainTextResponse("ok")


async def value(request: Request) -> Response:
    return PlainTextResponse(str(request.session["n"]))


async def hold(request: Request) -> Response:
    session = request.session
    n = session["n"]
    await asyncio.sleep(float(request.query_params["seconds"]))
    session["n"] = n + 1
    return PlainTextResponse("ok")


async def plain(_: Request) -> Response:
    return PlainTextResponse("ok")


def bare() -> Starlette:
    """No sessions at all; the same handler, its number in the process."""
    kept = {"n": 0}

    async def count_in_process(_: Request) -> Response:
        kept["n"] = kept["n"] + 1
        return PlainTextResponse("ok")

    return Starlette(routes=[Route("/count", count_in_process), Route("/plain", plain)])


def make() -> Any:
    kind = os.environ["BENCH_APP"]
    if kind == "bare":
        return bare()
    if kind == "queue":
        return queue()
    if kind == "shared":
        return shared()
    if kind.startswith("litestar"):
        from benchmarks import litestar_app

        is_bare = kind == "litestar"
        return litestar_app.bare() if is_bare else litestar_app.with_redis(os.environ["BENCH_GRID"])
    routes = [
        Route("/new", new),
        Route("/count", count),
        Route("/change", change),
        Route("/read", read),
        Route("/value", value),
        Route("/hold", hold),
        Route("/plain", plain),
    ]
    return Starlette(routes=routes, middleware=_middleware(kind))


_ACCESS: dict[str, Any] = {
    "ours": "exclusive",
    "read_only": {"/new": "exclusive", "*": "read_only"},
    "counted": {"/read": "read_only", "*": "exclusive"},
}
HIT_SECONDS = 60.0  # how old what `hit` reads may be
_CACHE: dict[str, dict[str, Any]] = {  # all read_only: sessions kept, and for how long unasked
    "hit": {"client_cache_capacity": 1000, "client_cache_coherency_interval": HIT_SECONDS},
    "asked": {"client_cache_capacity": 1000},
    "uncached": {"client_cache_capacity": 0},
}
_NO_SWEEP = 3600.0  # seconds: the longest that the setting allows, so that no sweep is counted


def _middleware(kind: str) -> list[Middleware]:
    if kind in _ACCESS or kind in _CACHE:
        options: dict[str, Any] = {
            "connection_string": os.environ["BENCH_GRID"],
            "namespace": NAMESPACE,
            "timeout": DAY,
            "access": _ACCESS["read_only"] if kind in _CACHE else _ACCESS[kind],
            **_CACHE.get(kind, {}),
        }
        if kind == "counted":
            options["sweep_interval"] = _NO_SWEEP
        return [Middleware(SessionMiddleware, **options)]
    if kind in ("starsessions", "starsessions_redis"):
        import starsessions

        store = starsessions.InMemoryStore()
        if kind == "starsessions_redis":
            import redis.asyncio
            from starsessions.stores.redis import RedisStore

            store = RedisStore(connection=redis.asyncio.Redis.from_url(os.environ["BENCH_GRID"]))
        return [
            Middleware(
                starsessions.SessionMiddleware,
                store=store,
                lifetime=int(DAY),
                cookie_https_only=False,
            ),
            Middleware(starsessions.SessionAutoloadMiddleware),
        ]
    if kind == "cookie":
        from starlette.middleware.sessions import SessionMiddleware as CookieMiddleware

        return [Middleware(CookieMiddleware, secret_key="of no use to anybody")]
    raise ValueError(f"BENCH_APP={kind}: none of {KINDS}")


# -- many requests for one session -----------------------------------------------------------


class Announcing:
    """A grid that tells the client, by a datagram, whose first `acquire` it has answered.

    So the client knows that a request stands in the queue before it sends the next one. The
    request's number is in the claim's holder: its path is the number.
    """

    def __init__(self, grid: Grid, address: str) -> None:
        self._grid = grid
        self._address = address
        self._out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._known: set[bytes] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    async def acquire(
        self, key: bytes, secret: bytes, claim: Claim, known: Version | None = None
    ) -> Granted | Busy | QueueFull | Replaced | Missing:
        outcome = await self._grid.acquire(key, secret, claim, known)
        if claim.token not in self._known:
            self._known.add(claim.token)
            self._out.sendto(claim.holder.encode(), self._address)
        return outcome


def queue() -> Starlette:
    """`/NUMBER` increments, as a handler would write it: read, wait for something, write."""

    async def start(request: Request) -> Response:
        request.session.update(n=0, order=[])
        return PlainTextResponse("ok")

    async def increment(request: Request) -> Response:
        began = time.monotonic()
        session = request.session
        n = session["n"]
        await asyncio.sleep(HANDLER_SECONDS)
        session["n"] = n + 1
        session["order"].append(request.path_params["number"])
        ended = time.monotonic()
        return JSONResponse({"began": began, "ended": ended, "pid": os.getpid()})

    async def result(request: Request) -> Response:
        return JSONResponse({"n": request.session["n"], "order": request.session["order"]})

    async def pid(_: Request) -> Response:
        return PlainTextResponse(str(os.getpid()))

    settings = SessionSettings(
        connection_string=os.environ["BENCH_GRID"],
        namespace=NAMESPACE,
        request_queue_limit_per_session=300,
    )
    grid: Any = make_grid(settings.connection_string, namespace=NAMESPACE, timeout=1.0)
    if address := os.environ.get("BENCH_ANNOUNCE"):
        grid = Announcing(grid, address)
    return Starlette(
        routes=[
            Route("/start", start),
            Route("/result", result),
            Route("/pid", pid),
            Route("/{number:int}", increment),
        ],
        middleware=[Middleware(SessionMiddleware, provider=SessionProvider(settings, grid=grid))],
    )


SHARED_KEYS = 100


def shared() -> Starlette:
    """`/concurrent/KEY/VALUE` and `/exclusive/KEY/VALUE`: read a value, wait, set it."""

    async def start(request: Request) -> Response:
        request.session.update({shared_key(number): 0 for number in range(SHARED_KEYS)})
        return PlainTextResponse("ok")

    async def put(request: Request) -> Response:
        began = time.monotonic()
        session, key = request.session, request.path_params["key"]
        assert session[key] != request.path_params["value"]
        await asyncio.sleep(HANDLER_SECONDS)
        session[key] = request.path_params["value"]
        return JSONResponse({"began": began, "ended": time.monotonic(), "pid": os.getpid()})

    async def everything(request: Request) -> Response:
        return JSONResponse(dict(request.session))

    async def pid(_: Request) -> Response:
        return PlainTextResponse(str(os.getpid()))

    access = {"/concurrent/*": "concurrent", "/all": "read_only", "/pid": "none"}
    options: dict[str, Any] = {
        "connection_string": os.environ["BENCH_GRID"],
        "namespace": NAMESPACE,
        "access": access,
        "request_queue_limit_per_session": 300,
    }
    return Starlette(
        routes=[
            Route("/start", start),
            Route("/all", everything),
            Route("/pid", pid),
            Route("/concurrent/{key}/{value:int}", put),
            Route("/exclusive/{key}/{value:int}", put),
        ],
        middleware=[Middleware(SessionMiddleware, **options)],
    )


def shared_key(number: int) -> str:
    return f"k{number:02}"
