"""A session's way through one request: begin, save, end.

A `Visit` is what an adapter drives, and what a `Session`'s awaitable methods are bound to.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

from gridsession import payload
from gridsession.errors import (
    SessionClosed,
    SessionError,
    SessionGone,
    SessionLockLost,
    SessionLockTimeout,
    SessionReadOnly,
)
from gridsession.grids.contract import (
    Change,
    Claim,
    Committed,
    Exists,
    LockLost,
    NewRecord,
    Rotation,
)
from gridsession.identity import (
    ID_BYTES,
    SECRET_BYTES,
    name_of,
    new_id,
    parse_id,
    rotated_id,
)
from gridsession.provider.turn import Turn
from gridsession.session import Delta, NoSession, Phase, Session
from gridsession.settings import Access, Use

if TYPE_CHECKING:
    from gridsession.provider.core import SessionProvider

_PHASES = {
    Access.EXCLUSIVE: Phase.WRITABLE,
    Access.READ_ONLY: Phase.READ_ONLY,
    Access.NONE: Phase.NOT_AVAILABLE,
}


class Cookie(Enum):
    """What is to become of the browser's cookie."""

    KEEP = "keep"
    SET = "set"
    REMOVE = "remove"


class Visit(Turn):
    """One request's use of one session. Args: as `Turn`.

    Attributes:
        cookie: what is to become of the browser's cookie.
        cookie_can_be_sent: the response's headers have not left yet, or there are none.
    """

    __slots__ = ("_inside", "_turns", "_unsure", "cookie", "cookie_can_be_sent")

    def __init__(
        self, provider: SessionProvider, session_id: bytes | None, use: Use, holder: str
    ) -> None:
        super().__init__(provider, session_id, use, holder)
        self._inside: asyncio.Task[Any] | None = None  # whose exclusive() block this is
        self._turns: asyncio.Lock | None = None
        self._unsure = False  # whether a save() that failed was carried out
        self.cookie = Cookie.KEEP
        self.cookie_can_be_sent = True

    def _make_session(
        self,
        timeout: float,
        segments: dict[str, bytes] | None = None,
        user: str | None = None,
        replaced: bool = False,
    ) -> None:
        access = self.use.access
        kind = NoSession if access is Access.NONE else Session
        phase = _PHASES[access]
        self.session = kind(self, access, phase, timeout, segments, user, replaced)
        self._ready = True

    # -- end ------------------------------------------------------------------------------

    async def end(self) -> None:
        """Commit what changed, hand the lock on. Call it before response headers leave.

        Raises:
            SessionError: what the handler did was not stored; the lock is released all the same.
        """
        if self._is_in_anothers_block():
            return
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
        if self._is_in_anothers_block():
            return
        session = self.session
        if session._phase is Phase.WRITABLE:
            session._phase = Phase.CLOSED
            session._forget_changes()
        await self._release()

    def _is_in_anothers_block(self) -> bool:
        """A task that the handler started is inside `session.exclusive()`, or waits there: the
        request's own lock was given back before, and this one is the task's to release.
        """
        return self._inside is not None and self._inside is not asyncio.current_task()

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
            commit_token=self._work.commit_token(),
            secret=b"",
            payload=payload.join(segments, provider.max_payload_bytes),
            timeout=session._timeout,
            absolute_timeout=provider.absolute_timeout,
            user=session._user,
        )
        self._identity = identity = parse_id(self._own_id())
        assert identity is not None
        new.secret = identity.secret
        if not release:
            self._claim = Claim(
                self._work.token(), self._holder, provider.lease, provider.queue_limit
            )
        try:
            outcome = await self._grid.create(identity.key, new, self._claim)
        except BaseException:
            # Whether it was written is unknown. Nobody has been given its id: it expires unused.
            self.leave()
            self._forget_id()  # a second try is another session
            raise
        if isinstance(outcome, Exists):
            raise SessionError(f"A new session's key {name_of(identity.key)} was taken already.")
        if not release:
            self._hold()
        self._stored = True
        self.cookie = Cookie.SET
        session._committed(segments)

    async def _commit(self, segments: dict[str, bytes], delta: Delta, *, release: bool) -> None:
        identity, claim, session = self._identity, self._claim, self.session
        assert identity is not None
        assert claim is not None
        key = identity.key
        user_changed = session._user != session._stored_user
        writes = delta.changes or self._unsure
        change = Change(
            self._work.commit_token(),
            payload.join(segments, self._provider.max_payload_bytes) if writes else None,
            session._timeout,
            session._user,
        )
        rotated = b""
        if user_changed or session._regenerate:
            rotated = rotated_id(identity.handle, os.urandom(SECRET_BYTES)).encode()
            identity = parse_id(rotated)
            assert identity is not None
            change.rotation = Rotation(identity.secret, user_changed)
        token = self._let_go() if release else claim.token
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
        if rotated:
            self._identity = identity
            self._id = rotated
            self.cookie = Cookie.SET

    async def _remove(self, *, fenced: bool) -> None:
        if self._stored:
            assert self._identity is not None
            key, token = self._identity.key, self._let_go() if self._claim is not None else b""
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

    # -- what a Session's members call ----------------------------------------------------

    @property
    def session_id(self) -> str:
        return self._own_id().decode("ascii")

    @property
    def session_key(self) -> bytes:
        identity = self._identity or parse_id(self._own_id())
        assert identity is not None
        return identity.key

    def _own_id(self) -> bytes:
        """The id that the cookie carries, or is to carry; made when it is first asked for."""
        if self._id is None:
            self._id = new_id(os.urandom(ID_BYTES)).encode()
        return self._id

    def let_session_go(self) -> None:
        """Forget the session, which knows this visit: while both know each other, what they hold
        waits for the garbage collector. A session that is used later makes itself known again.
        """
        if self._turns is None or not self._turns.locked():
            del self.session

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

    async def save(self, session: Session) -> None:
        self.session = session
        await self._store(release=False)

    async def release(self, session: Session) -> None:
        self.session = session
        if session._phase is Phase.WRITABLE:
            await self.end()

    @asynccontextmanager
    async def exclusive(self, session: Session) -> AsyncIterator[Session]:
        self.session = session
        task = asyncio.current_task()
        if session._phase is Phase.WRITABLE and self._inside in (None, task):
            yield session
        elif self._inside is task:  # it has released its block's lock
            async with self._block():
                yield session
        else:
            async with self._turn_of(task), self._block():
                yield session

    @asynccontextmanager
    async def _turn_of(self, task: asyncio.Task[Any] | None) -> AsyncIterator[None]:
        """The tasks of a request share its session and its lock, so their blocks take turns."""
        if self._turns is None:
            self._turns = asyncio.Lock()
        try:
            async with asyncio.timeout(self._provider.lock_wait_timeout):
                await self._turns.acquire()
        except TimeoutError:
            raise SessionLockTimeout(
                "Another task of this request is inside `session.exclusive()`; gave up after "
                f"{self._provider.lock_wait_timeout:.1f} s."
            ) from None
        self._inside = task
        try:
            yield
        finally:
            self._inside = None
            self._turns.release()

    @asynccontextmanager
    async def _block(self) -> AsyncIterator[None]:
        session, phase, use = self.session, self.session._phase, self.use
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
            yield
        except BaseException:
            await self.discard()
            raise
        else:
            if session._phase is Phase.WRITABLE:
                await self.end()
        finally:
            session._phase = phase
