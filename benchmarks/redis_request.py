"""`redis-request`: what `request` measures, with the sessions in Redis.

The benchmark starts the server itself. What each framework takes without sessions, measured in
the same turns, is taken off: starsessions' and ours are beside bare Starlette, Litestar's beside
bare Litestar, aiohttp-session's beside bare aiohttp. CPU time is the worker's, requests a second
depend on how many cores the worker, the load and the server find.

Lost updates are counted apart: several connections increment one session at once, and what its
number lacks afterwards was lost.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace

from benchmarks.increments import Connection
from benchmarks.redis_server import RedisServer
from benchmarks.report import Check, Options, Result, Table, median
from benchmarks.request import (
    BARE,
    COLUMNS,
    COOKIE_OF_NOBODY,
    OURS,
    READ_ONLY,
    Stand,
    added,
    raw,
    rows,
)
from benchmarks.servers import BenchmarkFailed, Cost, Load, Server, Wrk

_STARSESSIONS = "starsessions"
_BARE_LITESTAR, _LITESTAR = "bare Litestar", "Litestar's sessions"
_BARE_AIOHTTP, _AIOHTTP = "bare aiohttp", "aiohttp-session"
_BASES = {_LITESTAR: _BARE_LITESTAR, _AIOHTTP: _BARE_AIOHTTP}  # all others: bare Starlette
_KINDS = {
    BARE: "bare",
    OURS: "ours",
    READ_ONLY: "read_only",
    _STARSESSIONS: "starsessions_redis",
    _BARE_LITESTAR: "litestar",
    _LITESTAR: "litestar_redis",
    _BARE_AIOHTTP: "aiohttp",
    _AIOHTTP: "aiohttp_redis",
}
_CONNECTIONS = (1, 8, 32)
_BOUND = (1, 8)  # as for the embedded grid; with more it is only shown
_AT_ONCE = 8  # connections that increment one session


def redis_request(options: Options) -> Result:
    """Added CPU a request, requests a second and lost updates, with sessions in Redis."""
    result = Result()
    setups = [(loop, wires) for loop in ("asyncio", "uvloop") for wires in _CONNECTIONS]
    rounds, done = options.pick(7, 2), 0
    total = len(setups) * len(_KINDS) * (rounds + 1)

    def tick() -> None:
        nonlocal done
        done += 1
        options.progress.at(done / total)

    for loop, connections in setups:
        with ExitStack() as stack:
            folder = options.folder / f"{loop}-{connections}"
            folder.mkdir()
            there = replace(options, folder=folder)
            redis = stack.enter_context(RedisServer(folder))
            version = redis.version
            stand = Stand(there, stack, loop, redis.url)
            wrk = Wrk(folder, store=redis.pid)
            loads, lost = _loads(stand, options.pick(100, 25))
            costs = wrk.in_turns(
                loads, connections=connections, rounds=rounds, seconds=1, tick=tick
            )
        _tell(result, f"{loop}, {_wires(connections)}", version, costs, lost)
        if connections in _BOUND:
            result.checks += _checks(f"{loop}, {_wires(connections)}", costs, lost)
        result.figures[f"{loop} {connections}"] = {"costs": raw(costs), "lost": lost}
    return result


def _wires(connections: int) -> str:
    return f"{connections} connection{'s'[: connections - 1]}"


def _loads(stand: Stand, each: int) -> tuple[list[Load], dict[str, int]]:
    """The loads, in the order of the table; and how many updates each way of storing lost."""
    loads, lost = [], {}
    for name, kind in _KINDS.items():
        server = stand.server(kind)
        if kind in ("bare", "litestar", "aiohttp"):
            loads.append(stand.load_with(name, server, "/count", COOKIE_OF_NOBODY))
            continue
        loads.append(stand.load(name, server, "/read" if name == READ_ONLY else "/count"))
        if name != READ_ONLY:
            lost[name] = asyncio.run(_lost_updates(server, each))
    return loads, lost


async def _lost_updates(server: Server, each: int) -> int:
    """Of `_AT_ONCE` connections with so many increments each."""
    [cookie] = server.cookies("/new?size=1", 1)
    connections = [await Connection.open(server.port) for _ in range(_AT_ONCE)]

    async def count_up(connection: Connection) -> None:
        for _ in range(each):
            connection.send("/count", cookie)
            status, _ = await connection.answer()
            if status != 200:
                raise BenchmarkFailed(f"{server.kind}: an increment was answered by {status}")

    await asyncio.gather(*map(count_up, connections))
    connections[0].send("/value", cookie)
    _, body = await connections[0].answer()
    for connection in connections:
        await connection.close()
    return _AT_ONCE * each - int(body)


def _tell(
    result: Result, setup: str, version: str, costs: dict[str, list[Cost]], lost: dict[str, int]
) -> None:
    unit = median(added(costs, _STARSESSIONS, _BASES))
    shown = [
        [
            *row,
            f"{median([cost.rate for cost in costs[row[0]]]):,.0f}",
            f"{median([cost.store for cost in costs[row[0]]]):.1f}",
            str(lost.get(row[0], "")),
        ]
        for row in rows(costs, unit, _BASES)
    ]
    result.tables.append(
        Table(
            f"redis-request: 1 KiB session in {version}, one number counted up; {setup}",
            (*COLUMNS, "requests/s", "Redis µs", "updates lost"),
            shown,
            [
                "ratio: to what starsessions adds, which locks nothing, like all but ours;",
                "Redis µs: CPU time of the Redis server a request;",
                f"updates lost: of one session that {_AT_ONCE} connections count up at once",
            ],
        )
    )


def _checks(setup: str, costs: dict[str, list[Cost]], lost: dict[str, int]) -> list[Check]:
    ours, theirs = (median(added(costs, name, _BASES)) for name in (OURS, _STARSESSIONS))
    our_rate, their_rate = (
        median([cost.rate for cost in costs[name]]) for name in (OURS, _STARSESSIONS)
    )
    return [
        Check(
            f"Redis: CPU added to a request, of starsessions': {setup}",
            ours / theirs,
            0.25,
            " ×",
            f"{ours / theirs:.2f} × ({ours:.0f} / {theirs:.0f} µs)",
        ),
        Check(
            f"Redis: starsessions' requests a second, of ours: {setup}",
            their_rate / our_rate,
            0.5,
            " ×",
            f"{their_rate / our_rate:.2f} × ({their_rate:,.0f} / {our_rate:,.0f})",
        ),
        Check(f"Redis: updates lost: {setup}", lost[OURS], 0, exact=True),
    ]
