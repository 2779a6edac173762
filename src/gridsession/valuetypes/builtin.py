"""The types that every session holds, and how those that msgpack lacks become bytes.

Every codec here is exact: what comes back has the same type and the same value. Types that msgpack
has itself (None, bool, int of 64 bits, float, str, bytes, list, dict with str keys) need none.
Only exact types count: a subclass would come back as its base, so it is refused or registered.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from ormsgpack import Ext, Fragment, packb, unpackb

from gridsession.errors import SessionFormatError

# Part of the stored format for ever; gridsession.payload says what each one's data is.
TUPLE, SET, FROZENSET, DICT, INT, DATETIME, DATE, TIME, TIMEDELTA, UUID_, DECIMAL, REGISTERED = (
    range(1, 13)
)

CONTAINERS: Final = frozenset({list, dict, tuple, set, frozenset})
# ormsgpack takes these for what they are not: bin of unknown type, an ext or bytes of any kind.
DISGUISED: Final = frozenset({bytearray, memoryview, Ext, Fragment})

_IMMUTABLE: Final[frozenset[type]] = frozenset(
    {type(None), bool, int, float, str, bytes, datetime, date, time, timedelta, UUID, Decimal}
)
BUILT_IN: Final[frozenset[type]] = _IMMUTABLE | CONTAINERS


class RefusedError(Exception):
    """This value cannot be stored; the text says why and leaves the path to the walker."""


def is_immutable(value: object) -> bool:
    """True when `value` can never change, so that nobody need compare it with what was stored.

    A tuple may hold a list, a frozenset a registered object that changes: False for both.
    """
    return type(value) in _IMMUTABLE


# -- date and time ---------------------------------------------------------------------------------
# The fixed parts are the states that the datetime module pickles, big-endian, one field after the
# other; `replace` checks each field again, which the constructor from bytes does not.

_MICROSECOND: Final = timedelta(microseconds=1)
_TIMEDELTA: Final = struct.Struct(">iIi")  # days, seconds, microseconds

# Held for good: a ZoneInfo object that was dropped and loaded anew is another object, and
# datetime arithmetic asks for identity. The few hundred zones that exist all fit.
_zone = lru_cache(maxsize=1024)(ZoneInfo)


def _pack_zone(zone: tzinfo | None) -> bytes:
    if zone is None:
        return b""
    if zone is UTC:
        return b"\x00"
    if type(zone) is timezone:
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]
        microseconds = offset // _MICROSECOND
        try:
            return packb([microseconds, *name] if name else microseconds)
        except TypeError:
            raise RefusedError("the name of its timezone holds a lone surrogate") from None
    if type(zone) is ZoneInfo:
        try:
            _zone(zone.key)
        except Exception:
            raise RefusedError(
                "its ZoneInfo cannot be loaded by key (made by from_file?); use ZoneInfo(key)"
            ) from None
        return packb(zone.key)
    raise RefusedError(
        f"its tzinfo is of a class in {type(zone).__module__.split('.')[0]}; "
        "use zoneinfo.ZoneInfo or datetime.timezone"
    )


def _unpack_zone(data: bytes) -> tzinfo | None:
    if not data:
        return None
    if data == b"\x00":
        return UTC
    match unpackb(data):
        case int(microseconds):
            return timezone(microseconds * _MICROSECOND)
        case [int(microseconds), str(name)]:
            return timezone(microseconds * _MICROSECOND, name)
        case str(key):
            try:
                return _zone(key)
            except Exception:
                raise SessionFormatError(
                    "a stored value names a time zone that this machine does not know; "
                    "install the tzdata package"
                ) from None
    raise ValueError("it holds a time zone of unknown form")


_datetime: Final[Any] = (
    datetime  # their constructors from bytes are known to pickle, not to typeshed
)
_time: Final[Any] = time
_date: Final[Any] = date


def _encode_datetime(value: Any) -> Ext:
    return Ext(DATETIME, value.__reduce_ex__(4)[1][0] + _pack_zone(value.tzinfo))


def _decode_datetime(data: bytes) -> Any:
    return _datetime(data[:10], _unpack_zone(data[10:])).replace()


def _encode_time(value: Any) -> Ext:
    return Ext(TIME, value.__reduce_ex__(4)[1][0] + _pack_zone(value.tzinfo))


def _decode_time(data: bytes) -> Any:
    return _time(data[:6], _unpack_zone(data[6:])).replace()


def _encode_date(value: Any) -> Ext:
    return Ext(DATE, value.__reduce_ex__(4)[1][0])


def _decode_date(data: bytes) -> Any:
    return _date(data).replace()


def _encode_timedelta(value: timedelta) -> Ext:
    return Ext(TIMEDELTA, _TIMEDELTA.pack(value.days, value.seconds, value.microseconds))


# -- the other built-in types ----------------------------------------------------------------------


def _encode_int(value: int) -> Ext:
    return Ext(INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _encode_decimal(value: Decimal) -> Ext:
    # The "E" of a Decimal's text is "e" in a context with capitals=0; the stored one never is.
    return Ext(DECIMAL, str(value).replace("e", "E").encode())


def _decode_decimal(data: bytes) -> Decimal:
    made = Decimal(data.decode("ascii"))
    if made.is_nan() and b"NaN" not in data:  # a context that traps nothing makes NaN of rubbish
        raise ValueError("it holds a Decimal of unknown form")
    return made


ENCODERS: Final[dict[type, Callable[[Any], Ext]]] = {
    int: _encode_int,  # called for those outside 64 bits only
    datetime: _encode_datetime,
    date: _encode_date,
    time: _encode_time,
    timedelta: _encode_timedelta,
    UUID: lambda value: Ext(UUID_, value.int.to_bytes(16, "big")),
    Decimal: _encode_decimal,
}
DECODERS: Final[dict[int, Callable[[bytes], Any]]] = {
    INT: lambda data: int.from_bytes(data, "big", signed=True),
    DATETIME: _decode_datetime,
    DATE: _decode_date,
    TIME: _decode_time,
    TIMEDELTA: lambda data: timedelta(*_TIMEDELTA.unpack(data)),
    UUID_: lambda data: UUID(bytes=data),
    DECIMAL: _decode_decimal,
}
