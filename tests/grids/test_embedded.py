"""The embedded grid keeps the grid contract: alone, between processes, and durable."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import ormsgpack
import pytest

from gridsession.grids.contract import Grid
from gridsession.grids.embedded import EmbeddedGrid
from gridsession.grids.embedded.codec import HEAD, LAYOUT
from gridsession.testing import BoundedGridContract, GridContract, ManualClock, StoredGridContract
from gridsession.testing.contract_hooks import Undo
from tests.grids.embedded_process import memory_folder
from tests.grids.embedded_words import MIB, fill, inside, opened


class EmbeddedHooks(GridContract, StoredGridContract, BoundedGridContract):
    __test__ = False
    durable = False
    folder: Path
    clock: ManualClock

    @pytest.fixture(autouse=True)
    def _folder(self) -> Iterator[None]:
        with memory_folder() as self.folder:
            yield

    @contextlib.asynccontextmanager
    async def open_grid(self) -> AsyncIterator[Grid]:
        self.clock = ManualClock()
        async with self._opened() as grid:
            yield grid

    @contextlib.asynccontextmanager
    async def second_client(self, grid: Grid) -> AsyncIterator[Grid]:
        async with self._opened() as other:
            yield other

    def _opened(self) -> contextlib.AbstractAsyncContextManager[EmbeddedGrid]:
        return opened(self.folder, durable=self.durable, clock=self.clock)

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def make_newer_layout(self, grid: Grid, key: bytes) -> Undo:
        assert isinstance(grid, EmbeddedGrid)
        stored = grid._prefix + key + HEAD
        with inside(grid) as transaction:
            before = bytes(transaction.get(stored) or b"")
            layout, *row = ormsgpack.unpackb(before)
            assert layout == LAYOUT
            newer = ormsgpack.packb((LAYOUT + 1, "what this release does not know", *row))
            transaction.put(stored, newer)

        async def undo() -> None:
            with inside(grid) as transaction:
                assert transaction.get(stored) == newer, "it was not left alone"
                transaction.put(stored, before)

        return undo

    async def make_full(self, grid: Grid) -> None:
        assert isinstance(grid, EmbeddedGrid)
        await fill(grid, MIB // 4, 5000, 100)


class TestEmbedded(EmbeddedHooks):
    __test__ = True


class TestEmbeddedDurable(EmbeddedHooks):
    __test__ = True
    durable = True
