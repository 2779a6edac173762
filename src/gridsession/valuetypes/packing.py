"""How ormsgpack is used for values, and how deep they may nest."""

from __future__ import annotations

from typing import Final

import ormsgpack
from ormsgpack import Fragment, packb

from gridsession.valuetypes.builtin import DICT, FROZENSET, REGISTERED, SET, TUPLE

PACK_OPTIONS: Final = (
    ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_BIG_INT
    | ormsgpack.OPT_PASSTHROUGH_UUID
    | ormsgpack.OPT_PASSTHROUGH_ENUM
)

# How deep values may nest. A tuple, a set, a dict with other keys than str and a registered object
# are packed on their own and carried as an ext's data, so a value is a chain of *runs*, each one
# call of ormsgpack within the other. ormsgpack bounds one run (255 levels packing, 1022 unpacking)
# but not their sum, and its unpacking takes some 700 bytes of stack a level: 32 full runs, 33 KB
# of hostile bytes, killed the process. So the first two runs are left to ormsgpack, and whatever
# lies below, run 2 and all within it, may have DEEP_HEADERS msgpack headers (arrays, maps, exts)
# in one another. The slow walker counts alike, so both ways accept the same values.
MAX_NESTING: Final = 100  # levels of whatever kind that are always accepted; a registered one is 2
RUN_LEVELS: Final = 255
DEEP_HEADERS: Final = 2 * MAX_NESTING  # an ext and the array in it are one level
TOO_DEEP: Final = "it is nested too deeply"


def pack_set(members: list[bytes]) -> bytes:
    members.sort()
    return packb([Fragment(member) for member in members])


def too_deep(data: bytes) -> bool:
    """Whether more than DEEP_HEADERS headers are in one another, within exts as well."""
    if len(data) <= DEEP_HEADERS or len(data.translate(None, _NO_HEADERS)) <= DEEP_HEADERS:
        return False  # nearly always: too few bytes that could be headers
    regions = [(0, len(data), 0)]  # start, end, headers around: an ext's data is read once
    while regions:
        at, end, depth = regions.pop()
        waiting = [1]  # objects still to come, for each level
        while waiting and at < end:
            if not waiting[-1]:
                waiting.pop()
                continue
            waiting[-1] -= 1
            byte = data[at]
            at += 1
            if byte < 0x80 or byte >= 0xE0:
                continue
            if byte < 0xC0:
                width, count, role = 0, byte & 0x1F, "skip"
                if byte < 0xA0:
                    count, role = byte & 0x0F, "map" if byte < 0x90 else "array"
            else:
                width, fixed, role = _LAYOUT[byte - 0xC0]
                count = int.from_bytes(data[at : at + width], "big") + fixed
                at += width
            if role == "skip":
                at += count
                continue
            levels = depth + len(waiting)
            if role == "ext":
                if data[at : at + 1] not in _NESTING_TAGS:
                    at += count + 1
                    continue
                regions.append((at + 1, min(at + 1 + count, end), levels))
                at += count + 1
            else:
                waiting.append(2 * count if role == "map" else count)
            if levels > DEEP_HEADERS:
                return True
    return False


_NESTING_TAGS: Final = frozenset(map(int.to_bytes, (TUPLE, SET, FROZENSET, DICT, REGISTERED)))
_NO_HEADERS: Final = bytes(
    byte
    for byte in range(256)
    if not (
        0x80 <= byte < 0xA0 or 0xC7 <= byte < 0xCA or 0xD4 <= byte < 0xD9 or 0xDC <= byte < 0xE0
    )
)
# From 0xC0 on: width of the length, what to add to it, what the length counts.
_LAYOUT: Final[tuple[tuple[int, int, str], ...]] = (
    *[(0, 0, "skip")] * 4,  # nil, reserved, false, true
    *[(1, 0, "skip"), (2, 0, "skip"), (4, 0, "skip")],  # bin
    *[(1, 0, "ext"), (2, 0, "ext"), (4, 0, "ext")],
    *[(0, size, "skip") for size in (4, 8)],  # float
    *[(0, size, "skip") for size in (1, 2, 4, 8)] * 2,  # uint, int
    *[(0, size, "ext") for size in (1, 2, 4, 8, 16)],
    *[(1, 0, "skip"), (2, 0, "skip"), (4, 0, "skip")],  # str
    *[(2, 0, "array"), (4, 0, "array")],
    *[(2, 0, "map"), (4, 0, "map")],
)
