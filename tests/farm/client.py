"""A small HTTP client: one connection a request, so that any worker may get it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.farm.servers import Server

SECONDS = 40.0  # the longest that a request may take; longer than any wait for a lock


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    took: float  # seconds

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request_bytes(method: str, target: str, cookie: str = "") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: farm", "Connection: close", "Content-Length: 0"]
    if cookie:
        lines.append(f"Cookie: session={cookie}")
    return "\r\n".join([*lines, "", ""]).encode()


async def ask(server: Server, method: str, target: str, cookie: str = "") -> Reply:
    """One request.

    Raises:
        OSError: the server did not answer, or not whole.
        TimeoutError: not within `SECONDS`.
    """
    began = time.monotonic()
    async with asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(request_bytes(method, target, cookie))
            raw = await reader.read()
        finally:
            writer.close()
    head, separator, body = raw.partition(b"\r\n\r\n")
    if not separator:
        raise ConnectionResetError("the server closed the connection without an answer")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
    if len(body) != int(headers.get("content-length", len(body))):
        raise ConnectionResetError("the server closed the connection within an answer")
    return Reply(int(first.split()[1]), headers, body, time.monotonic() - began)


async def post(server: Server, target: str, cookie: str = "") -> Reply:
    return await ask(server, "POST", target, cookie)


async def new_session(server: Server, path: str = "/add") -> str:
    """Make a session with the number 0 in it; answers its id."""
    reply = await post(server, f"{path}?n=0")
    assert reply.status == 200, reply
    return reply.headers["set-cookie"].partition("=")[2].partition(";")[0]


async def stored(server: Server, cookie: str) -> dict[str, Any]:
    """What the last commit left."""
    reply = await ask(server, "GET", "/read", cookie)
    assert reply.status == 200, reply
    session: dict[str, Any] = reply.json
    return session


async def until(what: str, is_so: Callable[[], Any], seconds: float = 10.0) -> None:
    """`servers.wait_for`, while the other tasks of this loop go on."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        await asyncio.sleep(0.005)


class Pulse:
    """Asks a server's `/heartbeat` again and again: does its event loop go on?

    Attributes:
        longest: seconds that the slowest answer took.
    """

    def __init__(self, server: Server) -> None:
        self.longest = 0.0
        self.beats = 0
        self._server = server

    async def __aenter__(self) -> Pulse:
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            raise error

    async def _beat(self) -> None:
        while True:
            reply = await ask(self._server, "GET", "/heartbeat")
            assert reply.status == 200
            self.beats += 1
            self.longest = max(self.longest, reply.took)
            await asyncio.sleep(0.01)


_T = TypeVar("_T")


def run(main: Coroutine[Any, Any, _T], seconds: float = 60.0) -> _T:
    """Run a scenario, which may not hang."""

    async def bounded() -> _T:
        async with asyncio.timeout(seconds):
            return await main

    return asyncio.run(bounded())
