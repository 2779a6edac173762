"""Concurrent requests over workers: nothing is lost, nothing stays locked, also where one dies.

This module is the application, too: `make_app` serves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from gridsession import SessionProvider, SessionSettings
from gridsession.web.starlette import SessionMiddleware, session_of
from tests.farm.app import options
from tests.farm.client import Reply, ask, post, run, stored
from tests.farm.peek import peek
from tests.farm.servers import Farm, Server, farm_in
from tests.farm.test_servers import all_answer
from tests.redis_peek import Peek
from tests.redis_server import RedisServer

PAIRS = 150
HOLD = 0.004  # seconds that a handler takes between its read and its write
AT_ONCE = 2.0  # seconds on two busy cores; a lock that was left would cost its lease, 15
LEASE = 0.5  # seconds
SESSIONS = 4
KILLS = 3
ACCESS = {
    "/concurrent/*": "concurrent",
    "/exclusive/*": "exclusive",
    "/read": "read_only",
    "/heartbeat": "none",
}
PATHS = ("/concurrent/a", "/concurrent/b", "/exclusive/c")
GRIDS = pytest.mark.parametrize("grid", ["embedded", "redis"])
SERVED = ("uvicorn", "tests.farm.test_concurrent_farm:make_app", "--factory", "--port", "PORT")


# -- the application ------------------------------------------------------------------------------


def make_app() -> Starlette:
    """What the workers of these tests serve."""
    provider = SessionProvider(SessionSettings(**options() | {"access": ACCESS}))
    app = Starlette()

    async def add(request: Request) -> Response:
        """Add a number to the list under a key; how many merges this worker has made so far."""
        session, key = session_of(request), request.path_params["key"]
        numbers = list(session.get(key, []))
        await asyncio.sleep(HOLD)
        session[key] = [*numbers, int(request.query_params["n"])]
        return JSONResponse({"pid": os.getpid(), "merges": provider.merges})

    async def read(request: Request) -> Response:
        return JSONResponse(dict(request.session))

    async def heartbeat(request: Request) -> Response:
        return PlainTextResponse(str(os.getpid()))

    app.add_route("/concurrent/{key}", add, methods=["POST"])
    app.add_route("/exclusive/{key}", add, methods=["POST"])
    app.add_route("/read", read)
    app.add_route("/heartbeat", heartbeat)
    app.add_middleware(SessionMiddleware, provider=provider)
    return app


# -- the farms ------------------------------------------------------------------------------------


@dataclass
class Site:
    """Servers over one grid.

    Attributes:
        farm: where they are started.
        redis: their grid; None: an embedded one.
    """

    farm: Farm
    redis: RedisServer | None

    def start(self, *args: str) -> Server:
        return self.farm.start(*SERVED, *args)

    def is_locked(self, cookie: str) -> bool:
        """Whether somebody holds the session's lock, or waits for it."""
        if self.redis is not None:
            redis = Peek(self.redis, "farm")
            return redis.is_locked(cookie) or redis.tickets(cookie) != 0
        with peek(self.farm.grid, "farm") as grid:
            return grid.is_locked(cookie) or grid.tickets(cookie) != 0


@contextlib.contextmanager
def site_on(grid: str, folder: Path, **given: Any) -> Iterator[Site]:
    """Servers that are gone when the block ends, over a grid by its name."""
    with contextlib.ExitStack() as stack:
        redis = None
        if grid == "redis":
            redis = stack.enter_context(RedisServer(folder / "redis", appendonly="yes"))
            given["connection_string"] = redis.url
        yield Site(stack.enter_context(farm_in(folder, namespace="farm", **given)), redis)


async def begin(server: Server) -> str:
    """A session with nothing but one number in it; its id."""
    reply = await post(server, "/concurrent/begun?n=0")
    assert reply.status == 200, reply
    return reply.headers["set-cookie"].partition("=")[2].partition(";")[0]


@GRIDS
@pytest.mark.parametrize("other", ["concurrent", "exclusive"])
def test_promise_5_pairs_at_the_same_moment_both_survive(
    tmp_path: Path, grid: str, other: str
) -> None:
    with site_on(grid, tmp_path) as site:
        server = site.start("--workers", "4")
        run(send_pairs(site, server, other))
        server.stop()
        assert server.trouble() == []


async def send_pairs(site: Site, server: Server, other: str) -> None:
    await all_answer(server, 4)
    cookie = await begin(server)
    merges: dict[int, int] = {}
    longest = 0.0
    for n in range(PAIRS):
        pair = await asyncio.gather(
            post(server, f"/concurrent/a?n={n}", cookie),
            post(server, f"/{other}/b?n={n}", cookie),
        )
        for reply in pair:
            assert reply.status == 200, reply
            assert "set-cookie" not in reply.headers
            longest = max(longest, reply.took)
            merges[reply.json["pid"]] = max(reply.json["merges"], merges.get(reply.json["pid"], 0))
    data = await stored(server, cookie)
    survived = [n for n in range(PAIRS) if n in data["a"] and n in data["b"]]
    assert survived == data["a"] == data["b"] == list(range(PAIRS))
    assert not site.is_locked(cookie)
    after = await post(server, "/exclusive/c?n=1", cookie)
    assert (after.status, after.took < AT_ONCE) == (200, True)
    assert longest < AT_ONCE
    assert len(merges) > 1
    # Else they were never in one another's way, and it was no test.
    assert sum(merges.values()) > PAIRS // 10
    print(
        f"{len(survived)} of {PAIRS} pairs survived, {len(merges)} workers merged "
        f"{sum(merges.values())} times, longest answer {longest * 1000:.0f} ms"
    )


# -- deaths ---------------------------------------------------------------------------------------


@dataclass
class Account:
    """What the client of one key of a session knows.

    Attributes:
        sent, acknowledged: numbers, in order.
        refused: statuses other than 200.
    """

    path: str
    cookie: str
    sent: list[int] = field(default_factory=list)
    acknowledged: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)

    def check(self, kept: list[int]) -> None:
        """Everything acknowledged is there, in order, and nothing twice."""
        assert kept == sorted(set(kept))
        assert set(self.acknowledged) <= set(kept) <= set(self.sent)


class Attack:
    """Pairs of requests, one after the other for each session, and servers that die."""

    def __init__(self, site: Site, seed: int) -> None:
        self._site = site
        self._random = random.Random(seed)
        self._live = [site.start() for _ in range(3)]
        self._stopped = False
        self.accounts: list[Account] = []

    async def run(self, kills: int) -> None:
        cookies = [await begin(self._live[0]) for _ in range(SESSIONS)]
        async with asyncio.TaskGroup() as group:
            for cookie in cookies:
                group.create_task(self._send_pairs(cookie))
            try:
                for _ in range(kills):
                    await self._kill_one()
            finally:
                self._stopped = True
        for cookie in cookies:
            data = await stored(self._live[0], cookie)
            for account in self.accounts:
                if account.cookie == cookie:
                    account.check(data.get(account.path[-1], []))
            # A lock that died with its holder is free after its lease.
            after = await post(self._live[0], "/exclusive/z?n=1", cookie)
            assert (after.status, after.took < LEASE + AT_ONCE) == (200, True)
            assert not self._site.is_locked(cookie)

    async def _send_pairs(self, cookie: str) -> None:
        accounts = [Account(path, cookie) for path in PATHS]
        self.accounts += accounts
        n = 0
        while not self._stopped:
            n += 1
            # Of three, so that locks are held, waited for and left behind as well.
            pair = self._random.sample(accounts, 2)
            await asyncio.gather(*(self._send(account, n) for account in pair))

    async def _send(self, account: Account, n: int) -> None:
        account.sent.append(n)
        try:
            server = self._random.choice(self._live)
            reply: Reply = await post(server, f"{account.path}?n={n}", account.cookie)
        except OSError:
            return  # it died before it answered: stored or not
        if reply.status == 200:
            account.acknowledged.append(n)
        else:
            account.refused.append(reply.status)

    async def _kill_one(self) -> None:
        await asyncio.sleep(self._random.uniform(0.2, 0.4))
        victim = self._live.pop(self._random.randrange(len(self._live)))
        victim.kill()
        fresh = self._site.farm.launch(*SERVED)
        await asyncio.to_thread(fresh.wait_ready)
        assert (await ask(fresh, "GET", "/heartbeat")).status == 200
        self._live.append(fresh)

    def servers(self) -> list[Server]:
        return list(self._live)

    def was_refused(self) -> bool:
        return any(account.refused for account in self.accounts)

    def report(self) -> str:
        return (
            f"{KILLS} kills, {sum(len(x.sent) for x in self.accounts)} sent, "
            f"{sum(len(x.acknowledged) for x in self.accounts)} acknowledged, 0 lost, "
            f"refused {[x.refused for x in self.accounts if x.refused]}"
        )


@GRIDS
def test_promises_5_7_a_killed_worker_loses_nothing_that_was_acknowledged(
    tmp_path: Path, grid: str
) -> None:
    with site_on(grid, tmp_path, lock_lease=LEASE) as site:
        attack = Attack(site, seed=6)
        run(attack.run(KILLS))
        print(attack.report())
        for path in PATHS:
            served = sum(len(x.acknowledged) for x in attack.accounts if x.path == path)
            assert served > 20
        for server in attack.servers():
            server.stop()
            # A busy machine may take a lease from the living, too; it is reported, and counted.
            assert server.trouble() == [] or attack.was_refused()
