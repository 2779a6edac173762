"""`redis-calls`: how many calls a request makes, counted at the server.

An application under uvicorn answers one request after the other while the server's MONITOR tells
what it was asked, and by whom: what a script asks for itself is told apart. `INFO commandstats`
has to have counted the same calls. Whether calls are pipelined is seen where the server is stopped
for a moment: what was sent without waiting for an answer it then finds together, and reads once.

Nothing is measured, so there are no rounds: a number that is not exact is a fault.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from benchmarks.increments import Connection
from benchmarks.redis_server import RedisServer
from benchmarks.report import Check, Options, Result, Table
from benchmarks.servers import BenchmarkFailed, Server
from gridsession.grids.redis import scripts
from gridsession.grids.redis.scripts import Script

_LINE = re.compile(rb'\+[\d.]+ \[\d+ (lua|[^\]]*)\] "([^"]*)"(?: "([^"]*)")?')
_SCRIPTS = {it.sha: name for name, it in vars(scripts).items() if isinstance(it, Script)}
_OF_NOTICES = ("SSUBSCRIBE", "SUNSUBSCRIBE", "HELLO")  # on the connection of those who wait
_SWEEPS = ("TIME", "ZRANGE")
_SECONDS = 10.0
_STOPPED = 0.2  # seconds; less than a call may take
_HELD = 0.3  # seconds for which the lock is held that a request waits for


@dataclass
class Seen:
    """What the server was asked for in one scenario.

    Attributes:
        calls: by clients: the names of scripts, and of other commands, with their number.
        inner: by scripts.
        reads: how often the server found something to read.
    """

    calls: Counter[str]
    inner: Counter[str]
    reads: int


class Watch:
    """What a server is asked for, as it tells itself."""

    def __init__(self, redis: RedisServer) -> None:
        self._redis = redis
        self._socket = socket.create_connection(("127.0.0.1", redis.port), timeout=_SECONDS)
        self._lines = self._socket.makefile("rb")
        self._socket.sendall(b"MONITOR\r\n")
        assert self._lines.readline() == b"+OK\r\n"
        self._marks = 0
        self._own_reads = 0
        self._own_reads = self._between().reads  # of the marks and questions themselves

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @asynccontextmanager
    async def scenario(self) -> AsyncIterator[Seen]:
        """What is seen while it is entered; filled in at its end."""
        self._start()
        seen = Seen(Counter(), Counter(), 0)
        yield seen
        found = self._end()
        seen.calls, seen.inner, seen.reads = found.calls, found.inner, found.reads

    def _between(self) -> Seen:
        self._start()
        return self._end()

    def _start(self) -> None:
        self._stats = self._commands()
        self._reads = self._count_of_reads()
        self._read_until_mark()

    def _end(self) -> Seen:
        reads = self._count_of_reads() - self._reads - self._own_reads
        seen = self._read_until_mark()
        counted = self._commands() - self._stats
        told = Counter(seen.inner)
        for name, number in seen.calls.items():
            told["EVALSHA" if name in _SCRIPTS.values() else name] += number
        for name in {*told, *counted} - {"INFO", "ECHO"}:
            if told[name] != counted[name]:
                raise BenchmarkFailed(
                    f"the server counted {counted[name]} {name}, and told of {told[name]}"
                )
        if any(seen.calls[name] for name in _SWEEPS):
            raise BenchmarkFailed("a sweep came in between, which nobody wanted to count")
        return Seen(seen.calls, seen.inner, reads)

    def _commands(self) -> Counter[str]:
        told = self._redis.admin.info("commandstats")
        return Counter(
            {
                name.removeprefix("cmdstat_").partition("|")[0].upper(): stats["calls"]
                for name, stats in told.items()
            }
        )

    def _count_of_reads(self) -> int:
        return int(self._redis.admin.info("stats")["total_reads_processed"])

    def _read_until_mark(self) -> Seen:
        self._marks += 1
        mark = f"mark-{self._marks}"
        self._redis.admin.echo(mark)
        seen = Seen(Counter(), Counter(), 0)
        while True:
            line = self._lines.readline()
            match = _LINE.match(line)
            if match is None:
                raise BenchmarkFailed(f"not a line of MONITOR: {line[:60]!r}")
            source, command, first = match.groups()
            name = command.decode().upper()
            if name == "ECHO" and first == mark.encode():
                return seen
            if source == b"lua":
                seen.inner[name] += 1
            elif name == "EVALSHA":
                seen.calls[_SCRIPTS[first]] += 1
            elif name != "INFO":
                seen.calls[name] += 1


async def _scenarios(
    redis: RedisServer, server: Server, watch: Watch, count: int
) -> dict[str, tuple[Seen, int]]:
    """What each kind of request asks for, and how many requests there were."""
    connection, other = [await Connection.open(server.port) for _ in range(2)]
    [cookie] = server.cookies("/new?size=1", 1)
    found: dict[str, tuple[Seen, int]] = {}

    async def ask(path: str, cookie: str, connection: Connection = connection) -> None:
        connection.send(path, cookie)
        status, _ = await connection.answer()
        if status != 200:
            raise BenchmarkFailed(f"{path} was answered by {status}")

    async def times(name: str, number: int, act: Callable[[], Awaitable[None]]) -> None:
        async with watch.scenario() as seen:
            for _ in range(number):
                await act()
        found[name] = seen, number

    async def create_meanwhile() -> None:
        with redis.frozen():
            created = asyncio.ensure_future(ask("/new?size=1", ""))
            await asyncio.sleep(_STOPPED)
        await created

    async def two_at_once() -> None:
        held = asyncio.ensure_future(ask(f"/hold?seconds={_HELD}", cookie, other))
        await asyncio.sleep(_HELD / 3)
        await ask("/count", cookie)
        await held

    for path in (
        "/count",
        "/value",
        "/read",
    ):  # scripts that the server has not seen yet are sent whole
        await ask(path, cookie)
    await times(_UNTOUCHED, count, lambda: ask("/plain", ""))
    await times(_CREATED, count, lambda: ask("/new?size=1", ""))
    await times(_CREATED_MEANWHILE, 1, create_meanwhile)
    await times(_WRITTEN, count, lambda: ask("/count", cookie))
    await times(_UNCHANGED, count, lambda: ask("/value", cookie))
    await times(_READ, count, lambda: ask("/read", cookie))
    await times(_NOBODYS, count, lambda: ask("/plain", "session=" + "x" * 64))
    await two_at_once()  # the connection for notices is made
    await times(_WAITED, 1, two_at_once)
    await connection.close()
    await other.close()
    return found


_UNTOUCHED = "no cookie, nothing stored"
_CREATED = "no cookie, a session made"
_CREATED_MEANWHILE = "the same, the server stopped"
_WRITTEN = "cookie, session written"
_UNCHANGED = "cookie, session not changed"
_READ = "cookie, read_only"
_NOBODYS = "cookie of no session"
_WAITED = f"two at once, one waits {_HELD * 2 / 3:g} s"
_BOUNDS = {_UNTOUCHED: 0, _CREATED: 2, _WRITTEN: 2, _UNCHANGED: 2, _READ: 1}
_EXACT = (_UNTOUCHED, _CREATED, _READ)


def redis_calls(options: Options) -> Result:
    """Calls a request makes, counted at the Redis server."""
    count = options.pick(200, 20)
    with RedisServer(options.folder) as redis:
        log = options.folder / "server.log"
        with Server("counted", grid=redis.url, log=log) as server, Watch(redis) as watch:
            found = asyncio.run(_scenarios(redis, server, watch, count))
        version = redis.version
    result, rows = Result(), []
    for name, (seen, number) in found.items():
        calls = {of: n for of, n in seen.calls.items() if of not in _OF_NOTICES}
        notices = {of: n for of, n in seen.calls.items() if of in _OF_NOTICES}
        each = sum(calls.values()) / number
        rows.append(
            [
                name,
                f"{each:g}",
                _shown(calls, number),
                _shown(notices, number),
                f"{sum(seen.inner.values()) / number:g}",
            ]
        )
        if name in _BOUNDS:
            what = f"Redis: calls a request: {name}"
            result.checks.append(Check(what, each, _BOUNDS[name], exact=name in _EXACT))
        result.figures[name] = {"requests": number, "seen": vars(seen)}
    created, _ = found[_CREATED_MEANWHILE]
    result.checks.append(
        Check("Redis: reads at the server of a creation's calls", created.reads, 1, exact=True)
    )
    result.tables.append(
        Table(
            f"redis-calls: what a request asks {version} for, of {count} requests each",
            ("", "calls", "which", "for notices", "inside scripts"),
            rows,
            [
                "the last line is of both requests together, the one that holds and the one that "
                "waits",
            ],
        )
    )
    return result


def _shown(calls: dict[str, int], number: int) -> str:
    each = [(name.lower(), n / number) for name, n in calls.items()]
    return " + ".join(name if n == 1 else f"{n:g} {name}" for name, n in each)
