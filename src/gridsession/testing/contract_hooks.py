"""What the parts of the grid contract suite share: the hooks of a suite, and short words."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import unittest
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from gridsession.grids.contract import (
    Busy,
    Change,
    Claim,
    Committed,
    Conflict,
    Found,
    Gone,
    Granted,
    Grid,
    Locked,
    Missing,
    NewRecord,
    QueueFull,
    Replaced,
    Rotation,
    Snapshot,
    Version,
)

LONG = 30.0  # seconds: a lease that ends in no test
SHORT = 0.25  # seconds: a lease or timeout whose end a test waits for; 100 calls to a near server
PAST_SHORT = 0.32  # seconds after which it has ended

Undo = Callable[[], Awaitable[None]]


class GridHooks:
    """What a suite tells about its grid; see `GridContract`."""

    patience: float = 4.0
    bound: float = 30.0

    def open_grid(self) -> AbstractAsyncContextManager[Grid]:
        """A fresh, empty, opened grid; closed afterwards. To be overridden."""
        raise NotImplementedError("a grid's suite overrides open_grid()")

    @contextlib.asynccontextmanager
    async def second_client(self, grid: Grid) -> AsyncIterator[Grid]:
        """Another grid object, opened, onto the records of `grid`; closed afterwards.

        Used for hand-overs between processes and, in a thread, between event loops. The grid
        itself by default, which is right where one process is all that can share it.
        """
        yield grid

    async def advance(self, seconds: float) -> None:
        """Let `seconds` pass on the grid's clock: in real time, unless overridden."""
        await asyncio.sleep(seconds)


Suite = TypeVar("Suite", bound=GridHooks)
Test = Callable[[Suite, Grid], Coroutine[Any, Any, None]]


def contract_test(*, takes: float = 1.0) -> Callable[[Test[Suite]], Callable[[Suite], None]]:
    """Make a synchronous test of a coroutine that is given an opened grid.

    Args:
        takes: seconds of the grid's clock that pass in it; more than the suite's `patience` of
            real time skips it.
    """

    def decorate(test: Test[Suite]) -> Callable[[Suite], None]:
        def run(self: Suite) -> None:
            if type(self).advance is GridHooks.advance and takes > self.patience:
                raise unittest.SkipTest(f"takes {takes:g} s of real time, patience is less")

            async def bounded() -> None:
                async with asyncio.timeout(self.bound), self.open_grid() as grid:
                    await test(self, grid)

            asyncio.run(bounded())

        # Not functools.wraps: pytest would follow __wrapped__ and ask for a fixture `grid`.
        run.__name__, run.__qualname__ = test.__name__, test.__qualname__
        run.__doc__, run.__module__ = test.__doc__, test.__module__
        return run

    return decorate


# -- short words ------------------------------------------------------------------------------

Expected = TypeVar("Expected")


def expect(kind: type[Expected], outcome: object) -> Expected:
    assert isinstance(outcome, kind), f"due: {kind.__name__}, the grid answered: {outcome!r}"
    return outcome


def a_token() -> bytes:
    return secrets.token_bytes(16)


def a_secret() -> bytes:
    return secrets.token_bytes(32)


def a_claim(
    holder: str = "GET /cart", *, lease: float = LONG, queue_limit: int | None = 50
) -> Claim:
    return Claim(a_token(), holder, lease, queue_limit)


def a_new(
    secret: bytes,
    payload: bytes = b"new",
    *,
    timeout: float = 1000.0,
    absolute: float | None = None,
    user: str | None = None,
) -> NewRecord:
    return NewRecord(secrets.randbits(64), secret, payload, timeout, absolute, user)


def a_change(
    payload: bytes | None,
    *,
    timeout: float = 1000.0,
    user: str | None = None,
    rotation: Rotation | None = None,
) -> Change:
    return Change(secrets.randbits(64), payload, timeout, user, rotation)


class Visitor:
    """One session at a grid: key, secret, and the calls with both filled in."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.key = secrets.token_bytes(32)
        self.secret = a_secret()

    def at(self, grid: Grid) -> Visitor:
        """The same session, reached through another client."""
        other = Visitor(grid)
        other.key, other.secret = self.key, self.secret
        return other

    async def create(
        self,
        payload: bytes = b"new",
        *,
        claim: Claim | None = None,
        timeout: float = 1000.0,
        absolute: float | None = None,
        user: str | None = None,
    ) -> Committed:
        new = a_new(self.secret, payload, timeout=timeout, absolute=absolute, user=user)
        return expect(Committed, await self.grid.create(self.key, new, claim))

    async def acquire(
        self, claim: Claim, secret: bytes | None = None, known: Version | None = None
    ) -> Granted | Busy | QueueFull | Replaced | Missing:
        return await self.grid.acquire(self.key, secret or self.secret, claim, known)

    async def locked(self, claim: Claim) -> Snapshot:
        """Take the lock, which has to be free."""
        return expect(Granted, await self.acquire(claim)).snapshot

    async def queued(self, claim: Claim) -> Busy:
        """Enter, or refresh, a ticket: the lock has to be held."""
        return expect(Busy, await self.acquire(claim))

    async def taken(self, claim: Claim) -> Snapshot:
        """Wait for the lock as a client does."""
        while isinstance(outcome := await self.acquire(claim), Busy):
            await self.grid.wait(self.key, claim.token, outcome.retry_in)
        return expect(Granted, outcome).snapshot

    async def read(
        self,
        secret: bytes | None = None,
        watch: Claim | None = None,
        seen: bytes | None = None,
        known: Version | None = None,
    ) -> Found | Busy | QueueFull | Replaced | Missing:
        return await self.grid.read(self.key, secret or self.secret, watch, seen, known)

    async def found(self) -> Snapshot:
        return expect(Found, await self.read()).snapshot

    async def commit(self, claim: Claim, change: Change, *, release: bool = False) -> Committed:
        done = await self.grid.commit(self.key, claim.token, change, release=release)
        return expect(Committed, done)

    async def commit_if(
        self, base: Version, change: Change, secret: bytes | None = None
    ) -> Committed | Conflict | Locked | Replaced | Gone:
        return await self.grid.commit_if(self.key, secret or self.secret, base, change)

    async def rotated(self, *, user_changed: bool = False) -> bytes:
        """Give the session a new secret under a lock of its own; answers the replaced one."""
        claim, old, new = a_claim(), self.secret, a_secret()
        await self.locked(claim)
        change = a_change(None, rotation=Rotation(new, user_changed))
        await self.commit(claim, change, release=True)
        self.secret = new
        return old

    async def wait(self, claim: Claim, seconds: float = 20.0) -> None:
        await self.grid.wait(self.key, claim.token, seconds)

    async def release(self, claim: Claim) -> object:
        return await self.grid.release(self.key, claim.token)


def payload_of(snapshot: Snapshot) -> bytes:
    """The payload, which has to be there."""
    assert snapshot.payload is not None
    return snapshot.payload


async def rings(visitor: Visitor, claim: Claim) -> None:
    """The bell of this claim has been rung, or is just being: `wait` does not take its time."""
    async with asyncio.timeout(5.0):
        await visitor.wait(claim, 60.0)


async def is_absent(visitor: Visitor, token: bytes) -> None:
    """Every call but `create` says that there is no such record, and leaves it at that."""
    grid, key = visitor.grid, visitor.key
    expect(Missing, await visitor.read())
    expect(Missing, await visitor.read(watch=a_claim()))
    expect(Missing, await visitor.acquire(a_claim()))
    for release in (False, True):
        change = a_change(b"back from the dead")
        expect(Gone, await grid.commit(key, token, change, release=release))
    expect(Gone, await visitor.commit_if(Version(1, 1), a_change(b"back from the dead")))
    expect(Gone, await grid.release(key, token))
    assert await grid.renew([(key, token)], 5.0) == [False]
    assert await grid.touch(key) is False
    expect(Gone, await grid.remove(key, token))
    expect(Gone, await grid.remove(key))
    expect(Missing, await visitor.read())
