"""A server of scripted replies, for what no real one can be made to say or do on demand.

It runs in the test's own event loop and says of itself what a healthy Redis 7 says. A test then
sets single replies, and pushes, garbage and silence in place of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Self

import hiredis

Reply = bytes | None  # as it goes over the wire; None is silence
Answer = Reply | Callable[[list[bytes]], Reply]


def text(value: bytes | str) -> bytes:
    """A string, as a reply."""
    raw = value.encode() if isinstance(value, str) else value
    return b"$%d\r\n%b\r\n" % (len(raw), raw)


def hello(version: str = "7.0.15", mode: str = "standalone", role: str = "master") -> bytes:
    """What a server answers to `HELLO 3`."""
    fields = {"server": "redis", "version": version, "mode": mode, "role": role}
    return b"%%%d\r\n" % len(fields) + b"".join(
        text(name) + text(value) for name, value in fields.items()
    )


HEALTHY: Mapping[bytes, Answer] = {
    b"HELLO": hello(),
    b"PING": b"+PONG\r\n",
    b"SELECT": b"+OK\r\n",
    b"GET": b"_\r\n",
    b"EVALSHA": b"*0\r\n",  # to the question what is not permitted: nothing
    b"EVAL": b"*0\r\n",
    b"INFO": text("aof_enabled:1\r\n"),
    b"ZADD": b":1\r\n",
    b"ECHO": lambda words: text(words[1]),
}


class RespServer:
    """`async with RespServer() as server:` listens on a free port of loopback until the end.

    Args:
        replies: by the first word of the command, in place of a healthy server's. What has none
            is answered `ERR unknown command`, with the command in it, as Redis does.
        greeting: sent to each connection before it has asked anything; with `hangs_up` it is all
            that a connection gets.

    Attributes:
        replies: may be changed at any time.
        received: the commands of all connections, in the order of their arrival.
        reads: the sizes of what arrived at once.
        accepted: the loop's seconds at which connections were made.
    """

    def __init__(
        self,
        replies: Mapping[bytes, Answer] | None = None,
        *,
        greeting: bytes = b"",
        hangs_up: bool = False,
    ) -> None:
        self.replies: dict[bytes, Answer] = {**HEALTHY, **(replies or {})}
        self.received: list[list[bytes]] = []
        self.reads: list[int] = []
        self.accepted: list[float] = []
        self._greeting = greeting
        self._hangs_up = hangs_up
        self._writers: set[asyncio.StreamWriter] = set()
        self._listener: asyncio.Server | None = None

    @property
    def url(self) -> str:
        assert self._listener is not None
        return f"redis://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/0"

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.close()
        self.cut()
        while self._writers:  # noqa: ASYNC110 - each ends by itself once its connection is cut
            await asyncio.sleep(0.001)

    def send(self, raw: bytes) -> None:
        """To every connection, asked or not."""
        for writer in self._writers:
            writer.write(raw)

    def cut(self) -> None:
        """End every connection at once."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.append(asyncio.get_running_loop().time())
        self._writers.add(writer)
        try:
            writer.write(self._greeting)
            if not self._hangs_up:
                with contextlib.suppress(OSError):
                    await self._answer(reader, writer)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        commands = hiredis.Reader()  # a command is sent in the form of a reply
        while data := await reader.read(1 << 20):
            self.reads.append(len(data))
            commands.feed(data)
            while words := commands.gets():
                self.received.append(words)
                reply = self._reply(words)
                if reply is not None:
                    writer.write(reply)

    def _reply(self, words: list[bytes]) -> Reply:
        name = words[0].upper()
        if name not in self.replies:
            told = b" ".join(b"'%b'" % word for word in words[1:])
            return b"-ERR unknown command '%b', with args beginning with: %b\r\n" % (name, told)
        answer = self.replies[name]
        return answer(words) if callable(answer) else answer
