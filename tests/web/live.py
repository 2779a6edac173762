"""A real server, in this process, and a real WebSocket client."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Event,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from gridsession.web.types import ASGIApp
from tests.provider.harness import until


@contextlib.asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[int]:
    """Serve an application with uvicorn; the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config: Any = uvicorn.Config(
            app, ws="wsproto", log_config=None, lifespan="on", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve([listener]))
        await until(lambda: server.started or running.done())
        try:
            port: int = listener.getsockname()[1]
            yield port
        finally:
            server.should_exit = True
            await running


@dataclass
class Refusal(Exception):
    """The server answered the handshake with a response."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""


@dataclass
class WebSocketClient:
    """A connected socket.

    Attributes:
        headers: of the server's answer to the handshake.
    """

    _connection: WSConnection
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    headers: list[tuple[str, str]] = field(default_factory=list)

    async def next_event(self) -> Event:
        while True:
            for event in self._connection.events():
                return event
            self._connection.receive_data(await self._reader.read(65536) or None)

    def send(self, event: Event) -> None:
        self._writer.write(self._connection.send(event))

    async def ask(self, text: str) -> str:
        """Send one message, and get one."""
        self.send(TextMessage(text))
        answer = await self.next_event()
        assert isinstance(answer, TextMessage), answer
        return answer.data

    @property
    def set_cookies(self) -> list[str]:
        return values_of(self.headers, "set-cookie")


def values_of(headers: list[tuple[str, str]], name: str) -> list[str]:
    return [value for key, value in headers if key.lower() == name]


def cookie_of(line: str, name: str = "session") -> str:
    """The value in a `Set-Cookie` line."""
    assert line.startswith(f"{name}=")
    return line.partition("=")[2].partition(";")[0]


def _decoded(headers: Any) -> list[tuple[str, str]]:
    return [(bytes(key).decode(), bytes(value).decode()) for key, value in headers]


@contextlib.asynccontextmanager
async def connected(
    port: int, path: str = "/", cookie: str | None = None
) -> AsyncIterator[WebSocketClient]:
    """A socket at a server.

    Raises:
        Refusal: the server did not accept it.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    client = WebSocketClient(WSConnection(ConnectionType.CLIENT), reader, writer)
    try:
        headers = [] if cookie is None else [(b"cookie", f"session={cookie}".encode())]
        client.send(Request(host="test", target=path, extra_headers=headers))
        answer = await client.next_event()
        if isinstance(answer, RejectConnection):
            refusal = Refusal(answer.status_code, _decoded(answer.headers))
            while isinstance(part := await client.next_event(), RejectData):
                refusal.body += bytes(part.data)
                if part.body_finished:
                    break
            raise refusal
        assert isinstance(answer, AcceptConnection), answer
        client.headers = _decoded(answer.extra_headers)
        yield client
        client.send(CloseConnection(code=1000))
        await client.next_event()  # so that the server has ended its side
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
