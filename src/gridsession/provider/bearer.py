"""Which id a session goes by in one request, and what becomes of the browser's cookie."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from enum import Enum
from typing import Any

from gridsession.errors import SessionClosed
from gridsession.identity import ID_BYTES, Identity, new_id, parse_id
from gridsession.provider.task_turns import TaskTurns
from gridsession.session import Session


class Cookie(Enum):
    """What is to become of the browser's cookie."""

    KEEP = "keep"
    SET = "set"
    REMOVE = "remove"


_KEEP, _SET, _REMOVE = Cookie.KEEP, Cookie.SET, Cookie.REMOVE  # an Enum's members are slow to find


class Bearer:
    """Who bears a session id. The lowest part of a `Visit`.

    Attributes:
        cookie: what is to become of the browser's cookie.
        cookie_can_be_sent: the headers, a response's or those of a WebSocket's accept, have not
            left yet, or there are none.
    """

    # Defaults on the class: most visits change none of them.
    cookie = _KEEP
    cookie_can_be_sent = True
    _id: bytes | None = None
    _identity: Identity | None = None
    _stored = False  # the grid has the session
    _held_to_the_end = False  # the lock, or the newest version, until the headers leave
    _headers_held_by: frozenset[asyncio.Future[Any]] = frozenset()
    _outer: Bearer | None = None  # of whose `exclusive()` this is a block
    _beginnings: TaskTurns | None = None  # of blocks that begin a session; else each began its own
    _turn_to_begin: TaskTurns | None = None  # which this one, such a block, has
    _blocks = 0  # of `exclusive()`: how many there were that had a lock of their own

    def root(self) -> Bearer:
        """The request's own: this one, or the one that it is a block of."""
        bearer = self
        while bearer._outer is not None:
            bearer = bearer._outer
        return bearer

    def _outward(self) -> Iterator[Bearer]:
        """This one, and what it is a block of, out to the request's own."""
        bearer: Bearer | None = self
        while bearer is not None:
            yield bearer
            bearer = bearer._outer

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

    def cookie_to_send(self, session: Session, *, rolling: bool) -> Cookie:
        """What the response's headers say of the cookie.

        A request that came with a replaced id is never answered with one: the browser has the
        new cookie already, and who holds only the old one must not be given it. So the same
        cookie is sent again (`rolling`) only by who held the lock, or committed upon the newest
        version, just now: else another may have replaced the id meanwhile.
        """
        if session._replaced:
            return _KEEP
        if rolling and self.cookie is _KEEP and self._held_to_the_end and session.accessed:
            return _SET
        return self.cookie

    def check_id_may_change(self) -> None:
        if not self.root().cookie_can_be_sent:
            raise SessionClosed(
                "The headers have left, with the response's start or the WebSocket's accept: no "
                "cookie can carry a new session id any more. Change the user or the id, or store "
                "something in a new session, before."
            )

    def _check_may_begin(self) -> None:
        """For a block of `exclusive()`, of whose session nothing is stored."""
        root = self.root()
        if root.cookie is _REMOVE:
            raise SessionClosed(
                "Nothing is stored of this session any more, since this request has ended it; "
                "there is nothing to lock."
            )
        if not root._stored and not root.cookie_can_be_sent:
            raise SessionClosed(
                "Nothing is stored of this session, so there is nothing to lock; and a new one "
                "cannot begin, since the headers that could carry its cookie have left. Store "
                "something before: ahead of the response's start or, at a WebSocket, in "
                "`session.exclusive()` ahead of accept."
            )

    def _end_beginning(self) -> None:
        """Let the next one find out whether this block has begun a session."""
        turns, self._turn_to_begin = self._turn_to_begin, None
        if turns is not None:
            turns.end_turn()

    def _be_known_as(self, known: tuple[bytes, Identity] | None) -> None:
        """Have another id from now on, here and in the request that this is a block of; or none."""
        for bearer in self._outward():
            bearer._id, bearer._identity = known or (None, None)
            bearer._stored = known is not None
            bearer.cookie = _REMOVE if known is None else _SET

    def _forget_id(self) -> None:
        self._identity = None
        self._id = None

    def _forget_new_id(self) -> None:
        """The same for an id that nothing is stored under, wherever this one's is known.

        A block that has begun a session meanwhile has given the request another one.
        """
        mine = self._id
        for bearer in self._outward():
            if bearer._id == mine and not bearer._stored:
                bearer._forget_id()

    def _take_over_the_requests_id(self) -> None:
        """For a block: others of this request may have changed it, or ended the session."""
        root = self.root()
        self._id, self._identity, self._stored = root._id, root._identity, root._stored

    # -- headers that wait --------------------------------------------------------------------

    def _hold_headers(self) -> asyncio.Future[None]:
        """Let the request's headers wait until what is returned is done: the id may change."""
        done = asyncio.get_running_loop().create_future()
        self.root()._wait_with_headers_for(done)
        return done

    def _wait_with_headers_for(self, done: asyncio.Future[Any]) -> None:
        self._headers_held_by |= {done}
        done.add_done_callback(self._wait_no_more_for)

    def _wait_no_more_for(self, done: asyncio.Future[Any]) -> None:
        self._headers_held_by -= {done}
