"""A session's way through one request: begin, wait, save, end.

A `Visit` is what an adapter drives, and what a `Session`'s awaitable methods are bound to. It
holds at most one lock at a time. Whatever happens to it, cancellation at any await included, its
lock and tickets are released, withdrawn in the background, or left to their lease.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from enum import Enum
from typing import TYPE_CHECKING

from gridsession import payload
from gridsession.errors import (
    SessionClosed,
    SessionError,
    SessionGone,
    SessionLockLost,
    SessionLockTimeout,
    SessionQueueFull,
    SessionReadOnly,
    SessionReplaced,
)
from gridsession.grids.contract import (
    Busy,
    Change,
    Claim,
    Committed,
    Exists,
    Found,
    Granted,
    LockLost,
    Missing,
    NewRecord,
    QueueFull,
    Replaced,
    Rotation,
    Snapshot,
)
from gridsession.identity import (
    ID_BYTES,
    SECRET_BYTES,
    name_of,
    new_id,
    parse_id,
    rotated_id,
)
from gridsession.session import Delta, NoSession, Phase, Session
from gridsession.settings import Access, Use

if TYPE_CHECKING:
    from gridsession.provider.core import SessionProvider


class Cookie(Enum):
    """What is to become of the browser's cookie."""

    KEEP = "keep"
    SET = "set"
    REMOVE = "remove"


class Visit:
    """One request's use of one session.

    Args:
        provider: whose grid and settings it uses.
        session_id: what the cookie carries; None, or of the wrong shape: a new session.
        use: the access.
        holder: who asks, in words, for those who wait.
    """

    __slots__ = (
        "_came_as",
        "_claim",
        "_commits",
        "_grid",
        "_holds",
        "_id_text",
        "_identity",
        "_provider",
        "_stored",
        "_unsure",
        "_work",
        "cookie",
        "cookie_can_be_sent",
        "session",
        "use",
    )

    def __init__(
        self, provider: SessionProvider, session_id: bytes | None, use: Use, holder: str
    ) -> None:
        self._provider = provider
        self._work = provider.work()
        self._grid = provider.grid
        self.use = use
        self._identity = parse_id(session_id) if session_id is not None else None
        self._id_text = ""
        self._came_as = session_id if self._identity is not None else None
        self._claim = Claim(b"", holder, provider.lease, provider.queue_limit)
        self._commits = 0
        self._holds = False
        self._stored = False
        self._unsure = False  # whether a save() that failed was carried out
        self.cookie = Cookie.KEEP
        self.cookie_can_be_sent = True
        kind = NoSession if use.access is Access.NONE else Session
        self.session = kind(self, use.access, _PHASES[use.access], provider.timeout)

    # -- begin ----------------------------------------------------------------------------

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
        if self._identity is None or self.use.access is Access.NONE:
            return None
        self._claim.token = os.urandom(16)
        try:
            return self._took(await self._ask_grid(None))
        except BaseException:
            self.leave()
            raise

    async def wait(self, busy: Busy) -> None:
        """Wait until the session is ready."""
        identity = self._identity
        assert identity is not None
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
                await self._grid.wait(identity.key, self._claim.token, pause)
                waiting = self._took(await self._ask_grid(busy.lock))
        except BaseException:
            self.leave()
            raise
        self.session.waited += loop.time() - began

    def leave(self) -> None:
        """Withdraw, in the background, whatever was asked for and not yet used."""
        if self._claim.token and self._identity is not None:
            self._give_up_lock()

    def _ask_grid(
        self, seen: bytes | None
    ) -> Awaitable[Granted | Found | Busy | QueueFull | Replaced | Missing]:
        assert self._identity is not None
        _, key, secret = self._identity
        if self.use.access is Access.EXCLUSIVE:
            return self._grid.acquire(key, secret, self._claim)
        watch = self._claim if self.use.wait_for_writer else None
        if watch is None:
            self._claim.token = b""
        return self._grid.read(key, secret, watch, seen)

    def _took(
        self, outcome: Granted | Found | Busy | QueueFull | Replaced | Missing
    ) -> Busy | None:
        if type(outcome) is Granted:  # ahead of the others: it is what nearly always comes
            self._hold()
            self._load(outcome.snapshot)
            return None
        match outcome:
            case Found(snapshot):
                self._claim.token = b""
                self._load(snapshot)
                if snapshot.slide_due:
                    assert self._identity is not None
                    self._work.touch(self._identity.key)
            case Busy():
                return outcome
            case Missing():  # never adopted: what is stored from now on gets an id of its own
                self._claim.token = b""
                self._forget_id()
                self._stored = False
            case QueueFull(holder, held_for):
                self._claim.token = b""
                raise SessionQueueFull(
                    f"{self._claim.queue_limit} requests wait for this session already; "
                    f"{holder} has held its lock for {held_for:.1f} s."
                )
            case Replaced():
                self._claim.token = b""
                raise SessionReplaced
        return None

    def _load(self, snapshot: Snapshot) -> None:
        self._stored = True
        self.session._load(
            payload.split(snapshot.payload),
            snapshot.user,
            snapshot.timeout,
            is_new=False,
            replaced=snapshot.replaced,
        )

    # -- the lock -------------------------------------------------------------------------

    def _hold(self) -> None:
        assert self._identity is not None
        self._holds = True
        key, claim = self._identity.key, self._claim
        self._work.hold(key, claim.token, claim.holder)

    def _let_go(self) -> bytes:
        """The lock's token, no more ours to renew or to release."""
        claim = self._claim
        # A new one: a call that was cancelled may yet be about to read its own, on a grid's thread.
        self._claim = Claim(b"", claim.holder, claim.lease, claim.queue_limit)
        self._holds = False
        self._work.drop(claim.token)
        return claim.token

    def _give_up_lock(self) -> None:
        assert self._identity is not None
        self._work.withdraw(self._identity.key, self._let_go())

    # -- end ------------------------------------------------------------------------------

    async def end(self) -> None:
        """Commit what changed, hand the lock on. Call it before response headers leave.

        Raises:
            SessionError: what the handler did was not stored; the lock is released all the same.
        """
        session = self.session
        if session._phase is Phase.READ_ONLY:
            self._refuse_changes()
        elif session._phase is Phase.WRITABLE:
            try:
                await self._store(release=True)
            except BaseException:
                await self.discard()
                raise
            session._phase = Phase.CLOSED

    async def discard(self) -> None:
        """Forget what was not committed, and hand the lock on."""
        session = self.session
        if session._phase is Phase.WRITABLE:
            session._phase = Phase.CLOSED
            session._forget_changes()
        await self._release()

    async def _release(self) -> None:
        if not self._holds:
            return
        assert self._identity is not None
        key, token = self._identity.key, self._let_go()
        try:
            await self._grid.release(key, token)
        except BaseException as error:
            self._work.withdraw(key, token)
            if not isinstance(error, SessionError):
                raise

    def _refuse_changes(self) -> None:
        delta = self.session._delta()
        if delta.changes:
            keys = ", ".join(repr(key) for key in (*delta.set, *delta.removed))
            raise SessionReadOnly(
                f"A read-only request changed values inside its session, under {keys}; nothing "
                'was stored. Give this path the access "exclusive".'
            )

    async def _store(self, *, release: bool) -> None:
        session = self.session
        if session._abandoned:
            await self._remove(fenced=False)
            return
        delta = session._delta()
        if not self._stored:
            if delta.set or session._user is not None:
                await self._create(delta, release=release)
            return
        segments = session._segments_with(delta) if delta.changes else session._segments
        if release and not segments and session._user is None:  # Starlette's logout
            await self._remove(fenced=True)
        elif delta.changes or session._has_new_terms or self._unsure:
            await self._commit(segments, delta, release=release)
        elif release:
            await self._release()

    async def _create(self, delta: Delta, *, release: bool) -> None:
        self.check_id_may_change()
        session, provider = self.session, self._provider
        segments = session._segments_with(delta)
        new = NewRecord(
            commit_token=int.from_bytes(os.urandom(8), "little"),
            secret=b"",
            payload=payload.join(segments, provider.max_payload_bytes),
            timeout=session._timeout,
            absolute_timeout=provider.absolute_timeout,
            user=session._user,
        )
        identity = parse_id(self.session_id.encode())
        assert identity is not None
        new.secret = identity.secret
        self._identity = identity
        if not release:
            self._claim.token = os.urandom(16)
        claim = None if release else self._claim
        try:
            outcome = await self._grid.create(identity.key, new, claim)
        except BaseException:
            self._forget_id()  # a second try is another session
            # Whether it was written is unknown. Nobody has been given its id: it expires unused.
            if not release:
                self._work.withdraw(identity.key, self._let_go())
            raise
        if isinstance(outcome, Exists):
            raise SessionError(f"A new session's key {name_of(identity.key)} was taken already.")
        if not release:
            self._hold()
        self._stored = True
        self.cookie = Cookie.SET
        session._committed(segments)

    async def _commit(self, segments: dict[str, bytes], delta: Delta, *, release: bool) -> None:
        assert self._identity is not None
        handle, key, _ = self._identity
        session = self.session
        user_changed = session._user != session._stored_user
        writes = delta.changes or self._unsure
        change = Change(
            self._next_commit_token(),
            payload.join(segments, self._provider.max_payload_bytes) if writes else None,
            session._timeout,
            session._user,
        )
        new_text = ""
        if user_changed or session._regenerate:
            new_text = rotated_id(handle, os.urandom(SECRET_BYTES))
            identity = parse_id(new_text.encode())
            assert identity is not None
            change.rotation = Rotation(identity.secret, user_changed)
        token = self._let_go() if release else self._claim.token
        self._unsure = True
        try:
            outcome = await self._grid.commit(key, token, change, release=release)
        except asyncio.CancelledError:
            if release:  # a response was made, so its commit stands; repeating it is harmless
                self._work.finish_commit(key, token, change)
            raise
        except SessionError:
            if release:
                self._work.withdraw(key, token)
            raise
        if type(outcome) is not Committed:
            raise (SessionLockLost if type(outcome) is LockLost else SessionGone)
        self._unsure = False
        session._committed(segments)
        if new_text:
            self._identity = identity
            self._id_text = new_text
            self.cookie = Cookie.SET

    def _next_commit_token(self) -> int:
        """64 random bits: the lock's token has been drawn already, and has them to spare."""
        self._commits += 1
        return (int.from_bytes(self._claim.token[:8], "little") + self._commits) % _TOKENS

    async def _remove(self, *, fenced: bool) -> None:
        if self._stored:
            assert self._identity is not None
            key, token = self._identity.key, self._let_go()
            try:
                outcome = await self._grid.remove(key, token if fenced else None)
            except asyncio.CancelledError:  # as a commit's: a response was made, so it stands
                self._work.finish_removal(key, token, fenced=fenced)
                raise
            except SessionError:
                self._work.withdraw(key, token)
                raise
            if isinstance(outcome, LockLost):
                raise SessionLockLost
            self._stored = False
            self.cookie = Cookie.REMOVE
        self._forget_id()
        self.session._phase = Phase.CLOSED

    def _forget_id(self) -> None:
        self._identity = None
        self._came_as = None
        self._id_text = ""

    # -- what a Session's members call ----------------------------------------------------

    @property
    def session_id(self) -> str:
        if not self._id_text:
            came = self._came_as
            self._id_text = new_id(os.urandom(ID_BYTES)) if came is None else came.decode("ascii")
        return self._id_text

    @property
    def session_key(self) -> bytes:
        identity = self._identity or parse_id(self.session_id.encode())
        assert identity is not None
        return identity.key

    def cookie_to_send(self, *, rolling: bool) -> Cookie:
        """What the response's headers say of the cookie.

        A request that came with a replaced id is never answered with one: the browser has the
        new cookie already, and who holds only the old one must not be given it.
        """
        if self.session._replaced:
            return Cookie.KEEP
        if rolling and self._stored and self.cookie is Cookie.KEEP and self.session.accessed:
            return Cookie.SET
        return self.cookie

    def check_id_may_change(self) -> None:
        if not self.cookie_can_be_sent:
            raise SessionClosed(
                "The response's headers have left: its cookie can carry no new session id any "
                "more. Change the user or the id, or store something in a new session, before."
            )

    async def save(self) -> None:
        await self._store(release=False)

    async def release(self) -> None:
        if self.session._phase is Phase.WRITABLE:
            await self.end()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[Session]:
        session, phase, use = self.session, self.session._phase, self.use
        if phase is Phase.WRITABLE:
            yield session
            return
        if not self._stored:
            raise SessionClosed("Nothing is stored of this session, so there is nothing to lock.")
        self.use = Use(Access.EXCLUSIVE)
        try:
            await self.begin()
        finally:
            self.use = use
        if not self._stored:
            raise SessionGone("The session ended, or expired, meanwhile; there is nothing to lock.")
        session._phase = Phase.WRITABLE
        try:
            yield session
        except BaseException:
            await self.discard()
            raise
        else:
            if session._phase is Phase.WRITABLE:
                await self.end()
        finally:
            session._phase = phase


_TOKENS = 1 << 64
_PHASES = {
    Access.EXCLUSIVE: Phase.WRITABLE,
    Access.READ_ONLY: Phase.READ_ONLY,
    Access.NONE: Phase.NOT_AVAILABLE,
}
