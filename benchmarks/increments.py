"""`increments` and `redis-increments`: many requests for one session at once, over several workers.

Order is not guessed from sending times. The client sends a request, then waits until the server
has told it, by a datagram, that this request's ticket is in the session's queue; only then does it
send the next one, on another connection, which another worker may serve. So the order of arrival
is known, and each handler appends its own number to a list in the session: the order of service.
The first requests are served while later ones still arrive; with five milliseconds a handler the
queue grows to more than a hundred all the same.

For the time that 50 at once take, nothing is announced and all are sent at once.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.handoff import Datagrams
from benchmarks.redis_server import RedisServer
from benchmarks.report import Check, Options, Result, Table, median
from benchmarks.servers import BenchmarkFailed, Server

_TRIES = 20  # connections opened for each one wanted, at most
_SECONDS = 30.0  # for an answer, and for an announcement


class Connection:
    """A kept-alive HTTP connection, as much of one as is needed here."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, path: str, cookie: str) -> None:
        self._writer.write(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\n\r\n".encode()
        )

    async def answer(self) -> tuple[int, bytes]:
        async with asyncio.timeout(_SECONDS):
            head = await self._reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").lower().split("\r\n")
            length = next(int(x.partition(":")[2]) for x in lines if x.startswith("content-length"))
            return int(lines[0].split()[1]), await self._reader.readexactly(length)

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


@dataclass(frozen=True)
class Outcome:
    """Of one burst of requests.

    Attributes:
        survived: what the counter says afterwards.
        served: the requests' numbers in the order in which their handlers ran.
        wall: seconds from the first request to the last answer.
        handlers: seconds that the handlers took by their own clocks, together.
        gap: seconds between one handler's end and the next one's begin, median.
        workers: requests that each worker process served.
        queued: requests that had an answer yet to come when the last ticket was entered.
    """

    survived: int
    served: list[int]
    wall: float
    handlers: float
    gap: float
    workers: list[int]
    queued: int


async def _burst(server: Server, count: int, box: Datagrams | None) -> Outcome:
    [cookie] = server.cookies("/start", 1)
    connections = await _evenly(server, count)
    began = time.perf_counter()
    answers = []
    for number, connection in enumerate(connections):
        entered = None if box is None else asyncio.ensure_future(box.next())
        if entered is not None:
            await asyncio.sleep(0)  # so that it listens
        connection.send(f"/{number}", cookie)
        answers.append(asyncio.ensure_future(connection.answer()))
        if entered is not None:
            async with asyncio.timeout(_SECONDS):
                holder = await entered
            assert f" /{number} ".encode() in holder, holder
    queued = sum(not answer.done() for answer in answers)
    came = await asyncio.gather(*answers)
    wall = time.perf_counter() - began
    for connection in connections:
        await connection.close()
    if any(status != 200 for status, _ in came):
        raise BenchmarkFailed(f"increments: {Counter(status for status, _ in came)}")
    said = [json.loads(body) for _, body in came]
    _, body, _ = await asyncio.to_thread(server.get, "/result", cookie)
    result = json.loads(body)
    return Outcome(
        result["n"],
        result["order"],
        wall,
        sum(x["ended"] - x["began"] for x in said),
        median(_gaps(said)),
        sorted(Counter(x["pid"] for x in said).values()),
        queued,
    )


async def _measure(
    options: Options, grid: str, workers: int, count: int, rounds: int
) -> dict[str, Any]:
    folder = options.folder / str(workers)
    folder.mkdir()
    grid = grid or f"embedded://{folder}/grid?max_size=16MiB"
    box = Datagrams(folder / "announced")

    def server(announce: str) -> Server:
        log = folder / "server.log"
        return Server("queue", grid=grid, workers=workers, log=log, announce=announce)

    with await asyncio.to_thread(server, str(folder / "announced")) as announcing:
        ordered = await _burst(announcing, count, box)
    with await asyncio.to_thread(server, "") as plain:
        at_once = await _burst(plain, count, None)
        fifties = [await _burst(plain, 50, None) for _ in range(rounds)]
    return {"ordered": ordered, "at once": at_once, "fifties": fifties}


def _gaps(said: list[dict[str, float]]) -> list[float]:
    """CLOCK_MONOTONIC is the same clock in all processes."""
    ordered = sorted(said, key=lambda x: x["began"])
    return [after["began"] - before["ended"] for before, after in pairwise(ordered)]


async def _evenly(server: Server, count: int) -> list[Connection]:
    """Open connections, as many to each worker, in turns as chance has it.

    Whichever worker is awake first accepts, so left alone one of them may get nearly all.
    """
    quota = count // server.workers
    kept: dict[int, list[Connection]] = {}
    for _ in range(_TRIES * count):
        if sum(map(len, kept.values())) == quota * server.workers:
            break
        connection = await Connection.open(server.port)
        connection.send("/pid", "")
        _, body = await connection.answer()
        of_worker = kept.setdefault(int(body), [])
        if len(of_worker) < quota:
            of_worker.append(connection)
        else:
            await connection.close()
    connections = [connection for of_worker in kept.values() for connection in of_worker]
    while len(connections) < count:
        connections.append(await Connection.open(server.port))
    random.shuffle(connections)
    return connections


def _out_of_order(served: list[int]) -> int:
    return sum(number != place for place, number in enumerate(served))


def increments(options: Options) -> Result:
    """200 increments of one session at once: none lost, in order, and without idle gaps."""
    return _increments(options, "increments: one session")


def redis_increments(options: Options) -> Result:
    """The same, with the session in Redis."""
    with RedisServer(options.folder) as redis:
        title = f"redis-increments: one session in {redis.version}"
        return _increments(options, title, redis.url, "Redis: ")


def _increments(options: Options, title: str, grid: str = "", where: str = "") -> Result:
    """Bursts for one session, of two numbers of workers.

    Args:
        grid: a connection string; by default, of an embedded grid.
        where: how the bounds' names begin.
    """
    count, rounds = options.pick(200, 60), options.pick(7, 2)
    result, rows = Result(), []
    for done, workers in enumerate((2, 4)):
        options.progress.at(done / 2, f"{workers} workers")
        runs = asyncio.run(_measure(options, grid, workers, count, rounds))
        ordered, at_once, fifties = runs["ordered"], runs["at once"], runs["fifties"]
        ratios = [x.wall / x.handlers for x in fifties]
        wrong = _out_of_order(ordered.served)
        for name, run in (("one by one", ordered), ("at once", at_once), ("50", fifties[0])):
            total = len(run.served)
            order = f"{_out_of_order(run.served)}" if run is ordered else ""
            shown = f"{workers} workers, {total if name == '50' else f'{total} {name}'}"
            shown += " at once" if name == "50" else ""
            rows.append(
                [
                    shown,
                    f"{run.survived}",
                    order,
                    f"{run.queued}",
                    " + ".join(map(str, run.workers)),
                    f"{run.gap * 1000:.2f}",
                    f"{run.wall * 1000:.0f}",
                    f"{run.handlers * 1000:.0f}",
                    f"{run.wall / run.handlers:.2f}" if run is not ordered else "",
                ]
            )
        lost = 2 * count - ordered.survived - at_once.survived
        lost += sum(50 - x.survived for x in fifties)
        result.checks += [
            Check(f"{where}increments lost, {workers} workers", lost, 0, exact=True),
            Check(
                f"{where}served out of order of {count}, {workers} workers", wrong, 0, exact=True
            ),
        ]
        if not grid:  # by a server between them it is shown, and bound by `redis-handoff`
            what = f"50 at once, of the sum of their handlers' times, {workers} workers"
            result.checks.append(Check(what, median(ratios), 1.3, " ×"))
        result.figures[f"{workers} workers"] = {
            "ordered": vars(ordered),
            "at once": vars(at_once),
            "fifties": [vars(x) for x in fifties],
        }
    result.tables.append(
        Table(
            f"{title}, a handler that takes 5 ms between reading and writing",
            (
                "",
                "survived",
                "out of order",
                "queued",
                "by worker",
                "gap ms",
                "ms",
                "handlers' ms",
                "ratio",
            ),
            rows,
            [
                "one by one: each is sent when the one before has its ticket; queued: how many "
                "waited then;",
                "gap: between the end of a handler and the begin of the next, median;",
                f"50 at once: one of {rounds} runs, whose median counts",
            ],
        )
    )
    return result
