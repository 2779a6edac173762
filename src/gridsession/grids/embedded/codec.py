"""How records lie in the file: keys, and a record's fields as one msgpack array. Layout 1.

    "r" namespace[8] key[32] "h"     the record; a namespace is the first 8 bytes of its SHA-256
    "r" namespace[8] key[32] "p"     its payload, beside it in the tree
    "d" due[8] "r" namespace[8] key[32]  the index of deadlines: a big-endian double, so that
                                         the order of the bytes is the order of time

A record is an array of two: the number of its layout, and its fields. A newer layout is
`GridUnavailable`: a newer release wrote it, and this one must neither read it by guess nor take it
for missing.
"""

from __future__ import annotations

import struct
from dataclasses import fields
from hashlib import sha256
from operator import attrgetter

from ormsgpack import packb, unpackb

from gridsession.errors import GridUnavailable
from gridsession.grids.record import Record, ReplacedSecret, Ticket

LAYOUT = 1
RECORD, INDEX = b"r", b"d"  # what a key begins with
HEAD, PAYLOAD = b"h", b"p"  # what a record's keys end with
_DUE = struct.Struct(">d")
_DUE_AT = len(INDEX)


def prefix_of(namespace: str) -> bytes:
    """What the keys of one application's records begin with."""
    return RECORD + sha256(namespace.encode()).digest()[:8]


def index_key(due: float, key: bytes) -> bytes:
    return INDEX + _DUE.pack(due) + key


def parse_index_key(raw: bytes) -> tuple[float, bytes]:
    """When, and which record."""
    (due,) = _DUE.unpack_from(raw, _DUE_AT)
    return due, raw[_DUE_AT + _DUE.size :]


# In the order in which `Record` takes them.
_fields_of = attrgetter(*(field.name for field in fields(Record) if field.compare))


def pack(record: Record) -> bytes:
    return packb((LAYOUT, _fields_of(record)), _plain)


def _plain(value: tuple[object, ...]) -> tuple[object, ...]:
    """Of a named tuple. A ticket's last field only where it says something: workers of a release
    that does not know it may share the file.
    """
    return value[:-1] if type(value) is Ticket and not value.uncounted else tuple(value)


def unpack(raw: bytes) -> Record:
    """The record, as `pack` was given it.

    Raises:
        GridUnavailable: a newer release wrote it, or it is damaged.
    """
    try:
        layout, row = unpackb(raw)
        if layout == LAYOUT:
            record = Record(*row)
            if record.tickets:
                record.tickets = [Ticket(*ticket) for ticket in record.tickets]
            if record.replaced:
                record.replaced = [ReplacedSecret(*old) for old in record.replaced]
            return record
        if type(layout) is not int:
            raise ValueError
    except (ValueError, TypeError) as error:
        raise GridUnavailable(
            "a record in the embedded grid is damaged; it was left alone"
        ) from error
    raise GridUnavailable(
        f"a record in the embedded grid has layout {layout}, and this release reads {LAYOUT}: "
        "another release of gridsession wrote it; it was left alone"
    )
