"""Servers over a Redis that stands still, is away, comes back; and workers killed over one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gridsession.grids.contract import HAND_OFF_SECONDS
from gridsession.testing import FaultProxy
from tests.farm.client import Pulse, Reply, ask, new_session, post, run, stored, until
from tests.farm.servers import UVICORN, Farm, Server, farm_in
from tests.farm.test_deaths import CLIENTS, LEASE, SLACK, Chaos
from tests.redis_peek import Peek
from tests.redis_server import RedisServer

TIMEOUT = 1.0  # seconds; the default grid_timeout
BURST = 1_000  # requests at once
# Seconds for a burst on two busy cores that the clients share; one after the other, the waits of
# these requests would take a quarter of an hour.
BURST_TAKES = TIMEOUT + 2.0
BURST_COSTS = 64 << 20  # bytes of the worker's memory, sockets and buffers of all requests included
BACK_WITHIN = 1.0  # seconds
NAMESPACE = "farm"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis", appendonly="yes", appendfsync="always") as server:
        yield server


@contextlib.contextmanager
def farm_on(redis: RedisServer, folder: Path, **options: object) -> Iterator[Farm]:
    with farm_in(folder, connection_string=redis.url, namespace=NAMESPACE, **options) as farm:
        yield farm


def check_away(reply: Reply) -> None:
    assert (reply.status, reply.headers.get("retry-after")) == (503, "1")
    assert "set-cookie" not in reply.headers


async def answered_again(server: Server, cookie: str, n: int) -> float:
    """Seconds until a request with this cookie is answered, by adding `n`."""
    began = time.monotonic()
    while True:
        reply = await post(server, f"/add?n={n}", cookie)
        if reply.status == 200:
            assert "set-cookie" not in reply.headers
            return time.monotonic() - began
        check_away(reply)
        await asyncio.sleep(0.01)


async def check_without_cookie(server: Server) -> None:
    """Who has no session and stores nothing notices nothing of an outage."""
    for path in ("/look", "/read", "/heartbeat"):
        reply = await ask(server, "GET", path)
        assert reply.status == 200
        assert "set-cookie" not in reply.headers
    # A session that cannot be stored is none: the browser is not given an id that leads nowhere.
    reply = await post(server, "/add?n=1")
    assert reply.status == 500
    assert "set-cookie" not in reply.headers


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_promise_6_a_burst_of_a_thousand_while_redis_stands_still(
    redis: RedisServer, tmp_path: Path, loop: str
) -> None:
    with farm_on(redis, tmp_path) as farm:
        server = farm.uvicorn("--loop", loop)
        worker = psutil.Process(server.pid)

        async def burst(cookies: list[str]) -> tuple[list[Reply], float]:
            began = time.monotonic()
            replies = await asyncio.gather(
                *(post(server, "/add?n=9", cookies[n % len(cookies)]) for n in range(BURST))
            )
            return replies, time.monotonic() - began

        async def main() -> None:
            cookies = [await new_session(server) for _ in range(50)]
            # Everything that such a burst needs is there from here on.
            await asyncio.gather(*(ask(server, "GET", "/heartbeat") for _ in range(BURST)))
            memory = worker.memory_info().rss
            with redis.frozen():
                replies, first_took = await burst(cookies)
                for reply in replies:
                    check_away(reply)
                assert first_took < BURST_TAKES
                # It is known to be away now: nobody waits for it any more.
                replies, again_took = await burst(cookies)
                for reply in replies:
                    check_away(reply)
                assert again_took < BURST_TAKES
                replies = [await post(server, "/add?n=9", cookie) for cookie in cookies]
                assert sum(reply.took for reply in replies) < TIMEOUT
                await check_without_cookie(server)
                grown = worker.memory_info().rss - memory
                assert grown < BURST_COSTS
                await asyncio.sleep(2.0)
            back = await answered_again(server, cookies[0], 1)
            assert back < BACK_WITHIN
            print(
                f"bursts of {BURST}: {first_took:.2f} and {again_took:.2f} s, "
                f"{grown >> 10} KiB more, back after {back:.2f} s"
            )
            # None is emptied, none is locked, and nothing of those that were refused is stored.
            began = time.monotonic()
            for cookie in cookies[1:]:
                assert (await post(server, "/add?n=1", cookie)).status == 200
            assert time.monotonic() - began < LEASE + SLACK
            for cookie in cookies:
                assert (await stored(server, cookie))["numbers"] == [0, 1]

        run(main())
        assert server.process.poll() is None
        # Of the one whose handler had run and stored nothing; else, the outage is told once.
        assert server.said.count("Traceback") == 1
        assert server.said.count("sessions cannot be reached") == 1


def test_promise_6_each_request_is_answered_within_the_grid_timeout(
    redis: RedisServer, tmp_path: Path
) -> None:
    with farm_on(redis, tmp_path) as farm:
        servers = [farm.uvicorn("--loop", loop) for loop in ("asyncio", "uvloop")]

        async def main() -> None:
            cookie, other = await new_session(servers[0]), await new_session(servers[1])
            held = asyncio.create_task(post(servers[1], "/gated?name=held&n=1", other))
            await until("the holder", (farm.marks / "in-held").exists)
            waiting = asyncio.create_task(post(servers[0], "/add?n=2", other))
            await until("a ticket", lambda: Peek(redis, NAMESPACE).tickets(other) == 1)
            async with Pulse(servers[0]) as first, Pulse(servers[1]) as second:
                with redis.frozen():
                    for server in servers:
                        reply = await post(server, "/add?n=9", cookie)
                        check_away(reply)
                        assert TIMEOUT * 0.9 < reply.took < TIMEOUT + SLACK
                        check_away(await ask(server, "GET", "/read", cookie))
                    check_away(await waiting)
                    farm.mark("go-held")
                    reply = await held  # its handler ran: it is not to be repeated
                    assert (reply.status, "retry-after" in reply.headers) == (500, False)
                    assert reply.took < 5 * TIMEOUT
                assert max(first.longest, second.longest) < SLACK
            for server in servers:
                assert await answered_again(server, cookie, 1) < BACK_WITHIN
            # Its commit may have been on its way; whether or not, its lock is not kept.
            assert (await post(servers[0], "/add?n=3", other)).status == 200
            assert (await stored(servers[0], other))["numbers"] in ([0, 3], [0, 1, 3])
            assert (await stored(servers[0], cookie))["numbers"] == [0, 1, 1]

        run(main())


def test_promise_6_while_redis_is_away_cookies_stay_and_others_are_served(
    redis: RedisServer, tmp_path: Path
) -> None:
    with farm_on(redis, tmp_path) as farm:
        server = farm.uvicorn()

        async def main() -> None:
            cookies = [await new_session(server) for _ in range(20)]
            redis.kill()
            for _ in range(2):
                replies = await asyncio.gather(
                    *(post(server, "/add?n=9", cookies[n % 20]) for n in range(200))
                )
                for reply in replies:
                    check_away(reply)
                    assert reply.took < TIMEOUT + SLACK
                await check_without_cookie(server)
                await asyncio.sleep(1.0)
            redis.start()
            assert await answered_again(server, cookies[0], 1) < BACK_WITHIN
            for cookie in cookies[1:]:
                assert (await post(server, "/add?n=1", cookie)).status == 200
            for cookie in cookies:
                assert (await stored(server, cookie))["numbers"] == [0, 1]

        run(main())
        assert server.said.count("sessions cannot be reached") == 1


@pytest.mark.parametrize("how", ["away", "frozen"])
@pytest.mark.parametrize("lifespan", ["on", "off"])
def test_promise_6_a_worker_started_in_an_outage_serves_and_heals(
    redis: RedisServer, tmp_path: Path, how: str, lifespan: str
) -> None:
    with farm_on(redis, tmp_path) as farm:
        old = farm.uvicorn()
        cookie = run(new_session(old))
        if how == "away":
            redis.kill()
        else:
            redis.freeze()
        server = farm.uvicorn("--lifespan", lifespan)

        async def main() -> None:
            for _ in range(3):
                await check_without_cookie(server)
                for reply in await asyncio.gather(
                    *(post(server, "/add?n=9", cookie) for _ in range(100))
                ):
                    check_away(reply)
                    assert reply.took < TIMEOUT + SLACK
            if how == "away":
                redis.start()
            else:
                redis.thaw()
            assert await answered_again(server, cookie, 1) < BACK_WITHIN
            assert (await post(server, "/add?n=2", cookie)).status == 200
            assert (await stored(server, cookie))["numbers"] == [0, 1, 2]
            assert "set-cookie" in (await post(server, "/add?n=1")).headers

        run(main())
        if lifespan == "on":
            assert server.said.count("the session grid is not there yet: ") == 1


@pytest.mark.parametrize("is_noticed", [True, False])
def test_promise_6_a_partition_costs_the_grid_timeout(
    redis: RedisServer, tmp_path: Path, is_noticed: bool
) -> None:
    """A firewall forgets the connection, and whether or not somebody asked meanwhile, it heals."""

    async def main() -> None:
        async with FaultProxy("127.0.0.1", redis.port) as proxy:
            url = f"redis://127.0.0.1:{proxy.port}/0"
            with farm_in(tmp_path, connection_string=url, namespace=NAMESPACE) as farm:
                server = await asyncio.to_thread(farm.uvicorn)
                cookie = await new_session(server)
                proxy.partition()
                if is_noticed:
                    reply = await post(server, "/add?n=9", cookie)
                    check_away(reply)
                    assert TIMEOUT * 0.9 < reply.took < TIMEOUT + SLACK
                    await check_without_cookie(server)
                proxy.heal()
                back = await answered_again(server, cookie, 1)
                assert back < (BACK_WITHIN if is_noticed else TIMEOUT + SLACK)
                assert (await stored(server, cookie))["numbers"] == [0, 1]

    run(main())


def test_an_empty_redis_gives_everybody_a_new_session(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as redis, farm_on(redis, tmp_path) as farm:
        server = farm.uvicorn()

        async def main() -> None:
            cookies = [await new_session(server) for _ in range(10)]
            redis.kill()
            redis.start()
            fresh = []
            assert await answered_anew(server, cookies[0]) < BACK_WITHIN
            for n, cookie in enumerate(cookies):
                reply = await post(server, f"/add?n={n}", cookie)
                assert reply.status == 200
                fresh.append(reply.headers["set-cookie"].partition("=")[2].partition(";")[0])
            assert len(set(fresh) | set(cookies)) == 20  # an id that nobody knows is not adopted
            for n, cookie in enumerate(fresh):
                assert (await stored(server, cookie))["numbers"] == [n]

        run(main())
        assert "Traceback" not in server.said


async def answered_anew(server: Server, cookie: str) -> float:
    """Seconds until a request that stores nothing is answered."""
    began = time.monotonic()
    while (reply := await ask(server, "GET", "/look", cookie)).status != 200:
        check_away(reply)
        await asyncio.sleep(0.01)
    assert reply.json == {}
    return time.monotonic() - began


# -- deaths -------------------------------------------------------------------------------------


def attack(redis: RedisServer, folder: Path, kills: int, seed: int) -> None:
    with farm_on(redis, folder, lock_lease=LEASE) as farm:
        chaos = Chaos(farm, seed)
        run(chaos.run(kills), 30 + 5 * kills)
        print(chaos.report())
        # As on the embedded grid; a dead waiter may be handed the lock, and costs two seconds.
        assert chaos.longest_outage() < CLIENTS * HAND_OFF_SECONDS + SLACK
        for server in chaos.servers():
            server.stop()
            assert server.trouble() == [] or chaos.was_refused()
        assert redis.admin.client_list(_type="pubsub") == []


def test_promises_1_5_7_killed_workers_on_redis_lose_nothing_that_was_acknowledged(
    redis: RedisServer, tmp_path: Path
) -> None:
    attack(redis, tmp_path, kills=5, seed=4)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [5, 6])
def test_promises_1_5_7_a_hundred_killed_workers_on_redis(
    redis: RedisServer, tmp_path: Path, seed: int
) -> None:
    attack(redis, tmp_path, kills=100, seed=seed)


class RedisChaos(Chaos):
    """Clients that increment, and a Redis that dies."""

    def __init__(self, farm: Farm, redis: RedisServer, seed: int) -> None:
        super().__init__(farm, seed)
        self._redis = redis

    async def _kill_one(self) -> None:
        await asyncio.sleep(self._random.uniform(0.2, 0.5))
        moment = time.monotonic()
        self._redis.kill()
        self.kills.append(moment)
        await asyncio.sleep(self._random.uniform(0, 0.5))
        await asyncio.to_thread(self._redis.start)
        await until(
            "an answer for each session",
            lambda: all(x.answered_at and x.answered_at[-1] > moment for x in self.ledgers),
            20,
        )


def test_promises_4_5_a_killed_redis_loses_nothing_that_was_acknowledged(
    redis: RedisServer, tmp_path: Path
) -> None:
    with farm_on(redis, tmp_path, lock_lease=LEASE) as farm:
        chaos = RedisChaos(farm, redis, 7)
        run(chaos.run(5))
        print(chaos.report())
        refused: Counter[int] = Counter()
        for ledger in chaos.ledgers:
            refused.update(ledger.refused)
        assert set(refused) == {500, 503} or set(refused) == {503}


def test_promise_7_a_dead_holders_lock_on_redis_is_free_after_its_lease(
    redis: RedisServer, tmp_path: Path
) -> None:
    with farm_on(redis, tmp_path, lock_lease=LEASE) as farm:
        doomed, other = farm.uvicorn(), farm.start(*UVICORN)

        async def main() -> None:
            cookie = await new_session(other)
            held = asyncio.create_task(post(doomed, "/gated?name=held&n=1", cookie))
            await until("the holder", (farm.marks / "in-held").exists)
            waiting = asyncio.create_task(post(other, "/add?n=2", cookie))
            await until("a ticket", lambda: Peek(redis, NAMESPACE).tickets(cookie) == 1)
            died = time.monotonic()
            doomed.kill()
            assert (await waiting).status == 200
            assert time.monotonic() - died < LEASE + SLACK
            with pytest.raises(ConnectionError):
                await held
            assert (await stored(other, cookie))["numbers"] == [0, 2]

        run(main())
