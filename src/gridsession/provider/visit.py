"""A session's way through one request: begin, save, end.

A `Visit` is what an adapter drives, and what a `Session`'s awaitable methods are bound to.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Any

from gridsession import payload
from gridsession.errors import (
    GridUnavailable,
    SessionClosed,
    SessionError,
    SessionGone,
    SessionLockLost,
    SessionReadOnly,
    SessionReplaced,
)
from gridsession.grids.contract import (
    Change,
    Claim,
    Committed,
    Exists,
    Gone,
    LockLost,
    NewRecord,
    Removed,
    Rotation,
)
from gridsession.identity import (
    SECRET_BYTES,
    Identity,
    name_of,
    parse_id,
    rotated_id,
)
from gridsession.provider.blocks import TaskTurns, blocks_around, exclusive
from gridsession.provider.log import log
from gridsession.provider.no_session import NoSession
from gridsession.provider.tokens import commit_token, lock_token
from gridsession.provider.turn import Turn
from gridsession.session import Delta, Phase, Session
from gridsession.settings import Access, Use

# Looked at several times a request, and an Enum's members are slow to find.
_EXCLUSIVE, _READ_ONLY_ACCESS = Access.EXCLUSIVE, Access.READ_ONLY
_WRITABLE, _READ_ONLY, _CLOSED = Phase.WRITABLE, Phase.READ_ONLY, Phase.CLOSED


class Visit(Turn, TaskTurns):
    """One request's use of one session. Args: as `Turn`.

    Its turns are those of the request's tasks at the session: `save`, `release`, `end` and blocks
    of `exclusive` come one after the other.
    """

    # Defaults on the class: most visits change none of them.
    _unsure = False  # whether a save() that failed was carried out
    _finishing: asyncio.Task[Any] | None = None  # what was asked when this was cancelled

    def _make_session(
        self,
        timeout: float,
        segments: dict[str, bytes] | None = None,
        user: str | None = None,
        replaced: bool = False,
    ) -> None:
        access = self.use.access
        if access is _EXCLUSIVE:
            self.session = Session(self, access, _WRITABLE, timeout, segments, user, replaced)
        elif access is _READ_ONLY_ACCESS:
            self.session = Session(self, access, _READ_ONLY, timeout, segments, user, replaced)
        else:
            self.session = NoSession(self, access, Phase.NOT_AVAILABLE, timeout)

    # -- end ------------------------------------------------------------------------------

    async def end(self) -> None:
        """Commit what changed, hand the lock on. Call it before response headers leave.

        It waits for blocks of `exclusive()` in which other tasks of the request still are, and
        for what they commit: half of it is not to be stored, and an id that they change is to
        leave with the headers.

        Raises:
            SessionError: what the handler did was not stored; the lock is released all the same.
        """
        session = self.session
        held_up: asyncio.Future[None] | None = None
        turns: TaskTurns | None = None
        closing = False
        try:
            if self._taken or self._headers_held_by or self._finishing is not None:
                turns = await self._take_turn(session)
                await self.wait_for_what_is_under_way()
            else:
                self._taken, turns = True, self
            if self._outer is not None:
                held_up = self._hold_headers()
            if session._phase is _WRITABLE:
                # Now, not when it is stored: what is changed while the grid is asked is told.
                session._phase, closing = _CLOSED, True
                asked = self._store(session, release=True)
                if asked is not None:
                    await asked
            elif session._phase is _READ_ONLY:
                self._refuse_changes(session)
        except BaseException as error:
            # Cancelled before it began, it may be called again; or `discard`.
            if closing or isinstance(error, Exception):
                await self._give_up(session, closing)
            raise
        finally:
            self._end_beginning()
            if turns is not None:
                self._end_turn(turns, session)
            if held_up is not None:
                held_up.set_result(None)

    async def discard(self, session: Session | None = None) -> None:
        """Forget what was not committed, and hand the lock on."""
        await self._give_up(self.session if session is None else session, False)

    async def _give_up(self, session: Session, closing: bool) -> None:
        if closing or session._phase is _WRITABLE:  # else another task's end is under way, or over
            session._discard()
        self._end_beginning()
        await self._release()

    async def _take_turn(self, session: Session) -> TaskTurns:
        """Whose turn was taken: this session's, or within the block of it that one is inside."""
        around = blocks_around(self.root(), session)
        turns: TaskTurns = around[0] if around else self
        await turns.take_turn(self.lock_wait_timeout)
        return turns

    def _end_turn(self, turns: TaskTurns, session: Session) -> None:
        turns.end_turn()
        if turns is not self and session._phase is not _WRITABLE:
            for block in blocks_around(self.root(), session):  # they have nothing left to guard
                block.give_turn_back()

    async def wait_for_what_is_under_way(self) -> None:
        """Wait until it is known which id the headers that are about to leave have to carry.

        Raises:
            SessionError: what was under way when this request was cancelled is not stored.
        """
        while self._headers_held_by:
            await asyncio.wait(self._headers_held_by)
        if self._finishing is not None:
            match await asyncio.shield(self._finishing):
                case LockLost():
                    raise SessionLockLost
                case Gone():
                    raise SessionGone
                case None:
                    raise GridUnavailable("whether the session was stored is not known")

    @staticmethod
    def _refuse_changes(session: Session) -> None:
        delta = session._delta()
        if delta.changes:
            keys = ", ".join(repr(key) for key in (*delta.set, *delta.removed))
            raise SessionReadOnly(
                f"A read-only request changed values inside its session, under {keys}; nothing "
                'was stored. Give this path the access "exclusive".'
            )

    def _store(self, session: Session, *, release: bool) -> Coroutine[Any, Any, None] | None:
        """What has to be asked of the grid; None: nothing."""
        if session._abandoned:
            return self._remove(session, fenced=False)
        delta = session._delta()
        if not self._stored:
            if delta.set or session._user is not None:
                return self._create(session, delta, release=release)
            return None
        segments = session._segments_with(delta) if delta.changes else session._segments
        if release and not segments and session._user is None:  # Starlette's logout
            return self._remove(session, fenced=True)
        if delta.changes or self._unsure or session._has_new_terms:
            return self._commit(session, segments, delta.changes, release)
        return self._release() if release else None

    async def _create(self, session: Session, delta: Delta, *, release: bool) -> None:
        self.check_id_may_change()
        provider = self._provider
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
        claim = None
        if not release:
            claim = Claim(lock_token(), self._holder, provider.lease, provider.queue_limit)
            self._claim = claim
        session._regenerate = False  # its id is new; what is asked for from now on is another one
        try:
            outcome = await self._grid.create(identity.key, new, claim)
        except BaseException as error:
            # Whether it was written is unknown. Nobody has been given its id: it expires unused.
            if release and isinstance(error, asyncio.CancelledError):
                name = name_of(identity.key)
                log.error("session %s: the work of a cancelled request was not stored", name)
            self.leave()
            self._forget_new_id()  # a second try is another session
            raise
        if isinstance(outcome, Exists):
            raise SessionError(f"A new session's key {name_of(identity.key)} was taken already.")
        if claim is not None:
            if self._claim is not claim:  # the request was given up meanwhile
                self._work.withdraw(identity.key, claim.token)
                raise SessionClosed
            self._hold()
        self._be_known_as((self._own_id(), identity))
        self._held_to_the_end = release
        session._committed(segments, new.user, new.timeout)

    async def _commit(
        self, session: Session, segments: dict[str, bytes], changed: bool, release: bool
    ) -> None:
        identity, claim = self._identity, self._claim
        assert identity is not None
        assert claim is not None
        key = identity.key
        # A new id waits for the response that carries it: save() stores what is not tied to it.
        user = session._user if release else session._stored_user
        change = Change(
            commit_token(),
            payload.join(segments, self._provider.max_payload_bytes)
            if changed or self._unsure
            else None,
            session._timeout,
            user,
        )
        rotated = None
        if user != session._stored_user or (release and session._regenerate):
            rotated = self._rotate(session, identity, change)
        token = self._let_go() if release else claim.token
        self._unsure = True
        try:
            outcome = await self._grid.commit(key, token, change, release=release)
        except asyncio.CancelledError:
            if release:  # the work was done, so its commit stands; repeating it is harmless
                self._finishing = self._work.finish_commit(key, token, change)
                if rotated is not None:
                    self._finishing.add_done_callback(partial(self._known_if_done, rotated))
                    self.root()._wait_with_headers_for(self._finishing)
            raise
        except BaseException:
            if release:
                self._work.withdraw(key, token)
            raise
        self._unsure = False
        if type(outcome) is not Committed:
            if session._phase is Phase.DISCARDED:  # which gave the lock back
                raise SessionClosed
            raise (SessionLockLost if type(outcome) is LockLost else SessionGone)
        session._committed(segments, user, change.timeout)
        if release:
            self._held_to_the_end = True
            session._regenerate = False
        if rotated is not None:
            self._be_known_as(rotated)

    def _rotate(
        self, session: Session, identity: Identity, change: Change
    ) -> tuple[bytes, Identity]:
        """Let a change replace the secret; the new id."""
        self.check_id_may_change()
        user_changed = change.user != session._stored_user
        if user_changed and session._replaced:
            raise SessionReplaced
        rotated = rotated_id(identity.handle, os.urandom(SECRET_BYTES)).encode()
        identity_then = parse_id(rotated)
        assert identity_then is not None
        change.rotation = Rotation(identity_then.secret, user_changed)
        return rotated, identity_then

    async def _remove(self, session: Session, *, fenced: bool) -> None:
        if self._stored:
            assert self._identity is not None
            key, token = self._identity.key, self._let_go() if self._claim is not None else b""
            try:
                outcome = await self._grid.remove(key, token if fenced else None)
            except asyncio.CancelledError:  # as a commit's
                self._finishing = self._work.finish_removal(key, token, fenced=fenced)
                self._finishing.add_done_callback(partial(self._known_if_done, None))
                self.root()._wait_with_headers_for(self._finishing)
                raise
            except BaseException:
                self._work.withdraw(key, token)
                raise
            if isinstance(outcome, LockLost):
                raise SessionLockLost
            self._be_known_as(None)
        self._forget_id()
        session._load({}, None, session._stored_timeout, is_new=True, replaced=False)
        session._phase = _CLOSED

    def _known_if_done(
        self, known: tuple[bytes, Identity] | None, finishing: asyncio.Task[Any]
    ) -> None:
        if not finishing.cancelled() and isinstance(finishing.result(), Committed | Removed):
            self._be_known_as(known)

    # -- what a Session's members call ----------------------------------------------------

    def let_session_go(self) -> None:
        """Forget the session, which knows this visit: while both know each other, what they hold
        waits for the garbage collector. A session that is used later makes itself known again.
        """
        del self.session

    async def save(self, session: Session) -> None:
        self.session = session
        turns = await self._take_turn(session)
        held_up = None if self._outer is None else self._hold_headers()
        try:
            session._write()  # it may have been committed and unlocked meanwhile
            asked = self._store(session, release=False)
            if asked is not None:
                await asked
        finally:
            if session._phase is not _WRITABLE:
                self._end_beginning()
            self._end_turn(turns, session)
            if held_up is not None:
                held_up.set_result(None)

    async def release(self, session: Session) -> None:
        self.session = session
        if session._phase is not _READ_ONLY:
            await self.end()
            self._held_to_the_end = False

    @property
    def lock_wait_timeout(self) -> float:
        """Seconds for which its tasks wait for their turn, as requests do for the lock."""
        return self._provider.lock_wait_timeout

    def exclusive(self, session: Session) -> AbstractAsyncContextManager[Session]:
        return exclusive(self, session)

    async def visit_of_its_own(self) -> Visit:
        """For a block of `exclusive()` that this one's lock is not there for.

        Raises: as `begin`, and
            SessionClosed: nothing is stored of this session, and none can begin any more.
            SessionGone: it has ended.
        """
        while True:
            if not self._stored:
                visit = await self._visit_that_begins()
                if visit is not None:
                    return visit
            asked_with = self._id
            visit = Visit(self._provider, asked_with, Use(_EXCLUSIVE), self._holder)
            visit._outer = self
            try:
                await visit.begin()
                if visit._stored:
                    return visit
                raise SessionGone(
                    "The session ended, expired, or was given a new id meanwhile; there is "
                    "nothing to lock."
                )
            except (SessionGone, SessionReplaced):
                if under_way := self.root()._headers_held_by:
                    await asyncio.wait(under_way)
                if self._id == asked_with:
                    raise
                # Another block of this request has given it a new id meanwhile.

    async def _visit_that_begins(self) -> Visit | None:
        """For a block that may begin a session. None: another block has begun it meanwhile."""
        root = self.root()
        self._check_may_begin()
        turns = root._beginnings = root._beginnings or TaskTurns()
        await turns.take_turn(self.lock_wait_timeout)
        visit = None
        try:
            if root._stored:
                self._id, self._identity, self._stored = root._id, root._identity, True
            else:
                self._check_may_begin()
                visit = Visit(self._provider, None, Use(_EXCLUSIVE), self._holder)
                visit._outer = self
                visit._id = self._own_id()
                visit._turn_to_begin = turns
                visit._make_session(self._provider.timeout)
        finally:
            if visit is None:
                turns.end_turn()
        return visit

    def adopt(self, visit: Visit, session: Session) -> None:
        """What a block has stored is what this request has from now on."""
        block = visit.session
        if not visit._stored:
            if not self._stored:  # else another block has begun it, since this one was released
                session._load({}, None, session._stored_timeout, is_new=True, replaced=False)
            return
        # Another block may have replaced the id meanwhile; then this one's is the old one.
        replaced = block._replaced if visit._id == self._id else session._replaced
        with suppress(SessionError):
            if session._delta().changes:
                return  # made where nothing is stored: whoever reports it is still to find it
            session._load(
                block._segments,
                block._stored_user,
                block._stored_timeout,
                is_new=False,
                replaced=replaced,
            )
