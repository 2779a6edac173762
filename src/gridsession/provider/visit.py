"""A session's way through one request: begin, save, end.

A `Visit` is what an adapter drives, and what a `Session`'s awaitable methods are bound to.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from enum import Enum
from typing import TYPE_CHECKING

from gridsession import payload
from gridsession.errors import (
    SessionClosed,
    SessionError,
    SessionGone,
    SessionLockLost,
    SessionLockTimeout,
    SessionReadOnly,
    SessionReplaced,
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
from gridsession.provider.no_session import NoSession
from gridsession.provider.tokens import commit_token, lock_token
from gridsession.provider.turn import Turn
from gridsession.session import Delta, Phase, Session
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

    __slots__ = ("_held_to_the_end", "_turns", "_unsure", "cookie", "cookie_can_be_sent")

    def __init__(
        self, provider: SessionProvider, session_id: bytes | None, use: Use, holder: str
    ) -> None:
        super().__init__(provider, session_id, use, holder)
        self._held_to_the_end = False  # the lock, until the response's headers leave
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
            self._held_to_the_end = True

    async def discard(self) -> None:
        """Forget what was not committed, and hand the lock on."""
        session = self.session
        if session._phase is Phase.WRITABLE:
            session._phase = Phase.CLOSED
            session._forget_changes()
        await self._release()

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
            commit_token=commit_token(),
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
            self._claim = Claim(lock_token(), self._holder, provider.lease, provider.queue_limit)
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
        session._committed(segments, session._user)
        session._regenerate = False

    async def _commit(self, segments: dict[str, bytes], delta: Delta, *, release: bool) -> None:
        identity, claim, session = self._identity, self._claim, self.session
        assert identity is not None
        assert claim is not None
        key = identity.key
        # A new id waits for the response that carries it: save() stores what is not tied to it.
        user = session._user if release else session._stored_user
        user_changed = user != session._stored_user
        if user_changed:
            self.check_id_may_change()
            if session._replaced:
                raise SessionReplaced
        writes = delta.changes or self._unsure
        change = Change(
            commit_token(),
            payload.join(segments, self._provider.max_payload_bytes) if writes else None,
            session._timeout,
            user,
        )
        rotated = b""
        if user_changed or (release and session._regenerate):
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
        except BaseException:
            if release:
                self._work.withdraw(key, token)
            raise
        if type(outcome) is not Committed:
            raise (SessionLockLost if type(outcome) is LockLost else SessionGone)
        self._unsure = False
        session._committed(segments, user)
        if release:
            session._regenerate = False
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
            except BaseException:
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
        del self.session

    def cookie_to_send(self, *, rolling: bool) -> Cookie:
        """What the response's headers say of the cookie.

        A request that came with a replaced id is never answered with one: the browser has the
        new cookie already, and who holds only the old one must not be given it. So the same
        cookie is sent again (`rolling`) only by who held the lock until now: else another may
        have replaced the id meanwhile.
        """
        if self.session._replaced:
            return Cookie.KEEP
        rolls = rolling and self._held_to_the_end and self._stored and self.session.accessed
        return Cookie.SET if rolls and self.cookie is Cookie.KEEP else self.cookie

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
            self._held_to_the_end = False

    @asynccontextmanager
    async def exclusive(self, session: Session) -> AsyncIterator[Session]:
        for block in _open_blocks.get():
            if block.visit is self and block.is_open:  # within it, or in a task that it started
                inside = block.session
                if not inside.is_read_only:
                    yield inside
                    return
                if inside is not session:  # which has released its lock meanwhile
                    async with inside.exclusive() as again:
                        yield again
                    return
        if session._phase is Phase.WRITABLE:
            async with self._own_block(session):
                yield session
        else:
            async with self._fresh_block(session) as fresh:
                yield fresh

    @asynccontextmanager
    async def _own_block(self, session: Session) -> AsyncIterator[None]:
        """Under the request's own lock, whose tasks take turns."""
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
        try:
            if session._phase is not Phase.WRITABLE:
                raise SessionClosed
            with _Block(self, session):
                yield
            if session.is_read_only and session._delta().changes:
                raise SessionClosed(
                    "The session was committed and unlocked inside this block of "
                    "`session.exclusive()`; what was changed since is not stored."
                )
        finally:
            self._turns.release()

    @asynccontextmanager
    async def _fresh_block(self, session: Session) -> AsyncIterator[Session]:
        """Under a lock of its own, with a session of its own: nothing else can be in its way."""
        if not self._stored:
            raise SessionClosed("Nothing is stored of this session, so there is nothing to lock.")
        visit = Visit(self._provider, self._id, Use(Access.EXCLUSIVE), self._holder)
        visit.cookie_can_be_sent = self.cookie_can_be_sent
        await visit.begin()
        fresh = visit.session
        if not visit._stored:
            raise SessionGone(
                "The session ended, expired, or was given a new id meanwhile; there is nothing "
                "to lock."
            )
        try:
            with _Block(self, fresh):
                yield fresh
        except BaseException:
            await visit.discard()
            raise
        else:
            await visit.end()
            self._adopt(visit, session)
        finally:
            visit.let_session_go()

    def _adopt(self, visit: Visit, session: Session) -> None:
        """What a block has stored is what this request has from now on."""
        self._id, self._identity, self._stored = visit._id, visit._identity, visit._stored
        if visit.cookie is not Cookie.KEEP:
            self.cookie = visit.cookie
        stored = visit.session
        with suppress(SessionError):
            if session._delta().changes:
                return  # made where nothing is stored: whoever reports it is still to find it
            session._load(
                stored._segments,
                stored._stored_user,
                stored._stored_timeout,
                is_new=not visit._stored,
                replaced=stored._replaced,
            )


class _Block:
    """An open `session.exclusive()`, known to the code within it and to the tasks it starts."""

    __slots__ = ("_before", "is_open", "session", "visit")

    def __init__(self, visit: Visit, session: Session) -> None:
        self.visit = visit
        self.session = session
        self.is_open = True

    def __enter__(self) -> None:
        self._before = _open_blocks.get()
        _open_blocks.set((*self._before, self))

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        _open_blocks.set(self._before)


_open_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("gridsession_open_blocks", default=())
