"""What a request changed in its session, and what becomes of it where another has changed it, too.

Values are compared by their stored bytes, key by key. Nothing here waits or asks a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from gridsession import payload
from gridsession.undecoded import UNDECODED

OnConflict = Callable[[str, Any, Any, Any], Any]


class _Absent:
    """No value under this key, where None would be one."""

    def __repr__(self) -> str:
        return "<absent>"


ABSENT: Final[Any] = _Absent()
"""What `on_conflict` is given where a key is not there, and returns to remove it."""


class Delta(NamedTuple):
    """What a request changed: segments by key, and the keys that it removed."""

    set: dict[str, bytes]
    removed: list[str]
    changes: bool

    def __repr__(self) -> str:
        return f"<Delta: {len(self.set)} set, {len(self.removed)} removed>"


def find_delta(
    values: dict[str, Any], touched: Iterable[str], segments: Mapping[str, bytes]
) -> Delta:
    """What differs from what is stored. Decides by bytes: a value set to itself is none.

    Args:
        values: of the session.
        touched: keys whose value may differ.
        segments: as they are stored.

    Raises:
        SessionTypeError: a value cannot be stored.
    """
    changed: dict[str, bytes] = {}
    removed: list[str] = []
    for key in touched:
        value = dict.get(values, key, ABSENT)
        if value is not ABSENT:
            segment = payload.encode(key, value)
            if segments.get(key) != segment:
                changed[key] = segment
        elif key in segments:
            removed.append(key)
    return tuple.__new__(Delta, (changed, removed, bool(changed or removed)))


def rebase(
    values: dict[str, Any],
    touched: dict[str, None],
    base: Mapping[str, bytes],
    theirs: Mapping[str, bytes],
    on_conflict: OnConflict | None,
) -> int:
    """Put what a request changed upon what another has stored meanwhile.

    Keys that only one of the two changed have that one's value. Under a key that both changed the
    request's own value stays, or what `on_conflict` makes of the two: also where both made the same
    of it, for of two counts to 11 one would be lost. Values that the request had in hand and did
    not change are forgotten where they are not stored any more.

    Args:
        values, touched: of the session; changed.
        base: the segments that the request began with.
        theirs: those that are stored now.
        on_conflict: called with the key, the value that both began with, theirs and the request's
            own, each decoded for it alone or `ABSENT`; returns the value to be stored.

    Returns:
        how many keys both changed.

    Raises:
        SessionTypeError: a value cannot be stored.
        Exception: whatever `on_conflict` raises; nothing was changed.
    """
    mine = find_delta(values, touched, base)
    changed = mine.set.keys() | set(mine.removed)
    both = [key for key in touched if key in changed and theirs.get(key) != base.get(key)]
    resolved: dict[str, Any] = {}
    if on_conflict is not None:
        for key in both:
            versions = (base.get(key), theirs.get(key), mine.set.get(key))
            resolved[key] = on_conflict(key, *map(_value, versions))
    for key in [*dict.keys(values), *theirs]:
        if key not in changed and theirs.get(key) != base.get(key):
            touched.pop(key, None)
            if key in theirs:
                dict.__setitem__(values, key, UNDECODED)
            else:
                dict.pop(values, key, None)
    for key, value in resolved.items():
        if value is ABSENT:
            dict.pop(values, key, None)
        else:
            dict.__setitem__(values, key, value)
    return len(both)


def _value(segment: bytes | None) -> Any:
    return ABSENT if segment is None else payload.decode(segment)
