"""`handoff` and `redis-handoff`: how long a lock is under way from one process to another.

One process holds a session's lock, another waits for it in the queue. Measured is the time from
the call that commits and releases, in the one, to `Granted` in the other: CLOCK_MONOTONIC is the
same clock in both. In turns with it the same two processes do the least that could take its place:
beside the embedded grid, the one wakes the other by a bare UNIX datagram; beside Redis, each sends
a PING to the server on a connection that does nothing else, and waits for the answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.bare_loop import BareLoop
from benchmarks.redis_server import RedisServer
from benchmarks.report import Check, Options, Result, Table, median
from gridsession.grids import make_grid
from gridsession.grids.contract import Busy, Change, Claim, Granted, Grid, NewRecord
from gridsession.sources.connection_string import RedisAddress, parse

_KEY, _SECRET = b"k" * 32, b"s" * 32
_IDLE_SECONDS = 0.003  # the waiter is to be asleep when it is woken
_PAYLOAD = bytes(1024)


def _grid(url: str) -> Grid:
    return make_grid(url, namespace="benchmark", timeout=1.0)


def _redis_port(url: str) -> int | None:
    address = parse(url)
    return address.hosts[0][1] if isinstance(address, RedisAddress) else None


async def _ping(bare: BareLoop) -> int:
    """How long it took, in nanoseconds."""
    await asyncio.sleep(_IDLE_SECONDS)  # all are asleep then, as at a hand-off
    began = time.monotonic_ns()
    await bare.call(b"PING")
    return time.monotonic_ns() - began


def _claim() -> Claim:
    return Claim(os.urandom(16), "benchmark", 15.0, 50)


def _change() -> Change:
    return Change(int.from_bytes(os.urandom(8), "big"), _PAYLOAD, 3600.0, None)


class Datagrams:
    """A socket that a coroutine waits at."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.bind(str(path))
        self._came: asyncio.Future[bytes] | None = None
        asyncio.get_running_loop().add_reader(self.socket.fileno(), self._read)

    def _read(self) -> None:
        data = self.socket.recv(64)
        if self._came is not None and not self._came.done():
            self._came.set_result(data)

    async def next(self) -> bytes:
        self._came = asyncio.get_running_loop().create_future()
        return await self._came


# -- the process that waits ------------------------------------------------------------------


async def _wait_in_turns(folder: Path, url: str) -> None:
    grid = _grid(url)
    await grid.open()
    box = Datagrams(folder / "waiter")
    port = _redis_port(url)
    bare = None if port is None else await BareLoop.to(port)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while order := await reader.readline():
        if order == b"ping\n":
            assert bare is not None
            print(await _ping(bare), flush=True)
            continue
        at = await (_granted(grid) if order == b"lock\n" else _woken(box))
        print(at, flush=True)
    await grid.close()
    if bare is not None:
        bare.close()


async def _granted(grid: Grid) -> int:
    claim = _claim()
    outcome = await grid.acquire(_KEY, _SECRET, claim)
    print("waiting", flush=True)
    while isinstance(outcome, Busy):
        await grid.wait(_KEY, claim.token, outcome.retry_in)
        outcome = await grid.acquire(_KEY, _SECRET, claim)
    at = time.monotonic_ns()
    assert isinstance(outcome, Granted)
    await grid.commit(_KEY, claim.token, _change(), release=True)
    return at


async def _woken(box: Datagrams) -> int:
    print("waiting", flush=True)
    await box.next()
    return time.monotonic_ns()


# -- the process that holds ------------------------------------------------------------------


async def _measure(options: Options, url: str, count: int) -> tuple[list[float], list[float]]:
    """Microseconds of hand-offs, and of what they are compared with."""
    folder = options.folder
    grid = _grid(url)
    await grid.open()
    await grid.create(_KEY, NewRecord(1, _SECRET, _PAYLOAD, 3600.0, None, None))
    out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    port = _redis_port(url)
    bare_loop = None if port is None else await BareLoop.to(port)
    waiter = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.handoff", str(folder), url),
        cwd=Path(__file__).parent.parent,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    orders, answers = waiter.stdin, waiter.stdout
    assert orders is not None
    assert answers is not None
    claim = _claim()

    async def hand_over() -> None:
        await grid.commit(_KEY, claim.token, _change(), release=True)

    async def wake() -> None:
        out.sendto(b"!", str(folder / "waiter"))

    async def timed(order: bytes, act: Callable[[], Awaitable[None]]) -> float:
        orders.write(order)
        assert await answers.readline() == b"waiting\n"
        await asyncio.sleep(_IDLE_SECONDS)
        began = time.monotonic_ns()
        await act()
        return (int(await answers.readline()) - began) / 1000

    async def compared() -> list[float]:
        if bare_loop is None:
            return [await timed(b"datagram\n", wake)]
        orders.write(b"ping\n")
        theirs = int(await answers.readline())
        return [theirs / 1000, await _ping(bare_loop) / 1000]

    locks, bare = [], []
    for number in range(-20, count):
        claim = _claim()
        assert isinstance(await grid.acquire(_KEY, _SECRET, claim), Granted)
        lock, least = await timed(b"lock\n", hand_over), await compared()
        if number >= 0:  # the first ones make sockets and warm caches
            locks.append(lock)
            bare += least
            options.progress.at((number + 1) / count)
    orders.close()
    await waiter.wait()
    await grid.close()
    out.close()
    if bare_loop is not None:
        bare_loop.close()
    return locks, bare


def _row(name: str, values: list[float]) -> list[str]:
    ordered = sorted(values)
    shares = [ordered[int(share * (len(ordered) - 1))] for share in (0.1, 0.5, 0.9, 0.99)]
    return [name, *(f"{value:.0f}" for value in shares)]


_COLUMNS = ("", "10 %", "median", "90 %", "99 %")


def handoff(options: Options) -> Result:
    """From one process's commit to the next one's lock, against a bare datagram's wake-up."""
    url = f"embedded://{options.folder}/grid?max_size=16MiB"
    locks, bare = asyncio.run(_measure(options, url, options.pick(600, 100)))
    table = Table(
        "handoff: from a commit in one process to the lock in another, in µs",
        _COLUMNS,
        [_row("hand-off of a lock", locks), _row("bare UNIX datagram", bare)],
    )
    lock, wakening = median(locks), median(bare)
    return Result(
        [table],
        [
            Check("hand-off between processes, median", lock / 1000, 0.6, " ms"),
            Check(
                "the same, of a bare datagram's wake-up",
                lock / wakening,
                4.0,
                " ×",
                f"{lock / wakening:.2f} × ({lock:.0f} / {wakening:.0f} µs)",
            ),
        ],
        {"locks": locks, "bare": bare},
    )


def redis_handoff(options: Options) -> Result:
    """From one process's commit to the next one's lock on Redis, against a PING."""
    with RedisServer(options.folder) as redis:
        locks, pings = asyncio.run(_measure(options, redis.url, options.pick(600, 100)))
        version = redis.version
    table = Table(
        f"redis-handoff: from a commit in one process to the lock in another by {version}, in µs",
        _COLUMNS,
        [_row("hand-off of a lock", locks), _row("PING in the same processes", pings)],
    )
    lock, ping = median(locks), median(pings)
    check = Check(
        "Redis: hand-off between processes, of a PING, medians",
        lock / ping,
        3.0,
        " ×",
        f"{lock / ping:.2f} × ({lock:.0f} / {ping:.0f} µs)",
    )
    return Result([table], [check], {"locks": locks, "pings": pings})


if __name__ == "__main__":
    logging.getLogger("gridsession").setLevel(logging.ERROR)  # as in the process that started it
    asyncio.run(_wait_in_turns(Path(sys.argv[1]), sys.argv[2]))
