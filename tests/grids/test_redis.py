"""The Redis grid keeps the grid contract, by the server's clock and by one that stands still."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gridsession.errors import GridFull
from gridsession.grids.contract import Grid
from gridsession.grids.redis import RedisGrid
from gridsession.testing import (
    BoundedGridContract,
    GridContract,
    StoredGridContract,
)
from gridsession.testing.contract_hooks import Undo, a_new
from tests.clocked_redis import OnASetClock
from tests.redis_server import RedisServer, a_namespace, shared_server


def grid_at(url: str, namespace: str) -> RedisGrid:
    return RedisGrid.from_connection_string(url, namespace=namespace, timeout=2.0)


class TestRedis(GridContract, StoredGridContract):
    patience = 13.0  # the longest test

    @contextlib.asynccontextmanager
    async def open_grid(self) -> AsyncIterator[Grid]:
        self.namespace = a_namespace()
        grid = grid_at(shared_server().url, self.namespace)
        await grid.open()
        yield grid
        await grid.close()

    @contextlib.asynccontextmanager
    async def second_client(self, grid: Grid) -> AsyncIterator[Grid]:
        other = grid_at(shared_server().url, self.namespace)
        await other.open()
        yield other
        await other.close()

    async def make_newer_layout(self, grid: Grid, key: bytes) -> Undo:
        name = b"gs:%b:%b" % (self.namespace.encode(), key[:16])
        admin = shared_server().admin
        before = admin.getrange(name, 0, 0)
        admin.setrange(name, 0, bytes([before[0] + 1]))

        async def undo() -> None:
            admin.setrange(name, 0, before)

        return undo


class TestRedisByASetClock(OnASetClock, GridContract):
    """The waits that would be long, too."""

    @pytest.fixture(autouse=True)
    def use_server(self) -> None:
        self.url = shared_server().url


class TestFullRedis(BoundedGridContract):
    @pytest.fixture(autouse=True)
    def start_server(self, tmp_path: Path) -> Iterator[None]:
        with RedisServer(tmp_path, maxmemory="4mb", maxmemory_policy="noeviction") as self.server:
            yield

    @contextlib.asynccontextmanager
    async def open_grid(self) -> AsyncIterator[Grid]:
        grid = grid_at(self.server.url, a_namespace())
        await grid.open()
        yield grid
        await grid.close()

    async def make_full(self, grid: Grid) -> None:
        with contextlib.suppress(GridFull):
            for _ in range(10_000):
                await grid.create(
                    secrets.token_bytes(32), a_new(secrets.token_bytes(32), bytes(10_000))
                )
            raise AssertionError("it was never full")
        # Not by its last byte: what a smaller record would still find is taken, too.
        for _ in range(10_000):
            try:
                await grid.create(secrets.token_bytes(32), a_new(secrets.token_bytes(32), b""))
            except GridFull:
                return
