"""Clients that go away, and more of them than may wait."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.farm.client import Reply, new_session, post, request_bytes, run, stored, until
from tests.farm.peek import peek
from tests.farm.servers import UVICORN, Server, farm_in

HYPERCORN = ("hypercorn", "-b", "127.0.0.1:PORT", "tests.farm.app:app")
GUNICORN = (
    *("gunicorn", "--no-control-socket", "-k", "asgi", "-b", "127.0.0.1:PORT"),
    "tests.farm.app:app",
)
SLACK = 1.0  # seconds that two busy cores may cost
SERVERS = pytest.mark.parametrize(
    "command",
    [(*UVICORN, "--http", "h11"), (*UVICORN, "--http", "httptools"), HYPERCORN, GUNICORN],
    ids=["uvicorn-h11", "uvicorn-httptools", "hypercorn", "gunicorn-asgi"],
)


async def send_only(server: Server, target: str, cookie: str) -> asyncio.StreamWriter:
    """A request whose answer nobody will read."""
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request_bytes("POST", target, cookie))
    await writer.drain()
    return writer


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


@SERVERS
def test_a_client_that_goes_while_it_waits_is_forgotten(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    with farm_in(tmp_path) as farm:
        server = farm.start(*command)

        async def main() -> None:
            cookie = await new_session(server)
            with peek(farm.grid) as grid:
                held = asyncio.create_task(post(server, "/gated?name=held&n=1", cookie))
                await until("the holder", (farm.marks / "in-held").exists)
                gone = await send_only(server, "/gated?name=gone&n=2", cookie)
                await until("a ticket", lambda: grid.tickets(cookie) == 1)
                patient = asyncio.create_task(post(server, "/add?n=3", cookie))
                await until("two tickets", lambda: grid.tickets(cookie) == 2)
                await hang_up(gone)
                await until("one ticket", lambda: grid.tickets(cookie) == 1, SLACK)
                farm.mark("go-held")
                assert (await held).status == 200
                released = time.monotonic()
                assert (await patient).status == 200
                assert time.monotonic() - released < SLACK
                assert not grid.is_locked(cookie)
            assert (await stored(server, cookie))["numbers"] == [0, 1, 3]
            assert not (farm.marks / "in-gone").exists()

        run(main())
        assert server.trouble() == []


@SERVERS
def test_promise_5_the_work_for_a_client_that_has_gone_is_kept(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    with farm_in(tmp_path) as farm:
        server = farm.start(*command)

        async def main() -> None:
            cookie = await new_session(server)
            with peek(farm.grid) as grid:
                gone = await send_only(server, "/gated?name=gone&n=1", cookie)
                await until("the handler", (farm.marks / "in-gone").exists)
                await hang_up(gone)
                # Another request's way through the same loop: the hanging up has been seen.
                assert (await post(server, "/add?n=2")).status == 200
                farm.mark("go-gone")
                await until("a commit", lambda: not grid.is_locked(cookie), 5)
            assert (await stored(server, cookie))["numbers"] == [0, 1]
            assert (await post(server, "/add?n=2", cookie)).status == 200

        run(main())
        assert server.trouble() == []


def test_more_clients_than_may_wait(tmp_path: Path) -> None:
    limit, surplus = 50, 10
    with farm_in(tmp_path, request_queue_limit_per_session=limit) as farm:
        servers = [farm.uvicorn(), farm.uvicorn()]

        async def main() -> None:
            cookie = await new_session(servers[0])
            held = asyncio.create_task(post(servers[0], "/gated?name=held&n=1", cookie))
            await until("the holder", (farm.marks / "in-held").exists)
            tasks = {
                n: asyncio.create_task(post(servers[n % 2], f"/add?n={n}", cookie))
                for n in range(2, 2 + limit + surplus)
            }
            with peek(farm.grid) as grid:
                await until("a full queue", lambda: grid.tickets(cookie) == limit)
            await until("refusals", lambda: sum(x.done() for x in tasks.values()) >= surplus)
            farm.mark("go-held")
            assert (await held).status == 200
            replies: dict[int, Reply] = {n: await task for n, task in tasks.items()}
            refused = {n for n, reply in replies.items() if reply.status == 503}
            assert {replies[n].headers["retry-after"] for n in refused} == {"5"}
            assert {n for n, reply in replies.items() if reply.status == 200} | refused == set(
                replies
            )
            assert len(refused) == surplus
            session = await stored(servers[0], cookie)
            assert sorted(session["numbers"]) == sorted({0, 1, *replies} - refused)
            assert session["count"] == 2 + limit

        run(main())


def test_expired_sessions_leave_the_store_without_being_asked_for(tmp_path: Path) -> None:
    sessions, timeout = 200, 1.0  # more than three batches of the sweeper
    with farm_in(tmp_path, timeout=timeout, sweep_interval=0.2) as farm:
        server = farm.uvicorn("--workers", "2")

        async def make(n: int) -> None:
            for _ in range(n):
                await new_session(server)

        async def main() -> None:
            with peek(farm.grid) as grid:
                empty = grid.entries()
                began = time.monotonic()
                await asyncio.gather(*(make(sessions // 4) for _ in range(4)))
                if time.monotonic() - began < timeout:  # or else the first are gone already
                    assert grid.entries() - empty == 3 * sessions
                await until("an empty store", lambda: grid.entries() == empty, timeout + 3)

        run(main())
        assert server.trouble() == []


def test_promise_5_sync_handlers_in_threads_lose_no_update(tmp_path: Path) -> None:
    with farm_in(tmp_path) as farm:
        server = farm.uvicorn("--workers", "2", app="fastapi")

        async def main() -> None:
            cookie = await new_session(server, "/sync")
            replies = await asyncio.gather(
                *(post(server, f"/sync?hold=0.002&n={n}", cookie) for n in range(1, 41))
            )
            assert {reply.status for reply in replies} == {200}
            session = await stored(server, cookie)
            assert sorted(session["numbers"]) == list(range(41))
            assert session["count"] == 41

        run(main())
        assert server.trouble() == []
