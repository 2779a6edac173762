"""What a handler holds: a dict whose values are decoded when touched and compared at the end.

A `Session` is a real `dict`, since frameworks and templates expect one, with a placeholder in
each slot that nobody has asked for yet. Every Python-level way to a value decodes it first; C code
that looks into the slots itself (orjson, msgspec, pydantic) raises: hand it `dict(session)`.

Nothing here awaits: what has to (`save`, `release`, `exclusive`) is bound in by the provider.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from enum import Enum
from typing import Any, Protocol, Self, SupportsIndex

from gridsession import payload
from gridsession.access import Access
from gridsession.changes import Delta, OnConflict, find_delta, rebase
from gridsession.errors import SessionClosed, SessionReadOnly, SessionReplaced
from gridsession.settings import MAX_TIMEOUT, seconds
from gridsession.undecoded import UNDECODED

_MAX_USER = 255  # characters; it lies beside the lock, and is written with it


def _is_short_text(value: str) -> bool:
    return len(value) <= _MAX_USER and not any("\ud800" <= c <= "\udfff" for c in value)


class Phase(Enum):
    """What a session may be used for at a moment."""

    WRITABLE = "writable"
    READ_ONLY = "read_only"
    CLOSED = "closed"
    DISCARDED = "discarded"  # closed, and what was not committed is forgotten
    NOT_AVAILABLE = "not_available"


_WRITABLE = Phase.WRITABLE  # looked up at each write, and an Enum's members are slow to find


class Bound(Protocol):
    """What the provider lends to a session: everything that has to wait."""

    @property
    def session_id(self) -> str: ...
    @property
    def session_key(self) -> bytes: ...
    def check_id_may_change(self) -> None: ...
    async def save(self, session: Session) -> None: ...
    async def release(self, session: Session) -> None: ...
    def exclusive(self, session: Session) -> AbstractAsyncContextManager[Session]: ...


class Session(dict[str, Any]):
    """The session data of one browser, as one request sees it.

    A provider or a middleware makes it. A dict from `str` to values; nested changes are found by
    comparing at the end of the request. Names that begin with an underscore are the provider's.

    Attributes:
        accessed: something was read or written (Starlette's name).
        modified: something was assigned or removed (Starlette's name; not by nested changes).
        waited: seconds that this request waited for the session's lock.
        is_stale: the grid cannot be reached, and this is the last that this worker knows.
    """

    __slots__ = (
        "_abandoned", "_access", "_bound", "_is_new", "_phase", "_regenerate", "_replaced",
        "_segments", "_stored_timeout", "_stored_user", "_timeout", "_touched", "_user",
        "accessed", "is_stale", "modified", "waited",
    )  # fmt: skip

    accessed: bool
    modified: bool
    waited: float
    is_stale: bool
    _access: Access
    _bound: Bound
    _phase: Phase
    _segments: dict[str, bytes]
    _touched: dict[str, None]  # keys whose value may differ from what is stored, in order
    _user: str | None
    _stored_user: str | None
    _timeout: float
    _stored_timeout: float
    _is_new: bool
    _replaced: bool
    _regenerate: bool
    _abandoned: bool

    def __init__(  # noqa: PLR0917 - keywords take time, and the provider is who calls it
        self,
        bound: Bound,
        access: Access,
        phase: Phase,
        timeout: float,
        segments: dict[str, bytes] | None = None,
        user: str | None = None,
        replaced: bool = False,
    ) -> None:
        if segments:
            dict.update(self, dict.fromkeys(segments, UNDECODED))
        self._bound = bound
        self._access = access
        self._phase = phase
        self._segments = {} if segments is None else segments
        self._touched = {}
        self._user = self._stored_user = user
        self._timeout = self._stored_timeout = timeout
        self._is_new = segments is None
        self._replaced = replaced
        self.accessed = self.modified = self._regenerate = self._abandoned = self.is_stale = False
        self.waited = 0.0

    # -- members --------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """What the cookie carries: the key to this session. Keep it out of logs."""
        self._read()
        return self._bound.session_id

    @property
    def key(self) -> str:
        """What names this session in logs and tools, in hex. It gives no access."""
        self._read()
        return self._bound.session_key.hex()

    @property
    def is_new(self) -> bool:
        """Nothing is stored of this session yet."""
        return self._is_new

    @property
    def is_read_only(self) -> bool:
        """Assignment raises, at this moment."""
        return self._phase is not Phase.WRITABLE

    @property
    def access(self) -> Access:
        """How this request uses the session."""
        return self._access

    @property
    def timeout(self) -> float:
        """Seconds without a request after which this session expires. May be set."""
        self._read()
        return self._timeout

    @timeout.setter
    def timeout(self, value: float | timedelta) -> None:
        self._write()
        if not 0 < (number := seconds(value)) <= MAX_TIMEOUT:
            raise ValueError(f"timeout={value!r}: must be more than 0 and at most ten years")
        self._timeout = number

    @property
    def user(self) -> str | None:
        """Whose session this is, in the application's words. Another one gives a new id."""
        self._read()
        return self._user

    @user.setter
    def user(self, value: str | None) -> None:
        self._write()
        if type(value) not in (str, type(None)):
            raise TypeError(f"session.user must be a str or None, not {type(value).__name__}")
        if value is not None and not _is_short_text(value):
            raise ValueError(f"session.user must be valid text of at most {_MAX_USER} characters")
        if self._replaced and value != self._stored_user:
            raise SessionReplaced(
                "This request came with a session id that was replaced meanwhile; it cannot "
                "change the user, since it would not be answered with the new id."
            )
        if value != self._stored_user:
            self._bound.check_id_may_change()
        self._user = value

    def regenerate_id(self) -> None:
        """Give this session a new id at commit; the data stays. The old id works 10 s more."""
        self._write()
        self._bound.check_id_may_change()
        # A request with a replaced id gets no cookie; its session was rotated a moment ago.
        self._regenerate = not self._replaced

    def abandon(self) -> None:
        """End this session when the request ends: data, lock and cookie go."""
        self._write()
        self._abandoned = True

    async def save(self) -> None:
        """Commit the data now and keep the lock; a new user or id waits for the request's end.

        Raises:
            SessionLockLost, SessionGone, SessionTooLarge, SessionTypeError, GridUnavailable,
            GridFull: nothing was stored.
        """
        self._write()
        await self._bound.save(self)

    async def release(self) -> None:
        """Commit as `save`, and let the next request have the session; assignment then raises."""
        self._read()
        await self._bound.release(self)

    def exclusive(self) -> AbstractAsyncContextManager[Session]:
        """`async with session.exclusive() as s:` fresh values under the lock, for this block.

        Commits at the block's end; an exception that leaves the block discards. In a request that
        holds the lock already it is that lock: nothing is committed early, and what was done in
        the block is stored or discarded with the request. Where nothing is stored yet it begins a
        session, whose cookie leaves with the response's start or with a WebSocket's accept.
        Tasks of one request take turns; one that a block started is inside it, where again one
        takes its turn after the other, and so is the consumer of a generator that yields inside
        it: let none yield data there, and none wait there for another's turn.

        Raises:
            SessionLockTimeout, SessionQueueFull, SessionReplaced, SessionGone, GridUnavailable.
            SessionClosed: nothing is stored, and no session can begin any more.
        """
        self._read()
        return self._bound.exclusive(self)

    # -- reading --------------------------------------------------------------------------

    def _read(self) -> None:
        self.accessed = True

    mark_accessed = _read

    def _decode(self, key: str) -> Any:
        value = payload.decode(self._segments[key])
        super().__setitem__(key, value)
        if not payload.is_immutable(value):
            self._touched[key] = None
        return value

    def _decode_all(self) -> None:
        self._read()
        for key in [k for k, value in super().items() if value is UNDECODED]:
            self._decode(key)

    def __getitem__(self, key: str) -> Any:
        self.accessed = True
        value = dict.__getitem__(self, key)
        return self._decode(key) if value is UNDECODED else value

    def get(self, key: str, default: Any = None) -> Any:
        self.accessed = True
        value = dict.get(self, key, default)
        return self._decode(key) if value is UNDECODED else value

    def __contains__(self, key: object) -> bool:
        self.accessed = True
        return dict.__contains__(self, key)

    def __len__(self) -> int:
        self._read()
        return super().__len__()

    # Overridden, or dict(session) and {**session} would take the slots as they are.
    def __iter__(self) -> Iterator[str]:
        self._read()
        return super().__iter__()

    def __reversed__(self) -> Iterator[str]:
        self._read()
        return super().__reversed__()

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        self._read()
        return super().keys()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        self._decode_all()
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self._decode_all()
        return super().items()

    def copy(self) -> dict[str, Any]:
        """A plain dict with the values decoded."""
        return dict(self.items())

    def __eq__(self, other: object) -> bool:
        return self.copy() == (other.copy() if isinstance(other, Session) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # as every dict

    def __or__(self, other: Any) -> Any:
        return self.copy() | (other.copy() if isinstance(other, Session) else other)

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return dict, (self.copy(),)  # pickled and copied as the data it holds

    def __repr__(self) -> str:
        return f"<Session: {super().__len__()} keys, {self._access.value}, {self._phase.value}>"

    # -- writing --------------------------------------------------------------------------

    def _write(self) -> None:
        if self._phase is not _WRITABLE:
            self._read()
            raise SessionReadOnly if self._phase is Phase.READ_ONLY else SessionClosed
        self.accessed = True

    def mark_modified(self) -> None:
        """Starlette's; needless, since changes are found by comparing."""
        self._write()
        self.modified = True

    def __setitem__(self, key: str, value: Any) -> None:
        self._write()
        if type(key) is not str:
            if not isinstance(key, str):
                raise TypeError(f"keys of a session are str, not {type(key).__name__}")
            key = str.__str__(key)
        self.modified = True
        dict.__setitem__(self, key, value)
        self._touched[key] = None

    def __delitem__(self, key: str) -> None:
        self.mark_modified()
        super().__delitem__(key)
        self._touched[key] = None

    def pop(self, key: str, *default: Any) -> Any:
        self._write()
        if not super().__contains__(key):
            return super().pop(key, *default)
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[str, Any]:
        self._write()
        for key in super().__reversed__():
            return key, self.pop(key)
        raise KeyError("popitem(): session is empty")

    def setdefault(self, key: str, default: Any = None) -> Any:
        self._write()
        if not super().__contains__(key):
            self[key] = default
        return self[key]

    def update(self, /, *args: Any, **kwargs: Any) -> None:
        self._write()
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> Self:  # type: ignore[override]
        self.update(other)
        return self

    def clear(self) -> None:
        """Remove every value and the user; what is left empty is removed at commit."""
        self.mark_modified()
        self._user = None  # also where the setter would refuse: a logout needs no new id
        self._touched.update(dict.fromkeys(super().keys()))
        super().clear()

    # -- for the provider -----------------------------------------------------------------

    def _load(
        self,
        segments: dict[str, bytes],
        user: str | None,
        timeout: float,
        *,
        is_new: bool,
        replaced: bool,
    ) -> None:
        """Hold what a grid has stored, and forget what was changed and not committed."""
        dict.clear(self)
        dict.update(self, dict.fromkeys(segments, UNDECODED))
        self._segments = segments
        self._touched = {}
        self._user = self._stored_user = user
        self._timeout = self._stored_timeout = timeout
        self._is_new = is_new
        self._replaced = replaced
        self._regenerate = self._abandoned = False

    def _delta(self) -> Delta:
        """What differs from what is stored. Decides by bytes: a value set to itself is none.

        Raises:
            SessionTypeError: a value cannot be stored.
        """
        return find_delta(self, self._touched, self._segments)

    def _segments_with(self, delta: Delta) -> dict[str, bytes]:
        """All segments after a delta, in the order of the session's keys."""
        segments = {**self._segments, **delta.set}
        if [*segments] == [*dict.keys(self)]:  # as a rule: values changed, and no keys
            return segments
        return {key: segments[key] for key in dict.__iter__(self)}

    def _rebase(
        self,
        segments: dict[str, bytes],
        user: str | None,
        timeout: float,
        replaced: bool,
        *,
        on_conflict: OnConflict | None,
    ) -> int:
        """Put what this request changed upon what another has stored; as `changes.rebase`."""
        both = rebase(self, self._touched, self._segments, segments, on_conflict)
        if self._user == self._stored_user:
            self._user = user
        if self._timeout == self._stored_timeout:
            self._timeout = timeout
        self._replaced = replaced
        self._regenerate &= not replaced  # the browser has the new id already
        self._committed(segments, user, timeout)
        return both

    def _committed(self, segments: dict[str, bytes], user: str | None, timeout: float) -> None:
        """What the grid has stored is now this. Values in hand stay, and stay compared."""
        self._segments = segments
        self._stored_user = user
        self._stored_timeout = timeout
        self._is_new = False

    def _discard(self) -> None:
        """Hold what is stored, as far as this request knows, and nothing else; for good."""
        self._phase = Phase.DISCARDED
        kept = self._segments, self._stored_user, self._stored_timeout
        self._load(*kept, is_new=self._is_new, replaced=self._replaced)

    @property
    def _has_new_terms(self) -> bool:
        """Something other than the data changed, and is to be stored."""
        terms = (self._user, self._timeout)
        return self._regenerate or terms != (self._stored_user, self._stored_timeout)
