"""A session's way through one request: begin, save, end.

A `Visit` is what an adapter drives, and what a `Session`'s awaitable methods are bound to.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, suppress

from gridsession.access import Access, Use
from gridsession.errors import (
    GridUnavailable,
    SessionClosed,
    SessionError,
    SessionGone,
    SessionLockLost,
    SessionReadOnly,
    SessionReplaced,
)
from gridsession.grids.contract import Committed, Gone, Removed
from gridsession.provider.blocks import blocks_around, exclusive
from gridsession.provider.merging import Merging
from gridsession.provider.no_session import NoSession
from gridsession.provider.task_turns import TaskTurns
from gridsession.session import Phase, Session

# Looked at several times a request, and an Enum's members are slow to find.
_EXCLUSIVE, _READ_ONLY_ACCESS, _NONE = Access.EXCLUSIVE, Access.READ_ONLY, Access.NONE
_CONCURRENT = Access.CONCURRENT
_WRITABLE, _READ_ONLY, _CLOSED = Phase.WRITABLE, Phase.READ_ONLY, Phase.CLOSED

_LOST = (
    "What this request did before is not stored: its `release()` failed or was cancelled, or the "
    "request was given up."
)


class Visit(Merging, TaskTurns):
    """One request's use of one session. Args: as `Turn`.

    Its turns are those of the request's tasks at the session: `save`, `release`, `end` and blocks
    of `exclusive` come one after the other.
    """

    _as_of = 0  # which of this request's blocks, in the order of their locks, the values are of

    def _make_session(
        self,
        timeout: float,
        segments: dict[str, bytes] | None = None,
        user: str | None = None,
        replaced: bool = False,
    ) -> None:
        access = self.use.access
        if access is _NONE:
            self.session = NoSession(self, access, Phase.NOT_AVAILABLE, timeout)
            return
        phase = _READ_ONLY if access is _READ_ONLY_ACCESS else _WRITABLE
        self.session = Session(self, access, phase, timeout, segments, user, replaced)

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
            if session._phase is Phase.DISCARDED:  # it has nothing left to keep apart from others'
                await self.wait_for_what_is_under_way()
            elif self._taken or self._headers_held_by or self._finishing is not None:
                turns = await self._take_turn(session)
                await self.wait_for_what_is_under_way()
            else:
                self._taken, turns = True, self
            if session._phase is _WRITABLE:
                if self._outer is not None and self._may_change_id(session):
                    held_up = self._hold_headers()
                # Now, not when it is stored: what is changed while the grid is asked is told.
                session._phase, closing = _CLOSED, True
                asked = self._store(session, release=True)
                if asked is not None:
                    await asked
            elif session._phase is _READ_ONLY:
                self._refuse_changes(session)
            elif self._is_lost and self._finishing is None:
                raise SessionClosed(_LOST)
        except BaseException as error:
            self._drop_kept()
            # Cancelled before it began, it may be called again; or `discard`.
            if closing or isinstance(error, Exception):
                self._is_lost |= isinstance(error, Exception)
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
            self._leave_id_to_create()
            self._end_beginning()
            self.wake_all()  # whoever has the turn has nothing left to guard
        await self._release()

    def _leave_id_to_create(self) -> None:
        """Where a save() is about to create the session: its id is spent. The next block does not
        wait for that, and does not begin under the same id.
        """
        outer = self._outer
        creates = self._claim is not None and not self._stored
        if creates and outer is not None and outer._id == self._id:
            outer._forget_new_id()

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

    async def wait_for_ids_under_way(self) -> None:
        """Wait until it is known by which id the request goes. Raises nothing."""
        root = self.root()
        while root._headers_held_by:
            await asyncio.wait(root._headers_held_by)

    async def wait_for_what_is_under_way(self) -> None:
        """Wait until it is known which id the headers that are about to leave have to carry.

        Raises:
            SessionError: what was under way when this request was cancelled is not stored.
        """
        await self.wait_for_ids_under_way()
        if self._finishing is not None:
            match await asyncio.shield(self._finishing):
                case Committed() | Removed():
                    pass
                case Gone():
                    raise SessionGone
                case None:
                    raise GridUnavailable("whether the session was stored is not known")
                case _:
                    raise SessionLockLost

    @staticmethod
    def _refuse_changes(session: Session) -> None:
        delta = session._delta()
        if delta.changes:
            keys = ", ".join(repr(key) for key in (*delta.set, *delta.removed))
            raise SessionReadOnly(
                f"A read-only request changed values inside its session, under {keys}; nothing "
                'was stored. Give this path the access "exclusive".'
            )

    # -- what a Session's members call ----------------------------------------------------

    def let_session_go(self) -> None:
        """Forget the session, which knows this visit: while both know each other, what they hold
        waits for the garbage collector. A session that is used later makes itself known again.
        """
        del self.session

    async def save(self, session: Session) -> None:
        self.session = session
        turns = await self._take_turn(session)
        held_up: asyncio.Future[None] | None = None
        try:
            session._write()  # it may have been committed and unlocked meanwhile
            if self._outer is not None and (session._abandoned or not self._stored):
                held_up = self._hold_headers()
            asked = self._store(session, release=False)
            if asked is not None:
                await asked
        except BaseException:
            self._drop_kept()
            raise
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
            if session._phase is Phase.DISCARDED and self._finishing is None:
                raise SessionClosed(_LOST)

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
        visit, root = await self._visit_with_a_lock(), self.root()
        visit._as_of = root._blocks = root._blocks + 1
        return visit

    async def _visit_with_a_lock(self) -> Visit:
        """Or with the turn to begin a session, which has a lock when it is stored."""
        while True:
            self._take_over_the_requests_id()
            if not self._stored:
                visit = await self._visit_that_begins()
                if visit is not None:
                    return visit
            asked_with = self._id
            visit = Visit(self._provider, asked_with, Use(_EXCLUSIVE), self._holder)
            visit._outer = self
            try:
                await visit.begin()
                if visit.session._replaced:
                    await visit._come_with_the_requests_id()
                if visit._stored:
                    return visit
                raise SessionGone(
                    "The session ended, expired, or was given a new id meanwhile; there is "
                    "nothing to lock."
                )
            except (SessionGone, SessionReplaced):
                await self.wait_for_ids_under_way()
                if self.root()._id == asked_with:
                    raise
                # Another block of this request has given it a new id meanwhile.

    async def _come_with_the_requests_id(self) -> None:
        """For a block whose turn came with a replaced id. Where another block of this request has
        replaced it, the browser is about to get the new one: it is no stranger to that.
        """
        try:
            await self.wait_for_ids_under_way()
            root = self.root()
            if root._stored and root._id != self._id:
                waited = self.session.waited
                self._take_over_the_requests_id()
                busy = self._took(await self._ask_grid(None))  # which knows if that is the newest
                if busy is not None:
                    await self.wait(busy)
                self.session.waited += waited
        except BaseException:
            self.leave()
            raise

    async def _visit_that_begins(self) -> Visit | None:
        """For a block that may begin a session. None: another block has begun it meanwhile."""
        root = self.root()
        self._check_may_begin()
        turns = root._beginnings = root._beginnings or TaskTurns()
        await turns.take_turn(self.lock_wait_timeout)
        visit = None
        try:
            if root._stored:
                self._take_over_the_requests_id()
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
        if visit._as_of < self._as_of:
            return  # while the grid answered it, another had the lock, and its values are here
        self._as_of = visit._as_of
        block = visit.session
        if not visit._stored:
            if not self._stored:  # else another block has begun it, since this one was released
                session._load({}, None, session._stored_timeout, is_new=True, replaced=False)
            return
        # Another block may have replaced the id meanwhile; then this one's is the old one.
        replaced = block._replaced if visit._id == self._id else session._replaced
        with suppress(SessionError):
            if (
                (self._unfinished and self.use.access is _CONCURRENT)
                or session._abandoned
                or session._has_new_terms
                or session._delta().changes
            ):
                # Made where nothing is stored: whoever reports it is still to find it. Or in a
                # concurrent request, whose end will find that another version is stored.
                return
            self._version = visit._version
            self._stored_bytes = visit._stored_bytes
            session._load(
                block._segments,
                block._stored_user,
                block._stored_timeout,
                is_new=False,
                replaced=replaced,
            )
