"""`concurrent`: requests that share a session, on the embedded grid and on Redis.

Pairs: both requests of a pair go to one session at the same moment, over two connections that end
at different workers where that can be had, and each sets a value under a key of its own, 5 ms
after it has read the one before. Once all pairs are through, every key of every session has to
have the value that was set last. Whether two requests met is told by their handlers' own clocks.

Throughput: 50 connections to one session, each of which changes a key of its own again and again,
with the access concurrent and with exclusive.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.apps import SHARED_KEYS, shared_key
from benchmarks.increments import Connection
from benchmarks.redis_server import RedisServer
from benchmarks.report import Check, Options, Result, Table, median
from benchmarks.servers import BenchmarkFailed, Server

_WORKERS = 4  # for the pairs
_PAIRS_A_SESSION = SHARED_KEYS // 2
_SESSIONS_AT_ONCE = 16
_MEET = 0.5  # of the pairs, at least: else they prove nothing
_IN_FLIGHT = 50
_TRIES = 20  # connections opened for each pair wanted, at most
_BOUND = 0.1  # exclusive's requests a second, of concurrent's


class _Connection(Connection):
    """Acknowledges at once what arrives.

    uvicorn with several workers sends an answer's head and body apart, on a socket without
    TCP_NODELAY: the body waits until the head is acknowledged, which the kernel puts off by 40 ms.
    """

    def send(self, path: str, cookie: str) -> None:
        super().send(path, cookie)
        if hasattr(socket, "TCP_QUICKACK"):  # Linux's, which forgets it with the next sending
            wire = self._writer.get_extra_info("socket")
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


@dataclass
class Pairs:
    """What became of them.

    Attributes:
        pairs: how many there were.
        lost: values that were set and are not stored.
        met: pairs whose handlers ran at the same time.
        apart: pairs that two workers served.
        seconds: for all.
    """

    pairs: int = 0
    lost: int = 0
    met: int = 0
    apart: int = 0
    seconds: float = 0.0


async def _ask(connection: Connection, path: str, cookie: str = "") -> bytes:
    connection.send(path, cookie)
    return await _answered(connection, path)


async def _answered(connection: Connection, path: str) -> bytes:
    status, body = await connection.answer()
    if status != 200:
        raise BenchmarkFailed(f"concurrent: {path} was answered by {status}")
    return body


async def _two_connections(server: Server) -> tuple[Connection, Connection]:
    """To two workers, unless chance keeps giving the same one."""
    one, other = await _Connection.open(server.port), await _Connection.open(server.port)
    worker = await _ask(one, "/pid")
    for _ in range(_TRIES):
        if await _ask(other, "/pid") != worker:
            break
        await other.close()
        other = await _Connection.open(server.port)
    return one, other


async def _pairs(server: Server, count: int, tick: Callable[[], None]) -> Pairs:
    result = Pairs()
    cookies = await asyncio.to_thread(server.cookies, "/start", count // _PAIRS_A_SESSION)
    connections = [await _two_connections(server) for _ in range(_SESSIONS_AT_ONCE)]
    began = time.perf_counter()

    async def drive(one: Connection, other: Connection) -> None:
        while cookies:
            await _pairs_of(cookies.pop(), one, other, result)
            tick()

    async with asyncio.TaskGroup() as group:
        for one, other in connections:
            group.create_task(drive(one, other))
    result.seconds = time.perf_counter() - began
    for connection in (it for both in connections for it in both):
        await connection.close()
    return result


async def _pairs_of(cookie: str, one: Connection, other: Connection, result: Pairs) -> None:
    """All pairs of one session, and what is stored of them in the end."""
    expected: dict[str, int] = {}
    for number in range(_PAIRS_A_SESSION):
        keys = shared_key(2 * number), shared_key(2 * number + 1)
        values = 2 * number + 1, 2 * number + 2
        expected |= dict(zip(keys, values, strict=True))
        paths = [f"/concurrent/{key}/{it}" for key, it in zip(keys, values, strict=True)]
        one.send(paths[0], cookie)
        other.send(paths[1], cookie)
        first = json.loads(await _answered(one, paths[0]))
        second = json.loads(await _answered(other, paths[1]))
        result.pairs += 1
        result.apart += first["pid"] != second["pid"]
        # CLOCK_MONOTONIC is the same clock in all processes.
        result.met += first["began"] < second["ended"] and second["began"] < first["ended"]
    stored = json.loads(await _ask(one, "/all", cookie))
    result.lost += sum(stored.get(key) != value for key, value in expected.items())


async def _throughput(server: Server, access: str, count: int) -> tuple[float, int]:
    """Requests a second of `_IN_FLIGHT` connections to one session, and values lost."""
    [cookie] = await asyncio.to_thread(server.cookies, "/start", 1)
    connections = [await _Connection.open(server.port) for _ in range(_IN_FLIGHT)]
    left = count
    set_last: dict[str, int] = {}

    async def drive(number: int, connection: Connection) -> None:
        nonlocal left
        key, value = shared_key(number), 0
        while left > 0:
            left -= 1
            value += 1
            await _ask(connection, f"/{access}/{key}/{value}", cookie)
        set_last[key] = value

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, connection in enumerate(connections):
            group.create_task(drive(number, connection))
    seconds = time.perf_counter() - began
    stored = json.loads(await _ask(connections[0], "/all", cookie))
    for connection in connections:
        await connection.close()
    lost = sum(stored[key] != value for key, value in set_last.items())
    return count / seconds, lost


@dataclass(frozen=True)
class _Rates:
    """Requests a second, round by round, and values lost."""

    concurrent: list[float]
    exclusive: list[float]
    lost: int

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.concurrent, self.exclusive, strict=True)]


async def _rates(options: Options, server: Server, tick: Callable[[], None]) -> _Rates:
    many, few = options.pick(5000, 1000), options.pick(200, 100)
    await _throughput(server, "concurrent", few)  # what is compiled and opened at first use
    rates, lost = _Rates([], [], 0), 0
    for _ in range(options.pick(5, 2)):
        for access, count, kept in (
            ("concurrent", many, rates.concurrent),
            ("exclusive", few, rates.exclusive),
        ):
            rate, missing = await _throughput(server, access, count)
            kept.append(rate)
            lost += missing
            tick()
    return _Rates(rates.concurrent, rates.exclusive, lost)


def concurrent(options: Options) -> Result:
    """Pairs of requests that change one session at once, and 50 in flight on one."""
    result = Result()
    count, rounds = options.pick(10_000, 2_000), options.pick(5, 2)
    total, done = 2 * (count // _PAIRS_A_SESSION + 4 * rounds * 10), 0
    pair_rows, rate_rows = [], []

    def tick(by: int = 1) -> None:
        nonlocal done
        done += by
        options.progress.at(min(done / total, 1.0))

    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(options.folder / "redis"))
        for where in ("embedded", redis.version):
            grid = redis.url if where != "embedded" else _embedded(options.folder / "pairs")
            pairs = _of_pairs(options.folder, grid, count, tick)
            share = f"{pairs.met / pairs.pairs:.0%}"
            if pairs.met < _MEET * pairs.pairs:
                raise BenchmarkFailed(f"concurrent: only {share} of the pairs met on {where}")
            pair_rows.append(_pair_row(where, pairs))
            what = f"{where}: changes lost of {pairs.pairs:,} pairs, {_WORKERS} workers"
            result.checks.append(Check(what, pairs.lost, 0, exact=True))
            result.figures[f"{where}, pairs"] = vars(pairs)
        for where in ("embedded", redis.version):
            for workers in (1, 2):
                folder = options.folder / f"throughput-{workers}"
                grid = redis.url if where != "embedded" else _embedded(folder)
                log = options.folder / "server.log"
                with Server("shared", grid=grid, workers=workers, log=log) as server:
                    rates = asyncio.run(_rates(options, server, lambda: tick(10)))
                wires = f"{where}, {workers} worker{'s'[: workers - 1]}"
                rate_rows.append(_rate_row(wires, rates))
                result.checks += _checks(wires, rates)
                result.figures[wires] = vars(rates)
    result.tables += _tables(pair_rows, rate_rows)
    return result


def _embedded(folder: Path) -> str:
    folder.mkdir()
    return f"embedded://{folder}/grid?max_size=64MiB"


def _of_pairs(folder: Path, grid: str, count: int, tick: Callable[[], None]) -> Pairs:
    log = folder / "server.log"
    with Server("shared", grid=grid, workers=_WORKERS, log=log) as server:
        return asyncio.run(_pairs(server, count, tick))


def _pair_row(where: str, pairs: Pairs) -> list[str]:
    return [
        where,
        f"{pairs.pairs:,}",
        str(pairs.lost),
        f"{pairs.met / pairs.pairs:.0%}",
        f"{pairs.apart / pairs.pairs:.0%}",
        f"{pairs.seconds:.1f}",
        f"{2 * pairs.pairs / pairs.seconds:,.0f}",
    ]


def _rate_row(wires: str, rates: _Rates) -> list[str]:
    return [
        wires,
        f"{median(rates.concurrent):,.0f}",
        f"{median(rates.exclusive):,.0f}",
        f"{median(rates.ratios):.1f}",
        f"{min(rates.ratios):.1f}",
        str(rates.lost),
    ]


def _checks(wires: str, rates: _Rates) -> list[Check]:
    ratio = median(rates.ratios)
    shown = f"1/{ratio:.1f}"
    what = f"{wires}: exclusive's throughput, of concurrent's, {_IN_FLIGHT} in flight"
    return [
        Check(what, 1 / ratio, _BOUND, " ×", shown),
        Check(f"{wires}: changes lost, {_IN_FLIGHT} in flight", rates.lost, 0, exact=True),
    ]


def _tables(pair_rows: Any, rate_rows: Any) -> list[Table]:
    return [
        Table(
            f"concurrent: pairs of requests to one session at once, {_WORKERS} workers",
            ("", "pairs", "changes lost", "met", "at two workers", "seconds", "requests/s"),
            pair_rows,
            [
                "each sets a value under a key of its own, 5 ms after it read the one before;",
                f"met: both handlers ran at the same time; {_SESSIONS_AT_ONCE} pairs, of as many",
                "sessions, are in flight",
            ],
        ),
        Table(
            f"concurrent: {_IN_FLIGHT} requests in flight on one session, handlers of 5 ms",
            ("requests a second", "concurrent", "exclusive", "ratio", "lowest", "changes lost"),
            rate_rows,
            ["ratio: of each round, median and lowest"],
        ),
    ]
