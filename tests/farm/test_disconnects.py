"""Clients that hang up, in each server's way of telling it.

uvicorn and hypercorn speak an ASGI older than 2.4, under which Starlette listens for the client's
going beside a stream, and cancels it; gunicorn speaks 2.4. A plain response is cancelled by none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import psutil
import pytest

from tests.farm.client import ask, new_session, post, request_bytes, run, stored, until
from tests.farm.peek import peek
from tests.farm.servers import Server, farm_in

UVICORN = ("uvicorn", "tests.farm.attacked:app", "--port", "PORT")
HYPERCORN = ("hypercorn", "-b", "127.0.0.1:PORT", "tests.farm.attacked:app")
GUNICORN = (
    *("gunicorn", "--no-control-socket", "-k", "asgi", "-b", "127.0.0.1:PORT"),
    "tests.farm.attacked:app",
)
SERVERS = pytest.mark.parametrize(
    "command",
    [(*UVICORN, "--http", "h11"), (*UVICORN, "--http", "httptools"), HYPERCORN, GUNICORN],
    ids=["uvicorn-h11", "uvicorn-httptools", "hypercorn", "gunicorn-asgi"],
)
ANSWERS = pytest.mark.parametrize("path", ["/gated", "/gated-stream"], ids=["plain", "streamed"])
PROMPT = 2.0  # seconds; a lock that nobody hands on is free after its lease, which is 15


class Client:
    """A client that may hang up; at the block's end it does."""

    def __init__(self, server: Server, target: str, cookie: str) -> None:
        self._server = server
        self._request = request_bytes("POST", target, cookie)

    async def __aenter__(self) -> Client:
        self.reader, self._writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writer.write(self._request)
        await self._writer.drain()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def hang_up(self) -> None:
        """And wait until the server has seen it: it has answered somebody who came after."""
        self._writer.close()
        await self._writer.wait_closed()
        assert (await ask(self._server, "GET", "/heartbeat")).status == 200


@SERVERS
@ANSWERS
def test_an_answer_to_a_client_that_went_during_the_handler_commits(
    tmp_path: Path, command: tuple[str, ...], path: str
) -> None:
    with farm_in(tmp_path) as farm:
        server = farm.start(*command)

        async def main() -> None:
            cookie = await new_session(server)
            async with Client(server, f"{path}?name=gone&n=1", cookie) as client:
                await until("the handler", (farm.marks / "in-gone").exists)
                await client.hang_up()
            farm.mark("go-gone")
            with peek(farm.grid) as grid:
                await until("a commit", lambda: not grid.is_locked(cookie), PROMPT)
            assert (await stored(server, cookie))["numbers"] == [0, 1]

        run(main())
        assert server.trouble() == []


@SERVERS
@ANSWERS
def test_a_client_that_goes_while_the_commit_is_on_its_way_undoes_no_part_of_it(
    tmp_path: Path, command: tuple[str, ...], path: str
) -> None:
    with farm_in(tmp_path, grid_timeout=20) as farm:
        server = farm.start(*command)

        async def main() -> None:
            cookie = await new_session(server)
            async with Client(server, f"{path}?name=gone&n=1", cookie) as client:
                await until("the handler", (farm.marks / "in-gone").exists)
                stuck = farm.run_helper("tests.farm.stuck", str(farm.grid))
                await until("a process in the gate", lambda: is_stopped(stuck.pid))
                farm.mark("go-gone")
                await until("the handler's end", (farm.marks / "out-gone").exists)
                await client.hang_up()
            with peek(farm.grid) as grid:
                assert grid.is_locked(cookie)  # the commit has not arrived
                os.kill(stuck.pid, signal.SIGCONT)
                await until("a commit", lambda: not grid.is_locked(cookie), PROMPT)
            assert (await stored(server, cookie))["numbers"] == [0, 1]
            assert (await post(server, "/add?n=2", cookie)).status == 200

        run(main())
        assert server.trouble() == []


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


@SERVERS
def test_a_block_in_a_stream_whose_client_has_gone_is_forgotten_or_done(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    with farm_in(tmp_path) as farm:
        server = farm.start(*command)

        async def main() -> None:
            cookie = await new_session(server)
            with peek(farm.grid) as grid:
                async with Client(server, "/locking-stream?name=gone&n=1", cookie) as client:
                    await until("the block", (farm.marks / "in-gone").exists)
                    assert (await client.reader.readline()).startswith(b"HTTP/1.1 200")
                    assert grid.is_locked(cookie)
                    await client.hang_up()
                cancels = command is not GUNICORN
                if cancels:
                    await until("the cancelling", (farm.marks / "cut-gone").exists)
                else:  # it tells a stream when it sends; what it does until then is done
                    farm.mark("go-gone")
                await until("a free lock", lambda: not grid.is_locked(cookie), PROMPT)
            assert (await stored(server, cookie))["numbers"] == ([0] if cancels else [0, 1])
            assert (await post(server, "/add?n=2", cookie)).status == 200

        run(main())
        assert server.trouble() == []


ENDS = pytest.mark.parametrize(
    "command",
    [(*UVICORN, "--timeout-graceful-shutdown", "0"), (*HYPERCORN, "--graceful-timeout", "0")],
    ids=["uvicorn", "hypercorn"],
)


@ENDS
def test_a_handler_that_its_server_cancels_at_its_end_is_undone(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    with farm_in(tmp_path) as farm:
        server, other = farm.start(*command), farm.uvicorn()

        async def main() -> None:
            cookie = await new_session(other)
            async with Client(server, "/gated-stream?name=cut&n=1", cookie):
                await until("the handler", (farm.marks / "in-cut").exists)
                await asyncio.to_thread(server.stop)
            assert (farm.marks / "cut-cut").exists()
            with peek(farm.grid) as grid:
                assert not grid.is_locked(cookie)  # it has not been left to its lease
            assert (await stored(other, cookie))["numbers"] == [0]
            assert (await post(other, "/add?n=3", cookie)).status == 200

        run(main())


@ENDS
@pytest.mark.parametrize("holds", ["here", "elsewhere"])
def test_those_who_wait_leave_nothing_when_their_server_ends(
    tmp_path: Path, command: tuple[str, ...], holds: str
) -> None:
    with farm_in(tmp_path) as farm:
        server, other = farm.start(*command), farm.uvicorn()

        async def main() -> None:
            cookie = await new_session(other)
            holder = server if holds == "here" else other
            async with contextlib.AsyncExitStack() as clients:
                await clients.enter_async_context(Client(holder, "/gated?name=held&n=1", cookie))
                await until("the holder", (farm.marks / "in-held").exists)
                with peek(farm.grid) as grid:
                    for n in range(2, 5):
                        await clients.enter_async_context(Client(server, f"/add?n={n}", cookie))
                    await until("three tickets", lambda: grid.tickets(cookie) == 3)
                    await asyncio.to_thread(server.stop)
                    assert grid.tickets(cookie) == 0
                    assert grid.is_locked(cookie) is (holds == "elsewhere")
                    farm.mark("go-held")
                    await until("a free lock", lambda: not grid.is_locked(cookie), PROMPT)
            expected = [0] if holds == "here" else [0, 1]
            assert (await stored(other, cookie))["numbers"] == expected

        run(main())


# -- HTTP/2: many requests in one connection, each of which may be given up ------------------------


class Streams:
    """A connection of HTTP/2, begun without an upgrade."""

    def __init__(self, server: Server) -> None:
        self._server = server
        config = h2.config.H2Configuration(header_encoding="utf-8")
        self._connection = h2.connection.H2Connection(config)
        self.statuses: dict[int, int] = {}
        self._ended: dict[int, asyncio.Event] = {}

    async def __aenter__(self) -> Streams:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._connection.initiate_connection()
        self._flush()
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write(self._connection.data_to_send())

    async def _read(self) -> None:
        while data := await self._reader.read(65_536):
            for event in self._connection.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    self.statuses[event.stream_id] = next(
                        int(value)
                        for name, value in event.headers
                        if name == ":status"  # type: ignore[comparison-overlap]
                    )
                elif isinstance(event, h2.events.StreamEnded):
                    self._ended[event.stream_id].set()
            self._flush()

    def post(self, target: str, cookie: str) -> int:
        stream = self._connection.get_next_available_stream_id()
        self._ended[stream] = asyncio.Event()
        headers = [
            *((":method", "POST"), (":scheme", "http"), (":authority", "farm"), (":path", target)),
            ("cookie", f"session={cookie}"),
        ]
        self._connection.send_headers(stream, headers, end_stream=True)
        self._flush()
        return stream

    def give_up(self, stream: int) -> None:
        self._connection.reset_stream(stream)
        self._flush()

    async def answered(self, stream: int) -> int:
        async with asyncio.timeout(10):
            await self._ended[stream].wait()
        return self.statuses[stream]


def test_streams_of_http_2_that_are_given_up_are_forgotten_one_by_one(tmp_path: Path) -> None:
    with farm_in(tmp_path) as farm:
        server = farm.start(*HYPERCORN)

        async def main() -> None:
            cookie = await new_session(server)
            with peek(farm.grid) as grid:
                async with Streams(server) as streams:
                    held = streams.post("/gated?name=held&n=1", cookie)
                    await until("the holder", (farm.marks / "in-held").exists)
                    waiting = []
                    for n in range(2, 7):
                        waiting.append(streams.post(f"/add?n={n}", cookie))
                        await until("a ticket", lambda: grid.tickets(cookie) == len(waiting))
                    for stream in waiting[::2]:
                        streams.give_up(stream)
                    await until("two tickets", lambda: grid.tickets(cookie) == 2, PROMPT)
                    farm.mark("go-held")
                    assert [await streams.answered(x) for x in (held, *waiting[1::2])] == [200] * 3
                    # The holder's own client goes: its work is kept.
                    gone = streams.post("/gated-stream?name=gone&n=7", cookie)
                    await until("the handler", (farm.marks / "in-gone").exists)
                    streams.give_up(gone)
                    assert await streams.answered(streams.post("/heartbeat", "")) == 405
                    farm.mark("go-gone")
                    await until("a commit", lambda: not grid.is_locked(cookie), PROMPT)
                    last = streams.post("/add?n=8", cookie)
                    assert await streams.answered(last) == 200
            assert (await stored(server, cookie))["numbers"] == [0, 1, 3, 5, 7, 8]

        run(main())
        assert server.trouble() == []
