"""`cached`: what the client cache saves, with sessions in Redis.

A hit: the same Starlette application, called as ASGI in this process, with and without sessions,
in turns; what is counted is CPU time, and at the server calls. Beside it the same under uvicorn
and wrk, as `redis-request` does, with what a read costs that asks the grid, and one without cache.

Bytes: of requests of a session of 100 KiB that nobody changes, all that the server read and wrote,
as it counts it itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks import apps
from benchmarks.redis_server import RedisServer
from benchmarks.report import Check, Options, Result, Table, median, micro, spread
from benchmarks.request import BARE, COLUMNS, COOKIE_OF_NOBODY, Stand, added, raw, rows
from benchmarks.servers import BenchmarkFailed, Cost, Wrk
from gridsession.provider import SessionProvider
from gridsession.settings import SessionSettings
from gridsession.web.starlette import SessionMiddleware as GridSessions

SessionMiddleware: Any = GridSessions  # as in `apps`
_NO_SWEEP = 3600.0  # seconds: the longest that the setting allows, so that no sweep is counted
_HIT, _ASKED, _UNCACHED = "hit", "the grid asked", "without cache"
_KINDS = {_HIT: "hit", _ASKED: "asked", _UNCACHED: "uncached"}
_SIZES = (1, 100)  # KiB
_HIT_BOUND = 10.0  # microseconds
_BYTES_BOUND = 1024.0  # on the wire, both ways, where the payload alone is 100 times as large


@dataclass
class _Hits:
    """Of hits in this process.

    Attributes:
        bare, ours: microseconds of CPU time a request, round by round.
        calls: scripts that the server ran meanwhile.
        requests: that had a session.
    """

    bare: list[float]
    ours: list[float]
    calls: int = 0
    requests: int = 0

    @property
    def added(self) -> list[float]:
        return [mine - bare for mine, bare in zip(self.ours, self.bare, strict=True)]


def cached(options: Options) -> Result:
    """The client cache: CPU time of a read that it answers, and bytes on the wire."""
    result = Result()
    rounds = options.pick(7, 2)
    total, done = len(_SIZES) + (len(_SIZES) * len(_KINDS) + 1) * (rounds + 1), 0

    def tick() -> None:
        nonlocal done
        done += 1
        options.progress.at(done / total)

    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(options.folder / "redis"))
        hits = {}
        for kib in _SIZES:
            hits[kib] = asyncio.run(_hits(redis, kib, options.pick(21, 5), options.pick(2000, 500)))
            tick()
        _tell_hits(result, redis.version, hits)
        with ExitStack() as servers:
            stand = Stand(options, servers, "asyncio", redis.url)
            costs = _under_load(stand, redis, rounds, tick)
        _tell_costs(result, redis.version, costs)
        wire = asyncio.run(_bytes(redis, options.pick(200, 50)))
        _tell_bytes(result, redis.version, wire)
    return result


# -- a hit, in this process ---------------------------------------------------------------------


async def _hits(redis: RedisServer, kib: int, rounds: int, count: int) -> _Hits:
    settings = SessionSettings(
        connection_string=redis.url,
        namespace=apps.NAMESPACE,
        timeout=apps.DAY,
        access="read_only",
        client_cache_coherency_interval=apps.HIT_SECONDS,
        sweep_interval=_NO_SWEEP,
    )
    hits = _Hits([], [])
    async with SessionProvider(settings) as provider:
        async with provider.open(None) as session:
            session.update(apps.contents(kib))
            session_id = session.id
        ours, bare = _app(apps.read, provider), _app(apps.plain, None)
        for number in range(rounds + 1):
            async with provider.open(session_id):
                pass  # asks the grid: from now on, what is kept is young enough
            without = await _cpu(bare, session_id, count)
            before = _scripts_run(redis)
            with_session = await _cpu(ours, session_id, count)
            calls = _scripts_run(redis) - before
            if number:
                hits.bare.append(without)
                hits.ours.append(with_session)
                hits.calls += calls
                hits.requests += count
    return hits


def _app(
    handler: Callable[[Request], Awaitable[Response]], provider: SessionProvider | None
) -> Starlette:
    middleware = [] if provider is None else [Middleware(SessionMiddleware, provider=provider)]
    return Starlette(routes=[Route("/", handler)], middleware=middleware)


async def _cpu(app: Starlette, session_id: str, count: int) -> float:
    """Microseconds a request."""
    cookie = (b"cookie", b"session=" + session_id.encode())
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), cookie],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    statuses = set()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.add(message["status"])

    began = time.process_time()
    for _ in range(count):
        await app({**scope}, receive, send)
    used = time.process_time() - began
    if statuses != {200}:
        raise BenchmarkFailed(f"cached: answers were {statuses}")
    return used / count * 1e6


def _scripts_run(redis: RedisServer) -> int:
    stats = redis.admin.info("commandstats")
    names = ("cmdstat_evalsha", "cmdstat_eval", "cmdstat_evalsha_ro")
    return sum(cast(int, stats[name]["calls"]) for name in names if name in stats)


def _tell_hits(result: Result, version: str, hits: dict[int, _Hits]) -> None:
    shown = []
    for kib, of in hits.items():
        shown.append(
            [
                f"{kib} KiB",
                micro(median(of.bare)),
                micro(median(of.ours)),
                micro(median(of.added)),
                f"± {spread(of.added):.1f}",
                f"{of.calls} of {of.requests:,}",
            ]
        )
        result.figures[f"hit in process, {kib} KiB"] = vars(of)
    first = hits[1]
    result.checks += [
        Check(
            "CPU added by a read_only hit, 1 KiB, in process",
            median(first.added),
            _HIT_BOUND,
            " µs",
        ),
        Check(
            "Redis: calls of read_only hits",
            sum(of.calls for of in hits.values()),
            0,
            exact=True,
        ),
    ]
    result.tables.append(
        Table(
            f"cached: a read_only hit in this process, {version}, no HTTP server",
            ("session", "bare CPU µs", "with it", "added", "", "calls of requests"),
            shown,
            ["a number of the session is read; bare Starlette reads none"],
        )
    )


# -- under a server -----------------------------------------------------------------------------


def _under_load(
    stand: Stand, redis: RedisServer, rounds: int, tick: Callable[[], None]
) -> dict[str, list[Cost]]:
    loads = [stand.load_with(BARE, stand.server("bare"), "/plain", COOKIE_OF_NOBODY)]
    for name, kind in _KINDS.items():
        server = stand.server(kind)
        loads += [stand.load(f"{name}, {kib} KiB", server, "/read", kib) for kib in _SIZES]
    return Wrk(stand.folder, store=redis.pid).in_turns(
        loads, connections=8, rounds=rounds, seconds=1, tick=tick
    )


def _tell_costs(result: Result, version: str, costs: dict[str, list[Cost]]) -> None:
    unit = median(added(costs, f"{_UNCACHED}, 1 KiB"))
    shown = [
        [*row, f"{median([cost.store for cost in costs[row[0]]]):.1f}"] for row in rows(costs, unit)
    ]
    result.tables.append(
        Table(
            f"cached: a read_only request under uvicorn, {version}; asyncio, 8 connections",
            (*COLUMNS, "Redis µs"),
            shown,
            [
                "ratio: to 1 KiB without cache; hit: client_cache_coherency_interval is "
                f"{apps.HIT_SECONDS:g} s;",
                "the grid asked: it is 0; without cache: client_cache_capacity is 0",
            ],
        )
    )
    result.figures["under uvicorn"] = raw(costs)


# -- on the wire --------------------------------------------------------------------------------


async def _bytes(redis: RedisServer, count: int) -> dict[str, float]:
    """A request's, by access and whether there is a cache."""
    found = {}
    for cache, capacity in (("cached", 100), ("without cache", 0)):
        settings = SessionSettings(
            connection_string=redis.url,
            namespace=apps.NAMESPACE,
            timeout=apps.DAY,
            client_cache_capacity=capacity,
            sweep_interval=_NO_SWEEP,
        )
        async with SessionProvider(settings) as provider:
            async with provider.open(None) as session:
                session.update(apps.contents(100))
                session_id = session.id
            for access in ("exclusive", "read_only"):
                await _read(provider, session_id, access)  # scripts are sent whole at first
                own = -_wire(redis) + _wire(redis)  # of the question itself
                before = _wire(redis)
                for _ in range(count):
                    await _read(provider, session_id, access)
                found[f"{access}, {cache}"] = (_wire(redis) - before - own) / count
    return found


async def _read(provider: SessionProvider, session_id: str, access: str) -> None:
    async with provider.open(session_id, access=access) as session:
        assert session["n"] == 0


def _wire(redis: RedisServer) -> int:
    stats = redis.admin.info("stats")
    return int(stats["total_net_input_bytes"]) + int(stats["total_net_output_bytes"])


def _tell_bytes(result: Result, version: str, wire: dict[str, float]) -> None:
    for access in ("exclusive", "read_only"):
        what = f"Redis: bytes of a request, 100 KiB unchanged and cached, {access}"
        value = wire[f"{access}, cached"]
        result.checks.append(Check(what, value, _BYTES_BOUND, "", f"{value:,.0f}"))
    result.tables.append(
        Table(
            f"cached: bytes between worker and {version} for a request, 100 KiB unchanged",
            ("access", "bytes"),
            [[name, f"{value:,.0f}"] for name, value in wire.items()],
        )
    )
    result.figures["bytes"] = wire
