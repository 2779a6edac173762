"""A worker that is flooded, or never read from, goes on serving everybody else."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from tests.farm.client import (
    Pulse,
    Reply,
    ask,
    new_session,
    post,
    request_bytes,
    run,
    stored,
    until,
)
from tests.farm.peek import peek
from tests.farm.servers import Server, farm_in

FLOOD = 1_000
LIMIT = 50  # requests that may wait for one session
UVICORN = ("uvicorn", "tests.farm.attacked:app", "--port", "PORT", "--no-access-log")
HYPERCORN = ("hypercorn", "-b", "127.0.0.1:PORT", "tests.farm.attacked:app")
SERVERS = pytest.mark.parametrize(
    "command",
    [(*UVICORN, "--http", "h11"), (*UVICORN, "--http", "httptools"), HYPERCORN],
    ids=["uvicorn-h11", "uvicorn-httptools", "hypercorn"],
)
LIVELY = 10.0  # seconds within which anybody must be answered, on the busiest of machines


async def add_until(server: Server, cookie: str, is_over: asyncio.Event) -> list[Reply]:
    """Increments, one after the other, while something else goes on."""
    replies: list[Reply] = []
    while not is_over.is_set():
        replies.append(await post(server, f"/add?n={len(replies) + 1}", cookie))
    return replies


def test_a_thousand_requests_on_one_session_do_not_take_the_worker_from_others(
    tmp_path: Path,
) -> None:
    with farm_in(tmp_path, request_queue_limit_per_session=LIMIT) as farm:
        server = farm.start(*UVICORN)

        async def main() -> None:
            greedy, other = await new_session(server), await new_session(server)
            held = asyncio.create_task(post(server, "/gated?name=held&n=1", greedy))
            await until("the holder", (farm.marks / "in-held").exists)
            is_over = asyncio.Event()
            async with Pulse(server) as pulse:
                others = asyncio.create_task(add_until(server, other, is_over))
                flood = [
                    asyncio.create_task(post(server, f"/add?n={n}", greedy))
                    for n in range(2, 2 + FLOOD)
                ]
                await until(
                    "all that may not wait to be refused",
                    lambda: sum(x.done() for x in flood) >= FLOOD - LIMIT,
                    40,
                )
                with peek(farm.grid) as grid:
                    assert grid.tickets(greedy) == LIMIT
                before = pulse.beats
                await until("a beat while fifty wait", lambda: pulse.beats > before + 2)
                is_over.set()
                answered = await others
                farm.mark("go-held")
                replies = [await x for x in flood]
                assert pulse.longest < LIVELY
            assert (await held).status == 200
            assert [x.status for x in replies].count(200) == LIMIT
            refused = [x for x in replies if x.status == 503]
            assert len(refused) == FLOOD - LIMIT
            assert {x.headers["retry-after"] for x in refused} == {"5"}
            assert len(answered) >= 3
            assert {x.status for x in answered} == {200}
            assert max(x.took for x in answered) < LIVELY
            assert (await stored(server, other))["numbers"] == list(range(len(answered) + 1))
            assert len((await stored(server, greedy))["numbers"]) == 2 + LIMIT

        run(main())
        assert server.trouble() == []


def test_a_thousand_that_hang_up_leave_no_tickets(tmp_path: Path) -> None:
    with farm_in(tmp_path, request_queue_limit_per_session=LIMIT) as farm:
        server = farm.start(*UVICORN)

        async def main() -> None:
            greedy, other = await new_session(server), await new_session(server)
            held = asyncio.create_task(post(server, "/gated?name=held&n=1", greedy))
            await until("the holder", (farm.marks / "in-held").exists)
            with peek(farm.grid) as grid:
                for start in range(0, FLOOD, LIMIT):
                    gone = [
                        await request_without_reading(server, f"/add?n={start + n}", greedy)
                        for n in range(LIMIT)
                    ]
                    await until("tickets", lambda: grid.tickets(greedy) == LIMIT)
                    for connection in gone:
                        connection.close()
                    await until("no tickets", lambda: grid.tickets(greedy) == 0)
            assert (await post(server, "/add?n=1", other)).status == 200
            farm.mark("go-held")
            assert (await held).status == 200
            assert (await stored(server, greedy))["numbers"] == [0, 1]

        run(main())
        assert server.trouble() == []


async def request_without_reading(server: Server, target: str, cookie: str) -> socket.socket:
    """A request whose answer stays in the socket, which holds little."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", server.port))
    await loop.sock_sendall(connection, request_bytes("POST", target, cookie))
    return connection


@SERVERS
@pytest.mark.parametrize("how", ["streamed", "whole"])
def test_readers_that_do_not_read_hold_no_lock(
    tmp_path: Path, command: tuple[str, ...], how: str
) -> None:
    readers = range(1, 9)
    with farm_in(tmp_path) as farm:
        server = farm.start(*command)

        async def main() -> None:
            cookie = await new_session(server)
            unread = []
            for n in readers:
                unread.append(
                    await request_without_reading(
                        server, f"/big?mib=16&name={n}&n={n}&{how}", cookie
                    )
                )
                if how == "streamed":
                    await until("a stream", (farm.marks / f"in-{n}").exists)
                with peek(farm.grid) as grid:
                    await until("its commit", lambda: not grid.is_locked(cookie))
            assert (await post(server, "/add?n=9", cookie)).status == 200
            assert sorted((await stored(server, cookie))["numbers"]) == [0, *readers, 9]
            assert (await ask(server, "GET", "/heartbeat")).took < LIVELY
            # They were at it all the time: no stream has come to its end.
            assert not [n for n in readers if (farm.marks / f"out-{n}").exists()]
            for connection in unread:
                connection.close()
            assert (await post(server, "/add?n=10", cookie)).status == 200

        run(main())
        assert server.trouble() == []
