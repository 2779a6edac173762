"""A request's turn at a session: asking, waiting in line, holding the lock, giving it back.

The lower half of a `Visit`. Whatever happens to it, cancellation at any await included, its lock
and tickets are released, withdrawn in the background, or left to their lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

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
    Snapshot,
    Version,
)
from gridsession.identity import Identity, parse_id
from gridsession.provider.bearer import Bearer
from gridsession.provider.tokens import lock_token
from gridsession.session import Session

if TYPE_CHECKING:
    from gridsession.provider.client_cache import Kept
    from gridsession.provider.core import SessionProvider

# Looked at in each request, and an Enum's members are slow to find.
_EXCLUSIVE, _READ_ONLY, _NONE = Access.EXCLUSIVE, Access.READ_ONLY, Access.NONE
_Answer = TypeVar("_Answer")


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
    _version: Version | None = None  # of what the session holds as stored
    _stored_bytes = b""  # the same, where there is a client cache
    _known: Kept | None = None  # what the grid was asked whether it is the newest
    _found_at = -60.0  # when its id was last known to be good, by the loop's clock
    _asked_at = 0.0  # when, by the client cache's clock

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
            if use.access is _EXCLUSIVE or use.wait_for_writer:
                self._claim = Claim(
                    lock_token(), self._holder, provider.lease, provider.queue_limit
                )
            elif use.access is _READ_ONLY and self._has_fresh(identity):
                return None
            return self._took(await self._ask_grid(None))
        except BaseException as error:
            if isinstance(error, GridUnavailable) and error.never_asked:
                # Each request of an outage would leave a task behind that tries to withdraw.
                self._claim = None
            self.leave()
            if not self._makes_do(error):
                raise
            return None

    def wait_in_line(self, busy: Busy) -> asyncio.Task[None]:
        """`wait` as a task, which is cancelled where the provider closes."""
        return self._work.wait_in_line(self.wait(busy))

    async def wait(self, busy: Busy) -> None:
        """Wait until the session is ready."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            self._took(await self._answer_after(busy, lambda: self._ask_grid(busy.lock), began))
        except BaseException as error:
            self.leave()
            if not self._makes_do(error):
                raise
        self.session.waited += loop.time() - began

    async def _answer_after(
        self, busy: Busy, ask: Callable[[], Awaitable[_Answer | Busy]], began: float
    ) -> _Answer:
        """Ask until the answer is another than `Busy`, each time that the ticket's bell rings.

        Args:
            began: the loop's second from which the waiting counts.

        Raises:
            SessionLockTimeout: it was not for too long.
        """
        identity, claim = self._identity, self._claim
        assert identity is not None
        assert claim is not None
        loop = asyncio.get_running_loop()
        while True:
            left = began + self._provider.lock_wait_timeout - loop.time()
            if left <= 0:
                raise SessionLockTimeout(
                    f"{busy.holder} has held this session's lock for "
                    f"{busy.held_for:.1f} s; gave up after {loop.time() - began:.1f} s."
                )
            await self._grid.wait(identity.key, claim.token, min(left, busy.retry_in))
            answer = await ask()
            if not isinstance(answer, Busy):
                return answer
            busy = answer

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
        known = self._newest_known(identity)
        if claim is not None and self.use.access is _EXCLUSIVE:
            return self._grid.acquire(identity.key, identity.secret, claim, known)
        return self._grid.read(identity.key, identity.secret, claim, seen, known)

    def _took(
        self, outcome: Granted | Found | Busy | QueueFull | Replaced | Missing
    ) -> Busy | None:
        if type(outcome) is Granted:  # ahead of the others: it is what nearly always comes
            self._hold()
            snapshot = outcome.snapshot
            segments = self._segments_of(snapshot)
            self._make_session(snapshot.timeout, segments, snapshot.user, snapshot.replaced)
            self._version = snapshot.version
            self._stored = True
            return None
        if type(outcome) is Busy:
            return outcome
        self._claim = None  # whatever else is answered leaves nothing of it behind
        match outcome:
            case Found(snapshot):
                self._found_at = asyncio.get_running_loop().time()
                segments = self._segments_of(snapshot)
                self._make_session(snapshot.timeout, segments, snapshot.user, snapshot.replaced)
                self._version = snapshot.version
                self._stored = True
                if snapshot.slide_due:
                    assert self._identity is not None
                    self._work.touch(self._identity.key)
            case Missing():  # never adopted: what is stored from now on gets an id of its own
                self._drop_kept()
                self._forget_id()
                self._stored = False
                self._make_session(self._provider.timeout)
            case QueueFull(holder, held_for):
                raise SessionQueueFull(
                    f"{self._provider.queue_limit} requests wait for this session already; "
                    f"{holder} has held its lock for {held_for:.1f} s."
                )
            case Replaced():
                self._drop_kept()
                raise SessionReplaced
        return None

    # -- the client cache -----------------------------------------------------------------

    def _newest_known(self, identity: Identity) -> Version | None:
        """The version whose payload need not travel."""
        cache = self._provider.client_cache
        if cache is None:
            return None
        self._known, self._asked_at = cache.get(identity.key), cache.steady()
        return None if self._known is None else self._known.version

    def _segments_of(self, snapshot: Snapshot) -> dict[str, bytes]:
        provider, identity, stored = self._provider, self._identity, snapshot.payload
        assert identity is not None
        if provider.client_cache is not None:
            stored = self._stored_bytes = provider.client_cache.read(
                identity.key, identity.secret, snapshot, self._known, self._asked_at
            )
        assert stored is not None
        return provider.envelope.open(identity.key, stored)

    def _has_fresh(self, identity: Identity) -> bool:
        """Whether the session is at hand, young enough for a request that only reads."""
        cache = self._provider.client_cache
        if cache is None or (found := cache.fresh(identity.key, identity.secret)) is None:
            return False
        kept, slide_is_due = found
        self._use_kept(identity, kept)
        if slide_is_due:
            self._work.touch(identity.key)
        return True

    def _makes_do(self, error: BaseException) -> bool:
        """Whether a request that only reads has what this worker knows, since the grid is away."""
        if not isinstance(error, GridUnavailable) or self.use.access is not _READ_ONLY:
            return False
        cache, identity = self._provider.client_cache, self._identity
        if cache is None or identity is None or not self._provider.reads_cached_in_outage:
            return False
        if (kept := cache.last_known(identity.key, identity.secret)) is None:
            return False
        self._use_kept(identity, kept)
        self.session.is_stale = True
        return True

    def _use_kept(self, identity: Identity, kept: Kept) -> None:
        segments = self._provider.envelope.open(identity.key, kept.payload)
        self._make_session(kept.timeout, segments, kept.user)
        self._stored = True

    def _drop_kept(self) -> None:
        """What is stored of this session is not known any more."""
        if self._provider.client_cache is not None and self._identity is not None:
            self._provider.client_cache.drop(self._identity.key)

    # -- the lock -------------------------------------------------------------------------

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
