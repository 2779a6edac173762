"""A Redis grid on a clock that a test sets: its scripts ask a key for the time, not the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from hashlib import sha1
from typing import Any

from gridsession.grids.contract import Clock, Grid
from gridsession.grids.redis.connections import Connections
from gridsession.grids.redis.grid import RedisGrid
from gridsession.grids.redis.scripts import Script
from gridsession.grids.redis.server import Server, Word
from gridsession.sources.connection_string import RedisAddress, parse
from gridsession.testing import ManualClock
from tests.redis_server import a_namespace

_TIME = b"local time = redis.call('TIME')"
_CLOCK = b"""
local time = {}
time[1], time[2] = string.match(
    redis.call('GET', string.match(KEYS[1], '^gs:[^:]*:') .. 'clock'), '(%d+) (%d+)')
"""
_TTL = b"string.format('%.0f', last * 1000)"  # the server would go by its own clock
_NO_TTL = b"'9999999999999'"


class ClockedRedisGrid(RedisGrid):
    """The real grid and its real scripts, but for where they take the time from.

    Args:
        url: of the server.
        clock: its wall clock is the only one that a Redis has.
    """

    def __init__(self, url: str, clock: Clock, *, namespace: str, timeout: float = 2.0) -> None:
        address = parse(url)
        assert isinstance(address, RedisAddress)
        server = Server.at(address)
        super().__init__(server, namespace=namespace, timeout=timeout)
        self._clock = clock
        self.connections = _Clocked(server, clock, self.names.prefix + b"clock", timeout)

    async def _server_time(self) -> float:
        return self._wall()

    def _wall(self) -> float:
        return self._clock.now().wall


class OnASetClock:
    """What a suite of the contract needs to run by such a clock: mixed in ahead of it.

    Attributes:
        url: of the server; set before a test.
        namespace: set as well where it has to be a certain one.
    """

    url: str
    namespace: str | None = None

    @contextlib.asynccontextmanager
    async def open_grid(self) -> AsyncIterator[Grid]:
        self.clock = ManualClock()
        self._namespace = self.namespace or a_namespace()
        async with self.second_client(None) as grid:
            yield grid

    @contextlib.asynccontextmanager
    async def second_client(self, grid: Grid | None) -> AsyncIterator[Grid]:
        other = ClockedRedisGrid(self.url, self.clock, namespace=self._namespace)
        await other.open()
        yield other
        await other.close()

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)


class _Clocked(Connections):
    """Tells the server the time before each script.

    Args:
        key: where it is told.
    """

    def __init__(self, server: Server, clock: Clock, key: bytes, timeout: float) -> None:
        super().__init__(server, timeout=timeout)
        self._clock = clock
        self._key = key
        self._changed: dict[bytes, Script] = {}

    def run(self, script: Script, name: bytes, *arguments: Word) -> asyncio.Future[Any]:
        changed = self._changed.get(script.sha)
        if changed is None:
            source = script.source
            assert source.count(_TIME) <= 1
            source = source.replace(_TIME, _CLOCK).replace(_TTL, _NO_TTL)
            changed = Script(source, sha1(source).hexdigest().encode(), script.repeats)
            self._changed[script.sha] = changed
        seconds, micros = divmod(round(self._clock.now().wall * 1e6), 1_000_000)
        setting = self.ends().link.call(b"SET", self._key, f"{seconds} {micros:06d}")
        setting.add_done_callback(lambda it: it.cancelled() or it.exception())
        return super().run(changed, name, *arguments)
