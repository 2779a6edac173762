"""The memory grid keeps the grid contract, by a clock that stands still and by the machine's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import warnings
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from gridsession.errors import GridUnavailable
from gridsession.grids.clock import SystemClock
from gridsession.grids.contract import (
    Busy,
    Change,
    Claim,
    Committed,
    Conflict,
    Exists,
    Found,
    Gone,
    Granted,
    Grid,
    Locked,
    LockLost,
    Missing,
    NewRecord,
    Now,
    QueueFull,
    Released,
    Removed,
    Replaced,
    Version,
)
from gridsession.grids.embedded import EmbeddedGrid
from gridsession.grids.memory import MemoryGrid
from gridsession.grids.redis import RedisGrid
from gridsession.testing import GridContract, ManualClock

HURRY = 10


class TestMemory(GridContract):
    @contextlib.asynccontextmanager
    async def open_grid(self) -> AsyncIterator[Grid]:
        self.clock = ManualClock()
        grid = MemoryGrid(self.clock)
        await grid.open()
        yield grid
        await grid.close()

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)


class HurriedClock(SystemClock):
    """The machine's clock, ten times as fast."""

    def now(self) -> Now:
        wall, steady, boot_id = super().now()
        return Now(wall * HURRY, steady * HURRY, boot_id)


class TestMemoryInRealTime(GridContract):
    """The suite needs no clock that can be set: here time passes while it sleeps."""

    async def advance(self, seconds: float) -> None:
        await asyncio.sleep(seconds / HURRY)

    @contextlib.asynccontextmanager
    async def open_grid(self) -> AsyncIterator[Grid]:
        grid = MemoryGrid(HurriedClock())
        await grid.open()
        yield grid
        await grid.close()


class Distant(MemoryGrid):
    """A memory grid that yields before and after each call, as one behind a network does.

    So that the tests of cancellation, which find nothing to cancel in memory, are shown to work.
    """

    async def create(
        self, key: bytes, new: NewRecord, claim: Claim | None = None
    ) -> Committed | Exists:
        await asyncio.sleep(0)
        outcome = await super().create(key, new, claim)
        await asyncio.sleep(0)
        return outcome

    async def acquire(
        self, key: bytes, secret: bytes, claim: Claim, known: Version | None = None
    ) -> Granted | Busy | QueueFull | Replaced | Missing:
        await asyncio.sleep(0)
        outcome = await super().acquire(key, secret, claim, known)
        await asyncio.sleep(0)
        return outcome

    async def read(
        self,
        key: bytes,
        secret: bytes,
        watch: Claim | None = None,
        seen: bytes | None = None,
        known: Version | None = None,
    ) -> Found | Busy | QueueFull | Replaced | Missing:
        await asyncio.sleep(0)
        outcome = await super().read(key, secret, watch, seen, known)
        await asyncio.sleep(0)
        return outcome

    async def commit(
        self, key: bytes, token: bytes, change: Change, *, release: bool
    ) -> Committed | LockLost | Gone:
        await asyncio.sleep(0)
        outcome = await super().commit(key, token, change, release=release)
        await asyncio.sleep(0)
        return outcome

    async def commit_if(
        self, key: bytes, secret: bytes, base: Version, change: Change
    ) -> Committed | Conflict | Locked | Replaced | Gone:
        await asyncio.sleep(0)
        outcome = await super().commit_if(key, secret, base, change)
        await asyncio.sleep(0)
        return outcome

    async def renew(self, leases: Sequence[tuple[bytes, bytes]], lease: float) -> list[bool]:
        await asyncio.sleep(0)
        answers = await super().renew(leases, lease)
        await asyncio.sleep(0)
        return answers

    async def release(self, key: bytes, token: bytes) -> Released | LockLost | Gone:
        await asyncio.sleep(0)
        outcome = await super().release(key, token)
        await asyncio.sleep(0)
        return outcome

    async def touch(self, key: bytes) -> bool:
        await asyncio.sleep(0)
        answer = await super().touch(key)
        await asyncio.sleep(0)
        return answer

    async def remove(self, key: bytes, token: bytes | None = None) -> Removed | LockLost | Gone:
        await asyncio.sleep(0)
        outcome = await super().remove(key, token)
        await asyncio.sleep(0)
        return outcome

    async def sweep(self, limit: int) -> int:
        await asyncio.sleep(0)
        answer = await super().sweep(limit)
        await asyncio.sleep(0)
        return answer


class TestDistantMemory(GridContract):
    @contextlib.asynccontextmanager
    async def open_grid(self) -> AsyncIterator[Grid]:
        self.clock = ManualClock()
        yield Distant(self.clock)

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)


class ByHalves(Distant):
    """Commits in two steps, with an await between them: what promise 7 forbids."""

    async def commit(
        self, key: bytes, token: bytes, change: Change, *, release: bool
    ) -> Committed | LockLost | Gone:
        first = Change(change.commit_token, change.payload, 1000.0, None)
        await super().commit(key, token, first, release=False)
        return await super().commit(key, token, change, release=release)


class ForgetsItsCommits(Distant):
    """A commit without a lock that is not known again when it is repeated."""

    async def commit_if(
        self, key: bytes, secret: bytes, base: Version, change: Change
    ) -> Committed | Conflict | Locked | Replaced | Gone:
        again = replace(change, commit_token=secrets.randbits(64))
        return await super().commit_if(key, secret, base, again)


class SwallowsCancellation(Distant):
    async def touch(self, key: bytes) -> bool:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return await super().touch(key)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (ByHalves, "test_promise_7_commit_cancelled"),
        (ForgetsItsCommits, "test_promise_7_commit_if_cancelled"),
        (SwallowsCancellation, "test_promise_7_renew_and_touch_cancelled"),
    ],
)
def test_the_suite_finds_what_breaks_when_cancelled(broken: type[Distant], test: str) -> None:
    class Suite(TestDistantMemory):
        @contextlib.asynccontextmanager
        async def open_grid(self) -> AsyncIterator[Grid]:
            yield broken(ManualClock())

    with pytest.raises(AssertionError):
        getattr(Suite(), test)()


# -- what is special to memory ------------------------------------------------------------------

KEY, SECRET, TOKEN = b"k" * 32, b"s" * 32, b"t" * 16


def _new(timeout: float) -> NewRecord:
    return NewRecord(1, SECRET, b"payload", timeout, None, None)


def _claim(token: bytes) -> Claim:
    return Claim(token, "GET /", 0.5, 50)


def test_where_says_that_nobody_else_sees_it() -> None:
    assert MemoryGrid.where == "memory:// (this process only)"


def test_only_what_is_on_this_machine_is_read_for_less_than_a_cache_costs() -> None:
    assert (MemoryGrid.is_local, EmbeddedGrid.is_local, RedisGrid.is_local) == (True, True, False)


def test_ended_records_leave_nothing_in_memory() -> None:
    clock = ManualClock()

    async def scenario() -> MemoryGrid:
        grid = MemoryGrid(clock)
        for number in range(20):
            key = bytes([number]) * 32
            await grid.create(key, _new(timeout=10.0), _claim(TOKEN))
            assert type(await grid.acquire(key, SECRET, _claim(key[:16]))) is Busy
            if number % 2:
                await grid.remove(key)
                assert type(await grid.acquire(key, SECRET, _claim(key[:16]))) is Missing
            else:
                await grid.release(key, key[:16])
        clock.advance(11.0)
        while await grid.sweep(7) == 7:
            pass
        return grid

    grid = asyncio.run(scenario())
    assert not grid._table._records
    assert not grid._table._payloads
    assert not grid._table._deadlines
    assert not grid._bells._waiters


def test_deadlines_that_come_nearer_leave_one_entry_in_the_end() -> None:
    """An entry that is not its record's own any more must not beget another."""
    clock = ManualClock()

    async def scenario() -> list[int]:
        grid = MemoryGrid(clock)
        await grid.create(KEY, _new(timeout=100.0))
        entries = []
        for turn in range(30):
            claim = Claim(turn.to_bytes(16), "GET /", 30.0, 50)
            assert type(await grid.acquire(KEY, SECRET, claim)) is Granted
            change = Change(100 + turn, None, 100.0 if turn % 2 else 50.0, None)
            await grid.commit(KEY, claim.token, change, release=True)
            clock.advance(45.0)
            while await grid.sweep(1) == 1:
                pass
            entries.append(len(grid._table._deadlines))
        return entries

    assert max(asyncio.run(scenario())) <= 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_use_in_a_forked_process_is_refused_with_the_reason() -> None:
    grid = MemoryGrid()

    async def calls(key: bytes) -> list[str]:
        texts = []
        for call in (
            grid.create(key, _new(10.0)),
            grid.acquire(key, SECRET, _claim(TOKEN)),
            grid.read(key, SECRET),
            grid.commit(key, TOKEN, Change(2, b"x", 10.0, None), release=True),
            grid.commit_if(key, SECRET, Version(1, 1), Change(2, b"x", 10.0, None)),
            grid.renew([(key, TOKEN)], 1.0),
            grid.release(key, TOKEN),
            grid.touch(key),
            grid.remove(key),
            grid.sweep(1),
        ):
            try:
                texts.append(f"answered {await call!r}")
            except GridUnavailable as error:
                texts.append(str(error))
        return texts

    asyncio.run(grid.create(KEY, _new(10.0)))  # one key that is there, and one that is not
    for key in (KEY, b"n" * 32):
        read_end, write_end = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of others, Python 3.12
            child = os.fork()
        if child == 0:
            try:
                os.write(write_end, "\n".join(asyncio.run(calls(key))).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            texts = pipe.read().splitlines()
        os.waitpid(child, 0)
        assert len(texts) == 10
        for text in texts:
            assert "memory:// was opened in one process and used in another" in text
            assert "embedded:" in text
