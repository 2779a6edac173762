"""The least that a client of Redis can be in asyncio, to compare with."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import hiredis

# Its own annotation says that a command has one word.
_pack: Callable[[tuple[bytes, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]


class BareLoop(asyncio.Protocol):
    """Packs, parses and wakes, with one write a turn of the event loop, and nothing else."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._pending: deque[asyncio.Future[Any]] = deque()
        self._unsent: list[bytes] = []

    @classmethod
    async def to(cls, port: int) -> BareLoop:
        """A connection to a server on this machine."""
        loop = asyncio.get_running_loop()
        _, bare = await loop.create_connection(cls, "127.0.0.1", port)
        await bare.call(b"HELLO", b"3")
        return bare

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            self._pending.popleft().set_result(reply)

    def call(self, *words: bytes) -> asyncio.Future[Any]:
        future = self._loop.create_future()
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(_pack(words))
        self._pending.append(future)
        return future

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        self._transport.write(b"".join(unsent))
