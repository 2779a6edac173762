"""The stored format: how a session becomes bytes, key by key, and nothing else.

Format version 1, for ever::

    byte 0   format version, 1
    byte 1   flags, 0 here; COMPRESSED and ENCRYPTED say that what follows is in an envelope,
             which `gridsession.envelope` describes; a reader refuses a flag that it does not know
    then     one msgpack map: key (str) to segment (bin), in the session's order

A *segment* is one value's own msgpack bytes, so that a session is taken apart and put together
without decoding a value. What msgpack lacks is an ext; "array" is a msgpack array:

    ====  ==========  ==================================================================
    tag   type        data
    ====  ==========  ==================================================================
    1     tuple       array
    2     set         array, members sorted by their bytes
    3     frozenset   array, members sorted by their bytes
    4     dict        array of key, value, key, value …: a dict with a key that is no str
    5     int         two's complement, big-endian, for what 64 bits cannot hold
    6     datetime    year (2 bytes), month (top bit: fold), day, hour, minute, second,
                      microsecond (3 bytes); then, if aware, the zone: a msgpack int
                      (microseconds east of UTC), array [int, name], or str (ZoneInfo key)
    7     date        year (2 bytes), month, day
    8     time        hour (top bit: fold), minute, second, microsecond (3); then as 6
    9     timedelta   days, seconds, microseconds: signed, unsigned, signed 32 bits
    10    UUID        its 16 bytes
    11    Decimal     its text, ASCII, exponent sign "E"
    12    registered  array [name, what the type's encode returned]
    ====  ==========  ==================================================================

Integers are big-endian. Equal values, built the same way, give equal bytes in every process. An
object that a value holds twice comes back as two. Values may nest MAX_NESTING levels deep.

No await, clock or randomness; the one thing read from outside is the time zone database.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from ormsgpack import Ext, packb, unpackb

from gridsession.errors import SessionFormatError, SessionTooLarge, SessionTypeError
from gridsession.valuetypes.builtin import (
    CONTAINERS,
    DECODERS,
    DICT,
    DISGUISED,
    ENCODERS,
    FROZENSET,
    REGISTERED,
    SET,
    TUPLE,
    is_immutable,
)
from gridsession.valuetypes.packing import (
    DEEP_HEADERS,
    MAX_NESTING,
    PACK_OPTIONS,
    TOO_DEEP,
    pack_set,
    too_deep,
)
from gridsession.valuetypes.refusals import encode_slowly, failure, shown
from gridsession.valuetypes.registry import BY_CLASS, BY_NAME, MAX_NAME_LENGTH, register_type

__all__ = ["MAX_NESTING", "decode", "encode", "is_immutable", "join", "register_type", "split"]

FORMAT_VERSION: Final = 1
COMPRESSED: Final = 0x01  # a flag: see gridsession.envelope
ENCRYPTED: Final = 0x02  # the same
HEADER: Final = bytes((FORMAT_VERSION, 0))
"""What a session's bytes begin with that is neither compressed nor encrypted."""

_JUST_BYTES: Final = {bytes}
# Bytes, payloads: 4 MiB at most. Their segments, which are kept, take up to 20 times as much.
_SMALL, _KEPT = 1536, 128
_SHORT_KEY = 64  # characters
_WHOLE_BELOW = 16 * 1024  # bytes; packb grows its buffer in steps: 60 µs for 100 KiB, parts 13

# ormsgpack drops what a hook or default raised; what must not be lost waits here until it returns.
_raised = threading.local()


def _take_raised() -> BaseException | None:
    error: BaseException | None = _raised.__dict__.pop("error", None)
    return error


# -- a session and its segments --------------------------------------------------------------------


def split(payload: bytes) -> dict[str, bytes]:
    """The segments of a stored session, by key and in its order; no value is decoded.

    The dict is shared with whoever asks for the same bytes again (a browser's next request, as a
    rule): do not change it.

    Raises SessionFormatError for bytes that do not begin with one payload of this format. What
    follows its end is not looked at: finding it would take half as long again as all the rest.
    """
    return _split_small(payload) if len(payload) <= _SMALL else _split(payload)


def _split(payload: bytes) -> dict[str, bytes]:
    if payload[:2] != HEADER:
        raise SessionFormatError(_header_trouble(payload))
    try:
        segments = unpackb(memoryview(payload)[2:])
    except ValueError as error:
        raise SessionFormatError(f"a stored session cannot be read: {_trouble(error)}") from None
    if type(segments) is not dict:
        raise SessionFormatError("a stored session cannot be read: it is not a map of segments")
    if segments and set(map(type, segments.values())) != _JUST_BYTES:
        raise SessionFormatError("a stored session cannot be read: a segment is not bin")
    return segments


_split_small = lru_cache(_KEPT)(_split)


def join(segments: Mapping[str, bytes], max_bytes: int) -> bytes:
    """The stored session of these segments: the inverse of `split`.

    Raises SessionTooLarge when it would take more than `max_bytes`, SessionTypeError for a key that
    is no str or no valid text.
    """
    content = sum(map(len, segments.values()))
    try:
        if content < _WHOLE_BELOW:
            payload = HEADER + packb(segments if type(segments) is dict else dict(segments))
            if len(payload) <= max_bytes:
                return payload
            size = len(payload)
        else:
            parts = _parts(segments)
            size = sum(map(len, parts))
            if size <= max_bytes:
                return b"".join(parts)
    except TypeError:
        raise SessionTypeError(_key_trouble(segments)) from None
    largest = sorted(segments.items(), key=lambda item: len(item[1]), reverse=True)[:3]
    sizes = ", ".join(f"{shown(key)} {len(segment):,}" for key, segment in largest)
    raise SessionTooLarge(
        f"the session takes {size:,} bytes, more than max_payload_bytes ({max_bytes:,}); "
        f"its largest keys, in bytes: {sizes}"
    )


def _entry_head(key: str, size: int) -> bytes:
    """What stands before a segment of this size."""
    if size < 0x100:
        return packb(key) + b"\xc4" + size.to_bytes(1, "big")
    if size < 0x10000:
        return packb(key) + b"\xc5" + size.to_bytes(2, "big")
    return packb(key) + b"\xc6" + size.to_bytes(4, "big")


_short_entry_head = lru_cache(1024)(_entry_head)  # of 50 keys a request changes one or two


def _parts(segments: Mapping[str, bytes]) -> list[bytes]:
    """The same bytes as packing the whole mapping, in pieces: for large sessions."""
    count = len(segments)
    if count < 0x10:
        start = bytes((0x80 | count,))
    elif count < 0x10000:
        start = b"\xde" + count.to_bytes(2, "big")
    else:
        start = b"\xdf" + count.to_bytes(4, "big")
    parts = [HEADER, start]
    for key, segment in segments.items():
        if type(key) is not str:
            raise TypeError
        head = _short_entry_head if len(key) <= _SHORT_KEY else _entry_head
        parts += (head(key, len(segment)), segment)
    return parts


def _key_trouble(segments: Mapping[str, bytes]) -> str:
    for key in segments:
        if type(key) is not str:
            return f"session keys are str, not {type(key).__qualname__}"
    return "a session key holds a lone surrogate (U+D800 to U+DFFF), which UTF-8 cannot express"


def _header_trouble(payload: bytes) -> str:
    if not payload:
        return "a stored session cannot be read: it is empty"
    if payload[0] != FORMAT_VERSION:
        return (
            f"a stored session has format version {payload[0]}; "
            f"this release of gridsession reads {FORMAT_VERSION}"
        )
    if len(payload) == 1:
        return "a stored session cannot be read: it is cut short"
    return f"a stored session has flags {payload[1]:#04x} that this release does not know"


def _trouble(error: BaseException) -> str:
    """In our words what is wrong with stored bytes: ormsgpack's text may quote them."""
    text = str(error)
    if "unexpected end" in text:
        return "it is cut short"
    if "ecursion" in text:
        return TOO_DEEP
    return "it is not msgpack of this format"


# -- one value -------------------------------------------------------------------------------------


def encode(key: str, value: object) -> bytes:
    """The segment of `value`; `key` is the session's key, for errors only.

    Raises SessionTypeError for a value that would not come back exactly, saying where in it and
    what to do. An object of ormsgpack's own (Ext, Fragment) is refused where it is noticed.
    """
    try:
        packed = packb(value, _default, PACK_OPTIONS)
    except TypeError:
        if (error := _take_raised()) is not None:
            raise error from None
    else:
        if not _may_hold_bin(packed) or not _holds_disguised(value):
            return packed
    return encode_slowly(key, value)


def decode(segment: bytes) -> Any:
    """The value of a segment. Raises SessionFormatError for what this process cannot read."""
    try:
        return unpackb(segment, ext_hook=_hook)
    except ValueError as caught:
        error = _take_raised() or caught
    if isinstance(error, SessionFormatError | MemoryError) or not isinstance(error, Exception):
        raise error
    raise SessionFormatError(f"a stored value cannot be read: {_trouble(error)}")


def _may_hold_bin(packed: bytes) -> bool:
    """A bytearray is packed as bin, which starts with one of these; few values hold any."""
    return 0xC4 in packed or 0xC5 in packed or 0xC6 in packed


def _holds_disguised(value: object) -> bool:
    """Whether something in `value`, which was packed, is not what ormsgpack took it for.

    What registered types returned was looked at when it was packed.
    """
    kind = type(value)
    if kind in DISGUISED:
        return True
    todo: list[Any] = [value] if kind in CONTAINERS else []
    while todo:
        container = todo.pop()
        members = container.values() if type(container) is dict else container
        kinds = set(map(type, members))
        if not kinds.isdisjoint(DISGUISED):
            return True
        if not kinds.isdisjoint(CONTAINERS):
            todo += [member for member in members if type(member) in CONTAINERS]
    return False


def _packer(run: int, inner: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    """ormsgpack's `default` for the objects in run number `run`; `inner` serves what they hold."""

    def default(value: Any) -> Ext:
        try:
            kind = type(value)
            if (leaf := ENCODERS.get(kind)) is not None:
                return leaf(value)
            if inner is None:
                raise TypeError(TOO_DEEP)
            if kind is tuple:
                tag, data = TUPLE, packb(list(value), inner, PACK_OPTIONS)
            elif kind is set or kind is frozenset:
                tag = SET if kind is set else FROZENSET
                data = pack_set([packb(member, inner, PACK_OPTIONS) for member in value])
            else:
                registration = BY_CLASS[kind]
                plain = registration.encode(value)
                tag, data = REGISTERED, packb([registration.name, plain], inner, PACK_OPTIONS)
                if _may_hold_bin(data) and _holds_disguised(plain):
                    raise TypeError
            if run == 1 and too_deep(data):
                raise TypeError(TOO_DEEP)
            return Ext(tag, data)
        except Exception:
            raise  # the slow walker finds it again and says where it is
        except BaseException as error:
            _raised.error = error
            raise

    return default


_default = _packer(DEEP_HEADERS // 2 + 2, None)
for _run in range(DEEP_HEADERS // 2 + 1, -1, -1):
    _default = _packer(_run, _default)


def _unpacker(run: int, inner: Callable[[int, bytes], Any] | None) -> Callable[[int, bytes], Any]:
    """ormsgpack's `ext_hook` for run number `run`; None: the runs below are as this one."""

    def hook(tag: int, data: bytes) -> Any:
        try:
            if (leaf := DECODERS.get(tag)) is not None:
                return leaf(data)
            if run == 1 and too_deep(data):
                raise SessionFormatError(f"a stored value cannot be read: {TOO_DEEP}")
            content = unpackb(data, ext_hook=inner or hook)
            if type(content) is not list:
                raise ValueError
            if tag == TUPLE:
                return tuple(content)
            if tag == SET:
                return set(content)
            if tag == FROZENSET:
                return frozenset(content)
            if tag == DICT:
                return dict(zip(content[::2], content[1::2], strict=True))
            if tag == REGISTERED:
                return _restored(*content)
            raise SessionFormatError(
                f"a stored value is of ext type {tag}, which this release does not know"
            )
        except BaseException as error:
            if getattr(_raised, "error", None) is None:  # the innermost one tells the cause
                _raised.error = error
            raise

    return hook


_hook = _unpacker(0, _unpacker(1, _unpacker(2, None)))


def _restored(name: str, stored: Any) -> Any:
    registration = BY_NAME.get(name)
    title = shown(name, MAX_NAME_LENGTH)
    if registration is None:
        raise SessionFormatError(
            f"a stored value is of type {title}, which is not registered in this process; "
            f"call gridsession.register_type(…, name={title}) before sessions are read"
        )
    try:
        value = registration.decode(stored)
    except Exception as error:
        reason = f"raised {failure(error)}"
    else:
        if type(value) is registration.cls:
            return value
        reason = f"returned an object of type {type(value).__qualname__}"
    raise SessionFormatError(f"decode of registered type {title} {reason}")
