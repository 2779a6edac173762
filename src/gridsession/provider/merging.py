"""What a concurrent request asks of the grid: it commits without a lock, upon what is there.

Its commit says upon which version it was made. Where another came first, the grid answers with
what that one left, this request's changes are put upon it, key by key, and it is tried again. It
takes a place in line, as an exclusive request does, where that one has the lock, where others come
first again and again, and where more than values is to change: a new id, or the session's end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from gridsession.access import Access
from gridsession.errors import (
    GridFull,
    GridUnavailable,
    SessionClosed,
    SessionGone,
    SessionLockTimeout,
    SessionReplaced,
)
from gridsession.grids.contract import (
    REMEMBERED_COMMITS,
    Busy,
    Claim,
    Committed,
    Conflict,
    Gone,
    Granted,
    Locked,
    LockLost,
    Missing,
    QueueFull,
    Replaced,
    Snapshot,
    Version,
)
from gridsession.provider.blocks import blocks_around
from gridsession.provider.storing import NOTHING, Storing, Unfinished
from gridsession.provider.tokens import lock_token
from gridsession.session import Phase, Session

_TRIES = 3  # conflicts; then it waits in line, or it might come too late for ever
_CONCURRENT = Access.CONCURRENT  # an Enum's members are slow to find
_WITHIN = (
    "Inside a block of `session.exclusive()` it is the block that has the lock: save or release "
    "the session that it gives you, and begin the response when it has ended."
)


class Merging(Storing):
    """A turn that may have no lock to commit under. Args: as `Turn`."""

    def _store(self, session: Session, *, release: bool) -> Coroutine[Any, Any, None] | None:
        if self.use.access is not _CONCURRENT or self._claim is not None:
            return super()._store(session, release=release)
        changes = session._abandoned or session._has_new_terms or session._delta().changes
        is_empty = release and not dict.__len__(session) and session._user is None
        if not changes and not self._unfinished and not (is_empty and self._stored):
            return None
        if blocks_around(self.root()):
            raise SessionClosed(_WITHIN)
        if not self._stored:
            return super()._store(session, release=release)
        store = self._abandon if session._abandoned else self._merge
        return store(session, release)

    async def _abandon(self, session: Session, release: bool) -> None:
        """Not waiting for a lock; but an id that is not good any more ends nobody's session."""
        identity = self._identity
        assert identity is not None
        try:
            found = await self._grid.read(identity.key, identity.secret)
        except asyncio.CancelledError:
            if release:
                self._lost_by_cancellation(identity.key)
            raise
        self._check_is_wanted(session)
        match found:
            case Replaced():
                raise SessionReplaced
            case Missing():
                self._has_ended(session)
            case _:
                await self._remove(session, fenced=False)

    async def _merge(self, session: Session, release: bool) -> None:
        """Commit upon whatever is stored by then.

        Raises:
            SessionGone, SessionReplaced: the session has ended, or is another user's.
            SessionClosed: the request was given up meanwhile.
            SessionLockTimeout: another had its lock for too long.
            GridUnavailable, GridFull, SessionTooLarge, SessionTypeError; what `on_conflict` raises.
        """
        assert self._identity is not None
        key = self._identity.key
        line = self._work.line_of(key)
        began = asyncio.get_running_loop().time()
        try:
            async with self._place_in(line.tries, began):
                self._check_is_wanted(session)
                if await self._try_to_commit(session, release):
                    return
            async with self._place_in(line.tickets, began):
                self._check_is_wanted(session)
                await self._take_lock(session, began)
                try:
                    asked = super()._store(session, release=release)
                    if asked is not None:
                        await asked
                finally:
                    if not release:
                        await self._release()
                        self._held_to_the_end = False
        except SessionGone:
            if not release or dict.__len__(session) or session._user is not None:
                raise
            self._has_ended(session)  # as this request wanted, too
        except asyncio.CancelledError:
            if release and self._finishing is None:
                self._lost_by_cancellation(key)
            raise

    @staticmethod
    def _check_is_wanted(session: Session) -> None:
        """Or the request was given up while a save() waited."""
        if session._phase is Phase.DISCARDED:
            raise SessionClosed

    @asynccontextmanager
    async def _place_in(
        self, places: asyncio.Lock | asyncio.Semaphore, began: float
    ) -> AsyncIterator[None]:
        timeout = self._provider.lock_wait_timeout
        try:
            async with asyncio.timeout_at(began + timeout):
                await places.acquire()
        except TimeoutError:
            raise SessionLockTimeout(
                f"Other requests of this session were ahead with their commits for {timeout:g} s."
            ) from None
        try:
            yield
        finally:
            places.release()

    async def _try_to_commit(self, session: Session, release: bool) -> bool:
        """Without the session's lock. False: it has to be taken."""
        unfinished = self._unfinished
        if unfinished is not None:  # a save(): whether it is stored, its repetition tells
            await self._commit_if(session, unfinished, release=False)
            if self._unfinished is unfinished:
                return False
        else:
            self._catch_up(session)
        for _ in range(_TRIES):
            delta = session._delta()
            segments = session._segments_with(delta) if delta.changes else session._segments
            if release and (self._may_change_id(session) or not segments):
                return False
            if not delta.changes and not session._has_new_terms:
                return True  # it is stored already: by that save(), or by another request
            # A new user is stored under the lock, or not yet.
            to_write = segments if delta.changes else None
            change = self._change(session, to_write, session._stored_user)
            attempt = Unfinished(self._version or NOTHING, change, segments)
            outcome = await self._commit_if(session, attempt, release=release)
            if isinstance(outcome, Committed):
                return True
            if not isinstance(outcome, Conflict):
                return False
            self._rebase(session, outcome.snapshot)
        return False

    def _catch_up(self, session: Session) -> None:
        """With what this worker has committed since, and the grid would only tell us."""
        cache, identity, version = self._provider.client_cache, self._identity, self._version
        assert identity is not None
        kept = None if cache is None else cache.get(identity.key)
        if kept is None or kept.secret != identity.secret:
            return
        if version is None or kept.version.counter > version.counter:
            segments = self._provider.envelope.open(identity.key, kept.payload)
            delta = session._delta()
            changed = (*delta.set, *delta.removed)
            if any(segments.get(key) == delta.set.get(key) for key in changed):
                return  # whether that is stored, only the grid knows: a fail-over may take it back
            terms = kept.user, kept.timeout, session._replaced
            self._put_upon(session, segments, kept.version, terms)
            self._stored_bytes = kept.payload

    async def _commit_if(
        self, session: Session, attempt: Unfinished, *, release: bool
    ) -> Committed | Conflict | Locked | LockLost:
        identity, (base, change, segments, token) = self._identity, attempt
        assert identity is not None
        question = identity.key, identity.secret, base, change
        ask: Callable[[], Awaitable[Committed | Conflict | Locked | Replaced | LockLost | Gone]]
        ask = partial(self._grid.commit_if, *question)
        if token is not None:
            ask = partial(self._grid.commit, identity.key, token, change, release=True)
        is_old, self._unfinished = self._unfinished is attempt, attempt
        is_repeated = is_old
        self._expect_commit()
        try:
            try:
                outcome = await ask()
            except GridUnavailable as error:
                if is_repeated or error.never_asked:
                    raise
                is_repeated = True
                outcome = await ask()
        except GridFull:
            if not is_repeated:
                self._unfinished = None
            raise
        except asyncio.CancelledError:
            if release:
                self._finishing = self._work.finish_commit_if(*question)
            raise
        if is_repeated and isinstance(outcome, Conflict):
            self._settle(outcome.snapshot.version)
        elif not is_repeated or not isinstance(outcome, Locked | LockLost):
            self._unfinished = None
        match outcome:
            case Replaced():
                raise SessionReplaced
            case Committed():
                self._has_stored(session, segments, change.user, change.timeout)
                # Whoever replaces an id makes a new version, and this one was the newest.
                self._held_to_the_end = release and not is_repeated
                secret = b"" if session._replaced else identity.secret
                self._keep_committed(outcome, change, secret)
                if is_repeated:
                    self._drop_kept()  # others may have committed since
            case Conflict() | Locked() | LockLost():
                pass
            case _:
                raise SessionGone
        if session._phase is Phase.DISCARDED and not isinstance(outcome, Committed):
            raise SessionClosed  # the request was given up while a save() was on its way
        return outcome

    def _settle(self, version: Version) -> None:
        """A commit that got no answer is not known to the grid, which has come to this version.

        Raises:
            GridUnavailable: it may have been stored, so long ago that the grid has forgotten it.
        """
        attempt = self._unfinished
        if attempt is not None:
            if version.counter - attempt.base.counter > REMEMBERED_COMMITS:
                raise GridUnavailable(
                    "whether this request's changes were stored is not known: the answer was "
                    "lost, and too many others have committed since"
                )
            self._unfinished = None

    async def _take_lock(self, session: Session, began: float) -> None:
        """Wait in line, with a ticket that no limit counts: the work has been done already.

        Args:
            began: the loop's second from which the waiting counts.
        """
        provider, identity = self._provider, self._identity
        assert identity is not None
        claim = self._claim = Claim(lock_token(), self._holder, provider.lease, None)

        async def ask() -> Granted | Busy | QueueFull | Replaced | Missing:
            known = self._newest_known(identity)
            answer = await self._grid.acquire(identity.key, identity.secret, claim, known)
            if self._claim is not claim:  # the request was given up while a save() was on its way
                raise SessionClosed
            return answer

        answer = None
        try:
            answer = await ask()
            if isinstance(answer, Busy):
                answer = await self._answer_after(answer, ask, began)
            if not isinstance(answer, Granted):
                self._claim = None  # nothing of it is left behind
                raise SessionReplaced if isinstance(answer, Replaced) else SessionGone
            self._hold()
            self._settle(answer.snapshot.version)
            if answer.snapshot.version != self._version:
                self._rebase(session, answer.snapshot)
        except BaseException as error:
            if self._claim is claim:
                self._let_go()
            was_asked = answer is not None or not getattr(error, "never_asked", False)
            if was_asked:  # else each request of an outage would leave a task behind
                self._work.withdraw(identity.key, claim.token)
            raise

    def _rebase(self, session: Session, snapshot: Snapshot) -> None:
        terms = snapshot.user, snapshot.timeout, snapshot.replaced
        self._put_upon(session, self._segments_of(snapshot), snapshot.version, terms)

    def _put_upon(
        self,
        session: Session,
        segments: dict[str, bytes],
        version: Version,
        terms: tuple[str | None, float, bool],
    ) -> None:
        """Put what this request changed upon a newer version, of these user, timeout, replaced."""
        provider = self._provider
        both = session._rebase(segments, *terms, on_conflict=provider.on_conflict)
        self._version = version  # not before: what was not put upon it must not be committed so
        provider.merges += 1
        provider.key_conflicts += both
