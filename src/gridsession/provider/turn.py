"""A request's turn at a session: asking, waiting in line, holding the lock, giving it back.

The lower half of a `Visit`. Whatever happens to it, cancellation at any await included, its lock
and tickets are released, withdrawn in the background, or left to their lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from gridsession import payload
from gridsession.access import Access, Use
from gridsession.errors import (
    GridUnavailable,
    SessionError,
    SessionLockTimeout,
    SessionQueueFull,
    SessionReplaced,
)
from gridsession.grids.contract import (
    Busy,
    Claim,
    Found,
    Granted,
    Missing,
    QueueFull,
    Released,
    Replaced,
)
from gridsession.identity import parse_id
from gridsession.provider.bearer import Bearer
from gridsession.provider.tokens import lock_token
from gridsession.session import Session

if TYPE_CHECKING:
    from gridsession.provider.core import SessionProvider

# Looked at in each request, and an Enum's members are slow to find.
_EXCLUSIVE, _NONE = Access.EXCLUSIVE, Access.NONE


class Turn(Bearer):
    """What one request asks of the grid, and what it was given.

    Args:
        provider: whose grid and settings it uses.
        session_id: what the cookie carries; None, or of the wrong shape: a new session.
        use: the access.
        holder: who asks, in words, for those who wait.

    Attributes:
        use: the access, at this moment.
        session: what the handler is given.
    """

    session: Session
    _claim: Claim | None = None  # the lock or ticket that is ours, or may be

    def __init__(
        self, provider: SessionProvider, session_id: bytes | None, use: Use, holder: str
    ) -> None:
        self._provider = provider
        self._work = provider.work()
        self._grid = provider.grid
        self._holder = holder
        self.use = use
        if session_id is not None and (identity := parse_id(session_id)) is not None:
            self._id = session_id
            self._identity = identity

    @property
    def asks_first(self) -> bool:
        """The grid is asked before the handler runs; else, only where it stores something."""
        return self._identity is not None and self.use.access is not _NONE

    async def begin(self) -> None:
        """Make the session ready, waiting for its lock where that is needed.

        Raises:
            GridUnavailable, GridFull, SessionLockTimeout, SessionQueueFull, SessionReplaced:
                the handler must not run; the same request may succeed later.
            SessionFormatError: what is stored is of no format that this release reads.
        """
        busy = await self.ask()
        if busy is not None:
            await self.wait(busy)

    async def ask(self) -> Busy | None:
        """Ask once. None: the session is ready. `Busy`: call `wait` with it, or `leave`."""
        identity, provider, use = self._identity, self._provider, self.use
        if identity is None or use.access is _NONE:  # as `asks_first`, without the call
            self._make_session(provider.timeout)
            return None
        try:
            if use.access is _EXCLUSIVE:
                self._claim = claim = Claim(
                    lock_token(), self._holder, provider.lease, provider.queue_limit
                )
                return self._took(await self._grid.acquire(identity.key, identity.secret, claim))
            if use.wait_for_writer:
                self._claim = Claim(
                    lock_token(), self._holder, provider.lease, provider.queue_limit
                )
            return self._took(await self._ask_grid(None))
        except BaseException as error:
            if isinstance(error, GridUnavailable) and error.never_asked:
                # Each request of an outage would leave a task behind that tries to withdraw.
                self._claim = None
            self.leave()
            raise

    def wait_in_line(self, busy: Busy) -> asyncio.Task[None]:
        """`wait` as a task, which is cancelled where the provider closes."""
        return self._work.wait_in_line(self.wait(busy))

    async def wait(self, busy: Busy) -> None:
        """Wait until the session is ready."""
        identity, claim = self._identity, self._claim
        assert identity is not None
        assert claim is not None
        loop = asyncio.get_running_loop()
        began = loop.time()
        waiting: Busy | None = busy
        try:
            while waiting is not None:
                left = began + self._provider.lock_wait_timeout - loop.time()
                if left <= 0:
                    raise SessionLockTimeout(
                        f"{waiting.holder} has held this session's lock for "
                        f"{waiting.held_for:.1f} s; gave up after {loop.time() - began:.1f} s."
                    )
                pause = min(left, waiting.retry_in)
                await self._grid.wait(identity.key, claim.token, pause)
                waiting = self._took(await self._ask_grid(busy.lock))
        except BaseException:
            self.leave()
            raise
        self.session.waited += loop.time() - began

    def leave(self) -> None:
        """Withdraw, in the background, whatever was asked for and not yet used."""
        if self._claim is not None and self._identity is not None:
            self._work.withdraw(self._identity.key, self._let_go())

    def _make_session(
        self,
        timeout: float,
        segments: dict[str, bytes] | None = None,
        user: str | None = None,
        replaced: bool = False,
    ) -> None:
        """Set `session`, for the first time in this request."""
        raise NotImplementedError

    # -- parts ----------------------------------------------------------------------------

    def _ask_grid(
        self, seen: bytes | None
    ) -> Awaitable[Granted | Found | Busy | QueueFull | Replaced | Missing]:
        identity, claim = self._identity, self._claim
        assert identity is not None
        if claim is not None and self.use.access is _EXCLUSIVE:
            return self._grid.acquire(identity.key, identity.secret, claim)
        return self._grid.read(identity.key, identity.secret, claim, seen)

    def _took(
        self, outcome: Granted | Found | Busy | QueueFull | Replaced | Missing
    ) -> Busy | None:
        if type(outcome) is Granted:  # ahead of the others: it is what nearly always comes
            self._hold()
            snapshot = outcome.snapshot
            segments = payload.split(snapshot.payload)
            self._make_session(snapshot.timeout, segments, snapshot.user, snapshot.replaced)
            self._stored = True
            return None
        if type(outcome) is Busy:
            return outcome
        self._claim = None  # whatever else is answered leaves nothing of it behind
        match outcome:
            case Found(snapshot):
                segments = payload.split(snapshot.payload)
                self._make_session(snapshot.timeout, segments, snapshot.user, snapshot.replaced)
                self._stored = True
                if snapshot.slide_due:
                    assert self._identity is not None
                    self._work.touch(self._identity.key)
            case Missing():  # never adopted: what is stored from now on gets an id of its own
                self._forget_id()
                self._stored = False
                self._make_session(self._provider.timeout)
            case QueueFull(holder, held_for):
                raise SessionQueueFull(
                    f"{self._provider.queue_limit} requests wait for this session already; "
                    f"{holder} has held its lock for {held_for:.1f} s."
                )
            case Replaced():
                raise SessionReplaced
        return None

    def _hold(self) -> None:
        assert self._identity is not None
        assert self._claim is not None
        self._work.hold(self._identity.key, self._claim.token, self._holder)

    def _let_go(self) -> bytes:
        """The lock's token, no more ours to renew or to release."""
        assert self._claim is not None
        token = self._claim.token
        self._claim = None
        self._work.drop(token)
        return token

    async def _release(self) -> None:
        """Hand the lock on, if it is ours."""
        if self._claim is None or self._identity is None:
            return
        key, token = self._identity.key, self._let_go()
        try:
            outcome = await self._grid.release(key, token)
        except BaseException as error:
            self._work.withdraw(key, token)
            if not isinstance(error, SessionError):
                raise
        else:  # else another may have taken it, and given the session another id
            self._held_to_the_end = isinstance(outcome, Released)
