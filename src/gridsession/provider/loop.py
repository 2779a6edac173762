"""What runs beside the requests of one event loop: renewal, withdrawal, sweeping, touching.

There is one `LoopWork` for each event loop of a process. It keeps no task alive while there is
nothing to do, only a timer, so that a loop may be closed at any moment (test clients make one for
each request) and nothing is left behind but leases, which end by themselves.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from typing import Any
from weakref import WeakValueDictionary

from gridsession.errors import GridFull, GridUnavailable, SessionError
from gridsession.grids.contract import (
    REMEMBERED_COMMITS,
    REMOVED,
    TICKET_SECONDS,
    Change,
    Committed,
    Conflict,
    Found,
    Gone,
    Grid,
    LockLost,
    Version,
)
from gridsession.identity import name_of
from gridsession.provider.leases import HeldLock, LeaseBook
from gridsession.provider.log import log

_RENEWALS_PER_LEASE = 3  # a lock outlives two renewals that fail
_RETRY_SECONDS = (0.02, 1.0)  # first and longest pause between tries at a grid that is away
_SWEEP_BATCH = 64  # records a call: about a millisecond of an embedded grid's time
_SWEEP_PAUSE = 0.01  # seconds between two batches
_TICKETS = 4  # of a worker's commits to one session: more only ask more often
_BUSY_SKIPS = 6  # sweeps put off for a busy worker before one is made all the same


class CommitLine:
    """Where one event loop's commits to one session wait for each other.

    Attributes:
        tries: to commit without the lock, one after the other, or they would be in one another's
            way and all wait for the lock in the end.
        tickets: for the lock, a few at a time: no limit of the grid's counts them.
    """

    def __init__(self) -> None:
        self.tries = asyncio.Lock()
        self.tickets = asyncio.Semaphore(_TICKETS)


class LoopWork:
    """Work beside the requests of one event loop.

    Args:
        grid: where the records are.
        lease: seconds that a lock lives unless it is renewed.
        execution_timeout: seconds after which it is not renewed any more.
        sweep_interval: seconds between two looks for expired records.
        on_gone: told the key of a session that turns out to have ended.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        lease: float,
        execution_timeout: float,
        sweep_interval: float,
        on_gone: Callable[[bytes], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._grid = grid
        self._lease = lease
        self._sweep_interval = sweep_interval
        self._on_gone = on_gone
        self._book = LeaseBook(execution_timeout)
        self.drop = self._book.drop  # renew a lock no more; args: its token
        self._lines: WeakValueDictionary[bytes, CommitLine] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._waiting: set[asyncio.Task[Any]] = set()  # of them, those that wait for a lock
        self._renewal: asyncio.TimerHandle | None = None
        self._skipped = 0
        self._closed = False
        self._sweeping = self._sweep_after(sweep_interval * random.random())

    @property
    def is_dead(self) -> bool:
        """The event loop is closed; nothing here will ever run again."""
        return self._loop.is_closed()

    def run(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something off a request's path, until it is done or the provider closes."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def wait_in_line(self, waiting: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a request's waiting for its lock. It is cancelled when the provider closes, which
        lets it withdraw before the grid closes.
        """
        task = self.run(waiting)
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)
        return task

    async def close(self) -> None:
        """Stop; send those who wait for a lock away; wait for what is under way, which ends at its
        own bounds.
        """
        self._stop()
        for waiting in list(self._waiting):
            waiting.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def stop_from_outside(self) -> None:
        """Stop the timers of another thread's loop, before they open a closed grid again."""
        with suppress(RuntimeError):  # it has been closed meanwhile
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._closed = True
        self._sweeping.cancel()
        if self._renewal is not None:
            self._renewal.cancel()

    # -- renewal --------------------------------------------------------------------------

    def hold(self, key: bytes, token: bytes, holder: str) -> None:
        """Renew a lock from now on."""
        self._book.add(key, token, holder, self._loop.time())
        if self._renewal is None:
            self._renew_after(self._lease / _RENEWALS_PER_LEASE)

    def _renew_after(self, delay: float) -> None:
        self._renewal = self._loop.call_later(delay, self._renewal_due, context=Context())

    def _renewal_due(self) -> None:
        self._renewal = None
        held, hung = self._book.due(self._loop.time())
        for lock in hung:
            log.error(
                "session %s: %s has held its lock for the execution_timeout; it is renewed no more",
                name_of(lock.key),
                lock.holder,
            )
        if held and not self._closed:
            self.run(self._renew(held))

    async def _renew(self, held: list[HeldLock]) -> None:
        delay = self._lease / _RENEWALS_PER_LEASE
        try:
            answers = await self._grid.renew([(x.key, x.token) for x in held], self._lease)
        except SessionError as error:
            log.warning("%d session locks could not be renewed: %s", len(held), error)
            delay /= 5
        else:
            for lock, kept in zip(held, answers, strict=True):
                if not kept:
                    self._book.drop(lock.token)  # its commit will be refused, and will say so
        if self._renewal is None and len(self._book) and not self._closed:
            self._renew_after(delay)

    # -- withdrawal -----------------------------------------------------------------------

    def withdraw(self, key: bytes, token: bytes) -> None:
        """Take back what a call may have left behind under a token, lock or ticket."""
        self.run(self._until_answered(lambda: self._grid.release(key, token)))

    def finish_commit(self, key: bytes, token: bytes, change: Change) -> asyncio.Task[Any]:
        """Repeat a commit whose request was cancelled while it was on its way.

        The task's result is the grid's answer; None when there was none.
        """
        return self.run(
            self._finish(key, lambda: self._grid.commit(key, token, change, release=True))
        )

    def finish_commit_if(
        self, key: bytes, secret: bytes, base: Version, change: Change
    ) -> asyncio.Task[Any]:
        """The same for a commit without a lock. Where another's came first it is not stored."""

        async def commit() -> Any:
            outcome = await self._grid.commit_if(key, secret, base, change)
            if isinstance(outcome, Conflict):
                others = outcome.snapshot.version.counter - base.counter
                if others > REMEMBERED_COMMITS:  # it may have been stored, and be forgotten
                    return None
            return outcome

        return self.run(self._finish(key, commit))

    async def _finish(self, key: bytes, commit: Callable[[], Awaitable[Any]]) -> Any:
        outcome = await self._until_answered(commit)
        if not isinstance(outcome, Committed):
            log.error(
                "session %s: the work of a cancelled request was not stored: %s",
                name_of(key),
                type(outcome).__name__ if outcome is not None else "there was no answer in time",
            )
        return outcome

    def find_out(
        self, key: bytes, token: bytes, secret: bytes, *, within: float
    ) -> asyncio.Task[bool]:
        """Withdraw a commit that the grid did not answer, and find out whether it was carried out.

        From the withdrawal on it can be carried out no more. The task's result is False where the
        grid did not tell in time.

        Args:
            secret: SHA-256 of the new secret that the commit gave the record.
            within: seconds.
        """
        return self.run(self._find_out(key, token, secret, within))

    async def _find_out(self, key: bytes, token: bytes, secret: bytes, within: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._until_answered(lambda: self._grid.release(key, token))
                found = await self._until_answered(lambda: self._grid.read(key, secret))
                return isinstance(found, Found)
        self.withdraw(key, token)
        return False

    def finish_removal(self, key: bytes, token: bytes, *, fenced: bool) -> asyncio.Task[Any]:
        """Repeat a removal, in the same way."""
        return self.run(self._finish_removal(key, token, fenced))

    async def _finish_removal(self, key: bytes, token: bytes, fenced: bool) -> Any:
        fence = token if fenced else None
        outcome = await self._until_answered(lambda: self._grid.remove(key, fence))
        if isinstance(outcome, Gone):  # the first try had come through
            return REMOVED
        if outcome is None or isinstance(outcome, LockLost):
            log.error("session %s: a cancelled request did not end it", name_of(key))
        return outcome

    async def _until_answered(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Repeat a call until the grid answers it, or until all that it could concern has ended.

        After a lease and the life of a ticket nothing is left that a token could name.
        """
        pause, longest = _RETRY_SECONDS
        end = self._loop.time() + self._lease + TICKET_SECONDS
        while True:
            try:
                return await call()
            except (GridUnavailable, GridFull):
                if self._closed or self._loop.time() + pause > end:
                    return None
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    # -- commits without a lock -----------------------------------------------------------

    def line_of(self, key: bytes) -> CommitLine:
        """In which this loop's commits to one session stand; it goes with the last of them."""
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = CommitLine()
        return line

    # -- touching -------------------------------------------------------------------------

    def touch(self, key: bytes) -> None:
        """Slide a deadline, off the request's path. A miss costs a hundredth of a timeout."""
        self.run(self._touch(key))

    async def _touch(self, key: bytes) -> None:
        try:
            if not await self._grid.touch(key):
                self._on_gone(key)
        except SessionError as error:
            log.warning("session %s: its expiry could not be put off: %s", name_of(key), error)

    # -- sweeping -------------------------------------------------------------------------

    def _sweep_after(self, delay: float) -> asyncio.TimerHandle:
        # A context of its own: the request's that comes first would be kept, with its session.
        return self._loop.call_later(delay, self._sweep_due, context=Context())

    def _sweep_due(self) -> None:
        if len(self._book) and self._skipped < _BUSY_SKIPS:  # requests are in hand: another will
            self._skipped += 1
            self._sweeping = self._sweep_after(self._sweep_interval / _BUSY_SKIPS)
            return
        self._skipped = 0
        self.run(self._sweep())

    async def _sweep(self) -> None:
        delay = self._sweep_interval * random.uniform(0.8, 1.2)  # workers do not march in step
        try:
            if await self._grid.sweep(_SWEEP_BATCH) >= _SWEEP_BATCH:
                delay = _SWEEP_PAUSE
        except SessionError as error:
            log.warning("expired sessions could not be removed just now: %s", error)
        if not self._closed:
            self._sweeping = self._sweep_after(delay)
