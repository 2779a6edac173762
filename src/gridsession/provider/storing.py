"""What a request asks of the grid in the end: to create a session, to commit, to remove it.

The middle of a `Visit`. What was asked and not answered is finished, or withdrawn, beside it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from functools import partial
from typing import Any, NamedTuple

from gridsession.access import Access
from gridsession.changes import Delta
from gridsession.errors import (
    GridFull,
    GridUnavailable,
    SessionClosed,
    SessionError,
    SessionGone,
    SessionLockLost,
    SessionReplaced,
)
from gridsession.grids.contract import (
    REPLACED_SECONDS,
    Change,
    Claim,
    Committed,
    Exists,
    LockLost,
    NewRecord,
    Removed,
    Rotation,
    Version,
)
from gridsession.identity import (
    SECRET_BYTES,
    Identity,
    name_of,
    parse_id,
    rotated_id,
)
from gridsession.provider.log import log
from gridsession.provider.tokens import commit_token, lock_token
from gridsession.provider.turn import Turn
from gridsession.session import Phase, Session
from gridsession.settings import seconds

# An Enum's members are slow to find.
_CLOSED, _CONCURRENT = Phase.CLOSED, Access.CONCURRENT


NOTHING = Version(0, 0)  # what a session was that this request has not seen


class Unfinished(NamedTuple):
    """A commit, what it makes of which version, and under which lock, if any."""

    base: Version
    change: Change
    segments: dict[str, bytes]
    token: bytes | None = None


class Storing(Turn):
    """A turn, and what it stores. Args: as `Turn`."""

    # Defaults on the class: most visits change none of them.
    _unfinished: Unfinished | None = None  # a commit that got no answer
    _finishing: asyncio.Task[Any] | None = None  # what was asked when this was cancelled
    _is_lost = False  # what was done is not stored, and the end is still to tell that

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
        if delta.changes or self._unfinished is not None or session._has_new_terms:
            return self._commit(session, segments, delta.changes, release)
        return self._release() if release else None

    async def _create(self, session: Session, delta: Delta, *, release: bool) -> None:
        self.check_id_may_change()
        provider = self._provider
        segments = session._segments_with(delta)
        new = NewRecord(
            commit_token=commit_token(),
            secret=b"",
            payload=b"",
            timeout=session._timeout,
            absolute_timeout=provider.absolute_timeout,
            user=session._user,
        )
        self._identity = identity = parse_id(self._own_id())
        assert identity is not None
        new.secret = identity.secret
        new.payload = provider.envelope.seal(identity.key, segments, os.urandom)
        self._expect_commit()
        claim = None
        if not release and self.use.access is not _CONCURRENT:
            claim = Claim(lock_token(), self._holder, provider.lease, provider.queue_limit)
            self._claim = claim
        session._regenerate = False  # its id is new; what is asked for from now on is another one
        try:
            outcome = await self._grid.create(identity.key, new, claim)
        except BaseException as error:
            # Whether it was written is unknown. Nobody has been given its id: it expires unused.
            if release and isinstance(error, asyncio.CancelledError):
                self._lost_by_cancellation(identity.key)
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
        elif not release and session._phase is Phase.DISCARDED:
            raise SessionClosed
        self._be_known_as((self._own_id(), identity))
        self._held_to_the_end = release
        session._committed(segments, new.user, new.timeout)
        self._keep_committed(outcome, new, identity.secret)

    async def _commit(
        self, session: Session, segments: dict[str, bytes], changed: bool, release: bool
    ) -> None:
        identity, claim = self._identity, self._claim
        assert identity is not None
        assert claim is not None
        key = identity.key
        # A new id waits for the response that carries it: save() stores what is not tied to it.
        user = session._user if release else session._stored_user
        change = self._change(session, segments if changed else None, user)
        replaces_id = self._replaces_id(session, user) or (release and session._regenerate)
        rotated = self._rotate(session, identity, change) if replaces_id else None
        token = self._let_go() if release else claim.token
        self._unfinished = Unfinished(self._version or NOTHING, change, segments, token)
        self._expect_commit()
        try:
            outcome = await self._grid.commit(key, token, change, release=release)
        except asyncio.CancelledError:
            if release:  # the work was done, so its commit stands; repeating it is harmless
                self._finishing = self._work.finish_commit(key, token, change)
                if rotated is not None:
                    self._finishing.add_done_callback(partial(self._known_if_done, rotated))
                    self.root()._wait_with_headers_for(self._finishing)
            raise
        except GridUnavailable:
            if rotated is not None:
                # If it was carried out, the browser's id is good for nothing any more, and the
                # error's answer has to carry the new one: it waits a second `grid_timeout` for it.
                bound = seconds(self._provider.settings.grid_timeout)
                secret = rotated[1].secret
                finding_out = self._work.find_out(key, token, secret, within=bound)
                finding_out.add_done_callback(partial(self._known_if_carried_out, rotated))
                self.root()._wait_with_headers_for(finding_out)
            elif release:
                self._work.withdraw(key, token)
            raise
        except BaseException as error:
            if isinstance(error, GridFull):  # the one failure that says that nothing was stored
                self._unfinished = None
            if release:
                self._work.withdraw(key, token)
            raise
        self._unfinished = None
        if type(outcome) is not Committed:
            if session._phase is Phase.DISCARDED:  # which gave the lock back
                raise SessionClosed
            raise (SessionLockLost if type(outcome) is LockLost else SessionGone)
        self._has_stored(session, segments, user, change.timeout)
        if release:
            self._held_to_the_end = True
            session._regenerate = False
        if rotated is not None:
            self._be_known_as(rotated)
            identity = rotated[1]
        self._keep_committed(outcome, change, b"" if session._replaced else identity.secret)

    @staticmethod
    def _has_stored(
        session: Session, segments: dict[str, bytes], user: str | None, timeout: float
    ) -> None:
        session._committed(segments, user, timeout)
        if session._phase is Phase.DISCARDED:  # while a save() was on its way
            session._discard()  # anew: the keys that it has are those that are stored

    def _change(
        self, session: Session, segments: dict[str, bytes] | None, user: str | None
    ) -> Change:
        """What a commit is to write; `segments` None: not the payload, if nothing is in doubt."""
        if segments is None and self._unfinished is not None:
            segments = session._segments
        stored = None
        if segments is not None:
            assert self._identity is not None
            stored = self._provider.envelope.seal(self._identity.key, segments, os.urandom)
        return Change(commit_token(), stored, session._timeout, user)

    def _expect_commit(self) -> None:
        if self._provider.client_cache is not None:
            self._asked_at = self._provider.client_cache.steady()

    def _keep_committed(
        self, committed: Committed, written: Change | NewRecord, secret: bytes
    ) -> None:
        """What the grid has now."""
        self._version = committed.version
        cache, identity = self._provider.client_cache, self._identity
        if cache is not None and identity is not None:
            if written.payload is not None:
                self._stored_bytes = written.payload
            cache.committed(
                identity.key,
                secret,
                self._stored_bytes,
                committed,
                timeout=written.timeout,
                user=written.user,
                as_of=self._asked_at,
            )

    @staticmethod
    def _replaces_id(session: Session, user: str | None) -> bool:
        """Whether another user needs another id: not who logs out with an id that was replaced."""
        return user != session._stored_user and not (session._replaced and user is None)

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
            self._drop_kept()
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
        self._close_empty(session)

    @staticmethod
    def _close_empty(session: Session) -> None:
        session._load({}, None, session._stored_timeout, is_new=True, replaced=False)
        session._phase = _CLOSED

    def _lost_by_cancellation(self, key: bytes) -> None:
        """Nobody stores what a cancelled request did; should it go on all the same, it is told."""
        self._is_lost = True
        log.error("session %s: the work of a cancelled request was not stored", name_of(key))

    def _has_ended(self, session: Session) -> None:
        """It has been ended by another request, as this one wanted to.

        Raises:
            SessionGone: or its id was replaced, so long ago that the grid has forgotten it.
        """
        if asyncio.get_running_loop().time() - self._found_at >= REPLACED_SECONDS:
            raise SessionGone
        self._drop_kept()
        self._be_known_as(None)
        self._close_empty(session)

    def _known_if_done(
        self, known: tuple[bytes, Identity] | None, finishing: asyncio.Task[Any]
    ) -> None:
        if not finishing.cancelled() and isinstance(finishing.result(), Committed | Removed):
            self._be_known_as(known)

    def _known_if_carried_out(
        self, known: tuple[bytes, Identity], finding_out: asyncio.Task[bool]
    ) -> None:
        if not finding_out.cancelled() and finding_out.result():
            self._is_lost = False
            self._be_known_as(known)

    def _may_change_id(self, session: Session) -> bool:
        """Whether storing it for good may begin a session, replace its id, or end it."""
        return (
            not self._stored
            or session._abandoned
            or session._regenerate
            or session._user != session._stored_user
            or not dict.__len__(session)
        )
