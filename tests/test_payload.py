"""The stored format: exact, canonical, the same for ever, and safe to read from anywhere."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import io
import math
import os
import random
import struct
import subprocess
import sys
import threading
import traceback
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import ormsgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gridsession.errors import SessionFormatError, SessionTooLarge, SessionTypeError
from gridsession.payload import (
    MAX_NESTING,
    decode,
    encode,
    is_immutable,
    join,
    register_type,
    split,
)
from gridsession.valuetypes.builtin import DICT, REGISTERED, TUPLE
from gridsession.valuetypes.packing import DEEP_HEADERS, PACK_OPTIONS, too_deep
from gridsession.valuetypes.refusals import encode_slowly
from gridsession.valuetypes.registry import BY_CLASS, BY_NAME

DEEP = "it is nested too deeply"
SECRET = "hunter2-very-secret"  # stands for a session's value: no error may hold it
UTC = dt.UTC
NOON = dt.datetime(2025, 1, 2, 12, 30, 15, 123456)


class Point:
    """A type that an application registers: it may hold any session value."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y


class Tag:
    """A registered type that can be a key or a set's member."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tag) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


class Color(enum.Enum):
    RED = 1
    GREEN = 2


@dataclasses.dataclass
class Item:
    sku: str
    photo: Any = None


class Unknown:
    """Not registered."""

    def __repr__(self) -> str:
        return SECRET


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    before = dict(BY_CLASS), dict(BY_NAME)
    register_type(Point, name="test.point", encode=lambda p: [p.x, p.y], decode=_point)
    register_type(Tag, name="test.tag", encode=lambda t: t.text, decode=Tag)
    register_type(Color, name="test.color")
    register_type(Item, name="test.item")
    yield
    for registry, entries in zip((BY_CLASS, BY_NAME), before, strict=True):
        registry.clear()  # type: ignore[attr-defined]
        registry.update(entries)  # type: ignore[attr-defined]


def _point(stored: Any) -> Point:
    return Point(*stored)


# -- exact -----------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:  # noqa: PLR0911 - one line for each type
    """Equal in type and value, all the way down; where == is too kind, stricter."""
    if type(a) is not type(b):
        return False
    match a:
        case float():
            return math.copysign(1, a) == math.copysign(1, b) and (
                a == b or (math.isnan(a) and math.isnan(b))
            )
        case Decimal():
            return bool(a.as_tuple() == b.as_tuple())
        case dt.datetime():
            naive = a.replace(tzinfo=None) == b.replace(tzinfo=None)
            return naive and a.fold == b.fold and same_zone(a.tzinfo, b.tzinfo)
        case dt.time():
            naive = a.replace(tzinfo=None) == b.replace(tzinfo=None)
            return naive and a.fold == b.fold and same_zone(a.tzinfo, b.tzinfo)
        case list() | tuple():
            return len(a) == len(b) and all(map(same, a, b))
        case dict():
            return same(list(a.items()), list(b.items()))
        case set() | frozenset():
            return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)
        case Point():
            return same([a.x, a.y], [b.x, b.y])
        case Item():
            return same([a.sku, a.photo], [b.sku, b.photo])
    return bool(a == b)


def same_zone(a: dt.tzinfo | None, b: dt.tzinfo | None) -> bool:
    if isinstance(a, ZoneInfo):
        return a is b
    return type(a) is type(b) and repr(a) == repr(b)  # the repr has offset and name


offsets = st.timedeltas(dt.timedelta(hours=-23, minutes=-59), dt.timedelta(hours=23, minutes=59))
zones = st.one_of(
    st.none(),
    st.just(UTC),
    st.builds(dt.timezone, offsets),
    st.builds(dt.timezone, offsets, st.text(max_size=5)),
    st.sampled_from(["Europe/Berlin", "America/New_York", "UTC", "Asia/Kolkata"]).map(ZoneInfo),
)
folds = st.integers(0, 1)
datetimes = st.builds(lambda d, z, f: d.replace(tzinfo=z, fold=f), st.datetimes(), zones, folds)
times = st.builds(lambda t, z, f: t.replace(tzinfo=z, fold=f), st.times(), zones, folds)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 127, 128, 10**50]),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=40),
    datetimes,
    times,
    st.dates(),
    st.timedeltas(),
    st.uuids(),
    st.decimals(),
    st.sampled_from([Decimal(x) for x in ("-0", "1E+9", "0E-20", "NaN12", "-sNaN", "-Infinity")]),
    st.sampled_from(Color),
    st.builds(Tag, st.text(max_size=5)),
)
# A signalling NaN cannot be hashed, so it can be neither key nor member.
keys = st.recursive(
    scalars.filter(lambda value: not (isinstance(value, Decimal) and value.is_snan())),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=20),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=10), inner, max_size=5),
        st.dictionaries(keys, inner, max_size=4),
        st.sets(keys, max_size=20),
        st.frozensets(keys, max_size=4),
        st.builds(Point, inner, inner),
        st.builds(Item, st.text(max_size=3), inner),
    )


values = st.recursive(scalars, containers, max_leaves=25)


@given(values)
@example({1: "a", None: [b"\xc4"], (2, 3): {dt.date(2025, 1, 1): {4.0}}})
@example([dt.datetime(2025, 10, 26, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1)])
@example([1, True, 1.0, -0.0, math.nan, Decimal("sNaN7"), 10**5000])
@example({"b": 1, "a": 2})
@example(["x"] * 70_000)
def test_a_value_comes_back_with_its_type_and_value(value: Any) -> None:
    assert same(decode(encode("k", value)), value)


@given(values)
def test_both_ways_of_encoding_give_the_same_bytes(value: Any) -> None:
    assert encode_slowly("k", value) == encode("k", value)


@given(values)
def test_a_value_that_came_back_encodes_to_the_same_bytes(value: Any) -> None:
    segment = encode("k", value)
    assert encode("k", decode(segment)) == segment


@pytest.mark.parametrize(
    ("a", "b"), [(1, 1.0), (0, False), ("a", b"a"), ([1], (1,)), ({1}, frozenset({1})), (0.0, -0.0)]
)
def test_the_comparison_of_these_tests_tells_types_apart(a: Any, b: Any) -> None:
    assert a == b or a != b  # they may be equal for Python
    assert not same(a, b)
    assert not same(decode(encode("k", a)), b)


def test_a_zone_that_came_back_is_the_same_object_as_one_asked_for_by_key() -> None:
    # Arithmetic on two datetimes is by wall clock only if their zones are one object.
    stored = encode("k", NOON.replace(tzinfo=ZoneInfo("Europe/Berlin")))
    assert decode(stored).tzinfo is ZoneInfo("Europe/Berlin")


def test_decimals_do_not_depend_on_the_context() -> None:
    value = Decimal("1E+400")
    segment = encode("k", value)
    with decimal.localcontext() as context:
        context.capitals, context.prec, context.Emax = 0, 2, 5
        assert encode("k", value) == segment
        assert decode(segment).as_tuple() == value.as_tuple()


# -- canonical -------------------------------------------------------------------------------------

_CANONICAL = """
import sys
from gridsession.payload import encode, register_type
class Tag:
    def __init__(self, text): self.text = text
    def __eq__(self, other): return self.text == other.text
    def __hash__(self): return hash(self.text)
register_type(Tag, name="tag", encode=lambda t: {"text": t.text}, decode=lambda d: Tag(d["text"]))
words = [f"word-{i}" for i in range(50)]
print(encode("k", {
    "set": set(words),
    "frozen": frozenset(map(str.encode, words)),
    "nested": {frozenset(words[i : i + 5]) for i in range(40)},
    "tags": {Tag(word) for word in words},
    "dict": {(word, 1): {word} for word in words},
}).hex())
print(list(set(words)))
"""


def test_every_process_makes_the_same_bytes_whatever_its_hash_seed() -> None:
    runs = []
    for seed in ("0", "1", "2", "random"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")
        run = subprocess.run(
            [sys.executable, "-c", _CANONICAL],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        runs.append(run.stdout.splitlines())
    assert len({order for _, order in runs}) > 1  # else this test shows nothing
    assert len({segment for segment, _ in runs}) == 1


def test_the_order_of_a_dict_is_data_that_of_a_set_is_not() -> None:
    assert encode("k", {"a": 1, "b": 2}) != encode("k", {"b": 2, "a": 1})
    assert encode("k", {1: 1, 2: 2}) != encode("k", {2: 2, 1: 1})
    many = [*range(1000), *map(str, range(1000))]
    assert encode("k", set(many)) == encode("k", {*many[::-1]})


# -- the same for ever -----------------------------------------------------------------------------

# What is stored by one release must be read by all later ones. If a test of this section fails,
# the sessions of every user are about to become unreadable: a change of bytes needs a new format
# version, and a release that reads both. Lines may be added, never changed.
SNAPSHOT: list[tuple[Any, str]] = [
    (None, "c0"),
    (True, "c3"),
    (-7, "f9"),
    (2**64 - 1, "cfffffffffffffffff"),
    (2**64, "c70905010000000000000000"),
    (-(2**63) - 1, "c70905ff7fffffffffffffff"),
    (-0.0, "cb8000000000000000"),
    (math.nan, "cb7ff8000000000000"),
    ("€", "a3e282ac"),
    (b"\x00\xff", "c40200ff"),
    ([1, "a"], "9201a161"),
    ({"a": 1}, "81a16101"),
    ((), "d40190"),
    ((1, "a"), "d6019201a161"),
    ({"bb", "a", 3}, "c707029303a161a26262"),
    (frozenset({2, 1}), "c70303920102"),
    ({}, "80"),
    ({1: "a", None: 2}, "c706049401a161c002"),
    (NOON, "c70a0607e901020c1e0f01e240"),
    (NOON.replace(fold=1), "c70a0607e981020c1e0f01e240"),
    (NOON.replace(tzinfo=UTC), "c70b0607e901020c1e0f01e24000"),
    (
        NOON.replace(tzinfo=dt.timezone(dt.timedelta(hours=1))),
        "c70f0607e901020c1e0f01e240ced693a400",
    ),
    (
        NOON.replace(tzinfo=dt.timezone(dt.timedelta(0), "Z")),
        "c70e0607e901020c1e0f01e2409200a15a",
    ),
    (
        NOON.replace(tzinfo=ZoneInfo("Asia/Kolkata")),
        "c7170607e901020c1e0f01e240ac417369612f4b6f6c6b617461",
    ),
    (dt.date(2025, 1, 2), "d60707e90102"),
    (dt.time(12, 30, 15, 123456), "c706080c1e0f01e240"),
    (dt.time(12, 30, fold=1, tzinfo=UTC), "c707088c1e0000000000"),
    (dt.timedelta(days=-1, seconds=2, microseconds=3), "c70c09ffffffff0000000200000003"),
    (uuid.UUID(int=2**127 + 5), "d80a80000000000000000000000000000005"),
    (Decimal("-1.50E+7"), "d70b2d312e3530452b37"),
    (Decimal("sNaN1"), "c7050b734e614e31"),
    (Color.RED, "d80c92aa746573742e636f6c6f72a3524544"),
    (Tag("x"), "c70c0c92a8746573742e746167a178"),
    (Item("x", (1,)), "c71c0c92a9746573742e6974656d82a3736b75a178a570686f746fd5019101"),
]


@pytest.mark.parametrize(("value", "stored"), SNAPSHOT, ids=[row[1][:16] for row in SNAPSHOT])
def test_the_stored_format_never_changes(value: Any, stored: str) -> None:
    assert encode("k", value).hex() == stored
    assert same(decode(bytes.fromhex(stored)), value)


def test_the_stored_format_of_a_session_never_changes() -> None:
    stored = "010082a161c40101a2c3a4c403a26869"
    assert join({"a": b"\x01", "ä": b"\xa2hi"}, 100).hex() == stored
    assert split(bytes.fromhex(stored)) == {"a": b"\x01", "ä": b"\xa2hi"}
    assert join({}, 3).hex() == "010080"


# -- split and join --------------------------------------------------------------------------------

sizes = st.sampled_from([0, 1, 255, 256, 65535, 65536])
segments = st.dictionaries(
    st.text(max_size=40), st.binary(max_size=20) | sizes.map(bytes), max_size=20
)


@given(segments)
@example({str(n): b"x" for n in range(15)})
@example({str(n): bytes(2000) for n in range(16)})
@example({str(n): b"" for n in range(65_536)})
@example({str(n): b"1" for n in range(65_536)})
def test_split_undoes_join(segments: dict[str, bytes]) -> None:
    payload = join(segments, 10**9)
    assert list(split(payload).items()) == list(segments.items())
    # However large: the bytes that packing the map at once gives.
    assert payload == b"\x01\x00" + ormsgpack.packb(segments)


def test_join_takes_any_mapping_and_split_any_buffer() -> None:
    payload = join(collections.ChainMap({"a": b"\x01"}), 100)
    assert split(memoryview(payload)) == {"a": b"\x01"}  # type: ignore[arg-type]


@contextlib.contextmanager
def keeping_at_most(mib: int) -> Iterator[None]:
    """Of what is allocated within, no more is there at its end."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[0] < mib << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [700, 1500, 3000, 4090])
@pytest.mark.parametrize("segment", [b"", b"\xcd\x01"])
def test_what_split_keeps_is_as_small_as_it_says(segment: bytes, size: int) -> None:
    """Many short keys take most: a str of one letter takes 80 bytes, and 2 in the payload."""
    letters = [chr(0x80 + number) for number in range(size // (5 + len(segment)))]
    with keeping_at_most(4):
        for number in range(600):
            start = number % len(letters)
            split(join(dict.fromkeys(letters[start:] + letters[:start], segment), 1 << 20))


def test_split_finds_a_usual_session_again() -> None:
    payload = join({f"basket{n:02}": encode("x", ["B-0042/blue"] * 5) for n in range(15)}, 1 << 20)
    assert 1000 < len(payload) < 1500
    found = split(payload)
    for number in range(100):
        split(join({"another": encode("x", number)}, 1000))
    assert split(bytes(bytearray(payload))) is found


def test_join_keeps_no_long_keys() -> None:
    with keeping_at_most(1):
        for number in range(50):
            join({"x" * 100_000 + str(number): b"\x01", "v": bytes(17_000)}, 1 << 20)


@pytest.mark.parametrize("length", [10, 20_000])
def test_too_large_names_the_largest_keys(length: int) -> None:
    session = {
        "small": b"1",
        "cart": SECRET.encode() * length,
        "b" * 50: b"22" * length,
        "c": b"3" * length,
    }
    size = len(join(session, 10**9))
    assert len(join(session, size)) == size
    with pytest.raises(SessionTooLarge) as raised:
        join(session, size - 1)
    assert str(raised.value) == (
        f"the session takes {size:,} bytes, more than max_payload_bytes ({size - 1:,}); "
        f'its largest keys, in bytes: "cart" {19 * length:,}, "{"b" * 39}…" {2 * length:,}, '
        f'"c" {length:,}'
    )


@pytest.mark.parametrize("filler", [b"", bytes(20_000)])
def test_keys_that_cannot_be_stored_are_refused(filler: bytes) -> None:
    with pytest.raises(SessionTypeError, match="session keys are str, not int"):
        join({"a": filler, 5: b""}, 10**9)  # type: ignore[dict-item]
    with pytest.raises(SessionTypeError, match="a session key holds a lone surrogate"):
        join({"a": filler, "\ud800": b""}, 10**9)


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", "it is empty"),
        (b"\x01", "it is cut short"),
        (b"\x01\x00", "it is cut short"),
        (b"\x00\x00\x80", "has format version 0; this release of gridsession reads 1"),
        (b"\x02\x00\x80", "has format version 2; this release of gridsession reads 1"),
        (b"\x01\x04\x80", "has flags 0x04 that this release does not know"),
        (b"\x01\x00\x81\xa1a\xc4\x02x", "it is cut short"),
        (b"\x01\x00\x90", "it is not a map of segments"),
        (b"\x01\x00\xc0", "it is not a map of segments"),
        (b"\x01\x00\x82\xa1a\xc4\x00\xa1b\xa1x", "a segment is not bin"),
        (b"\x01\x00\x81\x01\xc4\x00", "it is not msgpack of this format"),
        (b"\x01\x00\x81\xa1a\xd4\x01\x00", "it is not msgpack of this format"),
        (b"\x01\x00\x81\xa1\xff\xc4\x00", "it is not msgpack of this format"),
        (b"\x01\x00" + b"\x91" * 5000 + b"\xc0", "it is nested too deeply"),
    ],
)
def test_split_says_what_is_wrong(payload: bytes, text: str) -> None:
    with pytest.raises(SessionFormatError) as raised:
        split(payload)
    assert str(raised.value).startswith("a stored session ")
    assert text in str(raised.value)


def test_a_type_that_this_process_lacks_spoils_its_own_segment_only() -> None:
    payload = join({"point": encode("point", Point(1, 2)), "name": encode("name", "Ada")}, 1000)
    del BY_NAME["test.point"]
    found = split(payload)
    assert decode(found["name"]) == "Ada"
    with pytest.raises(SessionFormatError) as raised:
        decode(found["point"])
    assert str(raised.value) == (
        'a stored value is of type "test.point", which is not registered in this process; call '
        'gridsession.register_type(…, name="test.point") before sessions are read'
    )
    assert join({**found, "name": encode("name", "Bob")}, 1000) == (
        join({"point": found["point"], "name": encode("name", "Bob")}, 1000)
    )


# -- what is refused -------------------------------------------------------------------------------


class Text(str):
    pass


class Mapping(dict[str, int]):
    pass


class When(dt.datetime):
    pass


class Level(enum.IntEnum):
    LOW = 1


class Rights(enum.Flag):
    READ = 1


class Zone(dt.tzinfo):
    def utcoffset(self, _: dt.datetime | None, /) -> dt.timedelta:
        return dt.timedelta(0)

    def dst(self, _: dt.datetime | None, /) -> dt.timedelta:
        return dt.timedelta(0)

    def tzname(self, _: dt.datetime | None, /) -> str:
        return SECRET


Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Order:
    note: str


def _zone_of_a_file() -> ZoneInfo:
    """UTC as a time zone file, under a key that no machine knows."""
    counts = struct.pack(">6I", 0, 0, 0, 0, 1, 4)  # one type, four characters
    data = b"TZif" + bytes(16) + counts + bytes(6) + b"UTC\0"
    return ZoneInfo.from_file(io.BytesIO(data), key="No/Such_Zone")


TYPES: list[tuple[Any, str]] = [
    (
        Unknown(),
        "Unknown is not a session type; register it with "
        "gridsession.register_type(Unknown, encode=…, decode=…)",
    ),
    (1j, "complex is not a session type; register it with gridsession.register_type(complex, "),
    (Level.LOW, "Level is not a session type; register it with gridsession.register_type(Level)"),
    (
        Rights.READ,
        "Rights is not a session type; register it with gridsession.register_type(Rights, "
        "encode=lambda flags: flags.value, decode=Rights)",
    ),
    (
        Order(SECRET),
        "Order is not a session type; register it with gridsession.register_type(Order)",
    ),
    (
        Pair(SECRET, 2),
        "Pair is a namedtuple, which is more than a tuple; use a tuple, or "
        "gridsession.register_type(Pair, encode=list, decode=Pair._make)",
    ),
    (
        Text(SECRET),
        "Text would come back as str; use str, or "
        "gridsession.register_type(Text, encode=…, decode=…)",
    ),
    (Mapping(a=1), "Mapping would come back as dict; use dict, or "),
    (collections.OrderedDict(a=1), "OrderedDict would come back as dict; use dict, or "),
    (collections.defaultdict(int), "defaultdict would come back as dict; use dict, or "),
    (When(2025, 1, 1), "When would come back as datetime; use datetime, or "),
    (bytearray(b"hunter2-very-secret"), "bytearray would come back as bytes; use bytes"),
    (memoryview(b"hunter2-very-secret"), "memoryview would come back as bytes; use bytes"),
    (
        NOON.replace(tzinfo=Zone()),
        "a datetime that cannot be stored: its tzinfo is of a class in ",
    ),
    (
        dt.time(1, tzinfo=Zone()),
        f"a time that cannot be stored: its tzinfo is of a class in {__name__.split('.')[0]}; "
        "use zoneinfo.ZoneInfo or datetime.timezone",
    ),
    (
        NOON.replace(tzinfo=dt.timezone(dt.timedelta(0), "\ud800")),
        "a datetime that cannot be stored: the name of its timezone holds a lone surrogate",
    ),
    (
        NOON.replace(tzinfo=_zone_of_a_file()),
        "a datetime that cannot be stored: its ZoneInfo cannot be loaded by key",
    ),
    (SECRET + "\ud800", "the text holds a lone surrogate (U+D800 to U+DFFF)"),
]


def refused(value: Any) -> str:
    """The text of the refusal of `value`, which holds nothing of the session's values."""
    with pytest.raises(SessionTypeError) as raised:
        encode("k", value)
    text = str(raised.value)
    assert SECRET not in text
    assert raised.value.__cause__ is None  # a chained error could hold one
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    return text


@pytest.mark.parametrize(("value", "text"), TYPES, ids=[type(row[0]).__name__ for row in TYPES])
def test_other_types_are_refused_with_advice(value: Any, text: str) -> None:
    assert refused(value).startswith(f'session["k"]: {text}')
    # Inside others too, beside bytes and beside what only the slow way packs.
    assert refused([SECRET, value]).startswith(f'session["k"][1]: {text}')
    assert refused([b"x", {"a": (0, value)}]).startswith(f'session["k"][1]["a"][1]: {text}')
    assert refused({1: SECRET, 2: value}).startswith(f'session["k"][<int key>]: {text}')
    assert refused(Item(SECRET, value)).startswith(f'session["k"].photo: {text}')
    assert refused(Point([SECRET], [value])).startswith(f'session["k"][1][0]: {text}')


def test_the_path_leads_to_the_offender() -> None:
    no = Unknown()
    advice = "Unknown is not a session type; register it with gridsession.register_type(Unknown"
    for value, path in [
        ({"cart": [1, 2, 3, Item("a", no)]}, '["cart"][3].photo'),
        ({"a": {("b", SECRET): no}}, '["a"][<tuple key>]'),
        ({"a": {("b", no): 1}}, '["a"][<tuple key>][1]'),
        ({1: {"s": no}}, '[<int key>]["s"]'),
        ({1: 0, "mixed": no}, '["mixed"]'),
        ({SECRET.encode(): {no}}, "[<bytes key>][<member>]"),
        (frozenset({(1, no)}), "[<member>][1]"),
        ({"k" * 50: no}, f'["{"k" * 39}…"]'),
        ({'say "hi"\n': no}, r'["say \"hi\"\n"]'),
        ({"größe": no}, '["größe"]'),
        (Item("a", {"deep": no}), '.photo["deep"]'),
        (Item("a", Item("b", no)), ".photo.photo"),
    ]:
        assert refused(value).startswith(f'session["k"]{path}: {advice}')
    with pytest.raises(SessionTypeError, match=r'^session\["a…?b+…"\]: '):
        encode("ab" + "b" * 100, no)
    with pytest.raises(SessionTypeError) as raised:
        encode("k", _nested(lambda inner: {"a" * 30: inner}, 60, no))
    assert len(str(raised.value)) < 600


def test_keys_must_be_session_values_themselves() -> None:
    assert refused({Text(SECRET): 1}).startswith(
        'session["k"][<Text key>]: Text would come back as str'
    )
    assert refused({Level.LOW: 1}).startswith('session["k"][<Level key>]: Level is not')
    assert refused({"\ud800": 1}).startswith(r'session["k"]["\ud800"]: the text holds a lone')
    assert refused({1: 0, "\ud800": 1}).startswith(r'session["k"]["\ud800"]: the text holds a')
    assert refused({memoryview(b"x"): 1}).startswith('session["k"][<memoryview key>]: memoryview')


def test_what_only_ormsgpack_can_carry_is_refused_where_it_is_noticed() -> None:
    ext, fragment = ormsgpack.Ext(1, b"\xc4"), ormsgpack.Fragment(b"\xc4\x00")
    assert "ormsgpack.Ext is not a session type" in refused(ext)
    assert "ormsgpack.Fragment is not a session type" in refused([fragment])
    assert "ormsgpack.Ext is not a session type" in refused({1: ormsgpack.Ext(1, b"")})


def test_text_with_the_bytes_that_start_a_bin_is_no_reason_to_refuse() -> None:
    for value in ["\u010d", ["\u010d", {"\u0119": {"\u010d"}}], [b"x", (b"y", {b"z"})]]:
        assert decode(encode("k", value)) == value


@pytest.mark.parametrize("value", [bytearray(b"x" * n) for n in (1, 300, 70_000)])
def test_a_bytearray_is_found_wherever_it_is(value: bytearray) -> None:
    for holder in ([[value]], {"a": {"b": value}}, ((value,),), Point(1, value), [Point(1, value)]):
        assert "bytearray would come back as bytes" in refused(holder)


# -- depth -----------------------------------------------------------------------------------------


def _nested(wrap: Callable[[Any], Any], levels: int, inner: Any = 7) -> Any:
    for _ in range(levels):
        inner = wrap(inner)
    return inner


WRAPS: dict[str, Callable[[Any], Any]] = {
    "list": lambda v: [v],
    "dict": lambda v: {"a": v},
    "tuple": lambda v: (v,),
    "frozenset": lambda v: frozenset({v}),
    "int keys": lambda v: {1: v},
    "dict, int keys": lambda v: {"a": {1: v}},
    "registered": lambda v: Item("x", v),
    "registered, list": lambda v: Point([v], None),
}


# How often each can be wrapped at least, where that is more than one level.
PROMISED = {
    "dict, int keys": MAX_NESTING // 2,
    "registered": MAX_NESTING // 2,
    "registered, list": MAX_NESTING // 3,
}


@pytest.mark.parametrize("kind", WRAPS)
def test_whatever_depth_encode_accepts_decode_reads(kind: str) -> None:
    accepted, refused_at, texts = [], [], set()
    for levels in [*range(20), *range(45, 55), *range(95, 105), *range(250, 260), 1023, 3000]:
        value = _nested(WRAPS[kind], levels)
        try:
            segment = encode("k", value)
        except SessionTypeError as error:
            texts.add(str(error).partition(": ")[2])
            refused_at.append(levels)
        else:
            accepted.append(levels)
            assert encode("k", decode(segment)) == segment
            assert encode_slowly("k", value) == segment
    # What the docstrings promise; and no depth above the limit is let through again.
    assert max(accepted) >= PROMISED.get(kind, MAX_NESTING)
    assert max(accepted) < min(refused_at)
    assert texts == {DEEP}


@given(st.lists(st.sampled_from(["list", "dict", "tuple", "int keys"]), max_size=MAX_NESTING))
@example(["tuple"] * MAX_NESTING)
@example(["int keys"] * MAX_NESTING)
@example(["list"] * MAX_NESTING)
@example(["registered"] * (MAX_NESTING // 2))
def test_nesting_up_to_the_limit_is_always_accepted(kinds: list[str]) -> None:
    value: Any = 7
    for kind in kinds:
        value = WRAPS[kind](value)
    assert encode("k", decode(encode("k", value))) == encode("k", value)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["list", "dict", "tuple", "int keys", "registered"]),
            st.integers(1, 130),
        ),
        max_size=6,
    )
)
@example([("list", 254), ("tuple", 1), ("list", 254), ("tuple", 1), ("list", 199)])
@example([("list", 199), ("tuple", 1), ("list", 254), ("tuple", 1), ("list", 254)])
@example([("list", 200), ("tuple", 1), ("list", 254), ("tuple", 1), ("list", 254)])
@example([("list", 254), ("tuple", 1), ("list", 255)])
@example([("list", 255), ("tuple", 1), ("list", 255)])
def test_both_ways_of_encoding_accept_the_same_depth(levels: list[tuple[str, int]]) -> None:
    value: Any = 7
    for kind, times in levels:
        value = _nested(WRAPS[kind], times, value)
    results: list[bytes | str] = []
    for way in (encode, encode_slowly):
        try:
            results.append(way("k", value))
        except SessionTypeError as error:
            results.append(str(error).partition(": ")[2])
    assert results[0] == results[1]
    assert results[0] == DEEP or isinstance(results[0], bytes)
    if isinstance(results[0], bytes):
        assert encode("k", decode(results[0])) == results[0]


def test_a_value_that_contains_itself_is_refused() -> None:
    a: list[Any] = [1]
    a.append({"back": a})
    assert refused(a) == 'session["k"][1]["back"]: the list contains itself'
    b: dict[Any, Any] = {}
    b[1] = (b,)
    assert refused(b) == 'session["k"][<int key>][0]: the dict contains itself'
    c: list[Any] = []
    c.append((c, c))
    assert refused(c) == 'session["k"][0][0]: the list contains itself'
    d = Item("d")
    d.photo = [d]
    assert refused(d) == 'session["k"].photo[0]: the Item contains itself'
    twice = [1]
    assert decode(encode("k", {1: [twice, twice]})) == {1: [[1], [1]]}


def test_a_nearly_full_stack_refuses_and_never_crashes() -> None:
    outcomes: set[Any] = set()

    def descend(value: Any, left: int) -> None:
        if left:
            descend(value, left - 1)
            return
        try:
            outcomes.add(type(decode(encode("k", value))))
        except (SessionTypeError, SessionFormatError) as error:
            outcomes.add(str(error))

    used = len(list(traceback.walk_stack(None)))
    for value in (_nested(WRAPS["tuple"], 90), _nested(WRAPS["int keys"], 90)):
        descend(value, sys.getrecursionlimit() - used - 60)
    assert outcomes == {f'session["k"]: {DEEP}'}


@given(values)
def test_the_depth_check_counts_headers(value: Any) -> None:
    segment = encode("k", value)
    wide = {str(n): n for n in range(20)}
    noise = [bytes(range(128, 160)) * 10, wide, "ä" * 200, 1.5, 2**40, -5, [0] * 20, None]
    spare = ormsgpack.packb(noise)[:-1] + segment
    assert not too_deep(spare)  # many bytes that look like headers, few that are
    levels = max(1, _headers(segment))  # `wide` is one
    for missing, deep in ((DEEP_HEADERS - levels, False), (DEEP_HEADERS - levels + 1, True)):
        assert too_deep(b"\x91" * (missing - 1) + spare) is deep


def _headers(packed: bytes) -> int:
    """How deep headers are in one another, found by decoding: the check's plain twin."""

    def hook(tag: int, data: bytes) -> Any:
        return _Level(1 + _headers(data) if tag in {1, 2, 3, 4, 12} else 0)

    def depth(value: Any) -> int:
        if isinstance(value, _Level):
            return value.levels
        if isinstance(value, dict):
            return 1 + max(map(depth, value.values()), default=0)
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    return depth(ormsgpack.unpackb(packed, ext_hook=hook))


@dataclasses.dataclass
class _Level:
    levels: int


# -- reading what anybody may have written ---------------------------------------------------------


def ext(tag: int, data: bytes) -> bytes:
    return ormsgpack.packb(ormsgpack.Ext(tag, data))


def unreadable(segment: bytes) -> str:
    with pytest.raises(SessionFormatError) as raised:
        decode(segment)
    assert SECRET not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("segment", "text"),
    [
        (b"", "it is cut short"),
        (b"\xc1", "it is not msgpack of this format"),
        (b"\x92\x01", "it is cut short"),
        (b"\xa1\xff", "it is not msgpack of this format"),
        (b"\x81\x01\x02", "it is not msgpack of this format"),  # a key that is no str
        (b"\xdd\xff\xff\xff\xff", "it is cut short"),
        (ext(0, b"\x90"), "ext type 0, which this release does not know"),
        (ext(13, b"\x90"), "ext type 13, which this release does not know"),
        (b"\xd6\xff\x00\x00\x00\x00", "is not msgpack of this format"),  # msgpack's timestamp
        (ext(1, b"\xa3abc"), "it is not msgpack of this format"),  # tuple("abc") would be wrong
        (ext(1, b"\x81\xa1a\x01"), "it is not msgpack of this format"),
        (ext(1, b""), "it is cut short"),
        (ext(2, b"\x91\x90"), "it is not msgpack of this format"),  # a list in a set
        (ext(4, b"\x91\x01"), "it is not msgpack of this format"),
        (ext(4, b"\x92\x90\x01"), "it is not msgpack of this format"),
        (ext(6, bytes.fromhex("07e901020c1e0f01e2")), "it is not msgpack of this format"),
        (ext(6, bytes.fromhex("07e90d020c1e0f01e240")), "it is not msgpack of this format"),
        (ext(6, bytes.fromhex("07e9021e0c1e0f01e240")), "it is not msgpack of this format"),
        (ext(6, bytes.fromhex("07e90102181e0f01e240")), "it is not msgpack of this format"),
        (ext(6, bytes.fromhex("07e901020c1e0fffffff")), "it is not msgpack of this format"),
        (ext(6, bytes.fromhex("000001020c1e0f01e240")), "it is not msgpack of this format"),
        (ext(6, bytes.fromhex("07e901020c1e0f01e240cf00ffffffffffffff")), "it is not msgpack"),
        (ext(6, bytes.fromhex("07e901020c1e0f01e240c0")), "it is not msgpack of this format"),
        (ext(6, bytes.fromhex("07e901020c1e0f01e240") + b"\xaa../secrets"), "a time zone that"),
        (ext(6, bytes.fromhex("07e901020c1e0f01e240") + b"\xa7America"), "a time zone that"),
        (ext(6, bytes.fromhex("07e901020c1e0f01e240") + b"\xb3" + SECRET.encode()), "install the"),
        (ext(7, bytes.fromhex("07e9021e")), "it is not msgpack of this format"),
        (ext(7, b"2025-01-01"), "it is not msgpack of this format"),
        (ext(8, bytes.fromhex("180000000000")), "it is not msgpack of this format"),
        (ext(8, bytes.fromhex("0c3c00000000")), "it is not msgpack of this format"),
        (ext(9, b"1234"), "it is not msgpack of this format"),
        (ext(9, bytes.fromhex("7fffffff0000000000000000")), "it is not msgpack of this format"),
        (ext(10, b"123"), "it is not msgpack of this format"),
        (ext(11, SECRET.encode()), "it is not msgpack of this format"),
        (ext(11, b"\xff"), "it is not msgpack of this format"),
        (ext(12, b"\x91\x01"), "it is not msgpack of this format"),
        (ext(12, b"\x92\x90\x01"), "it is not msgpack of this format"),
        (ext(12, b"\x92\x05\x01"), "is not registered in this process"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(segment: bytes, text: str) -> None:
    assert text in unreadable(segment)
    assert text in unreadable(b"\x91" + segment) or not segment
    assert text in unreadable(ext(TUPLE, b"\x91" + segment)) or not segment


def test_rubbish_is_no_decimal_even_where_nothing_is_trapped() -> None:
    with decimal.localcontext() as context:
        context.clear_traps()
        assert unreadable(ext(11, b"rubbish"))
        assert decode(ext(11, b"NaN")).is_nan()


@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (split, decode):
        for given_bytes in (data, b"\x01\x00" + data, b"\xc7" + data):
            with contextlib.suppress(SessionFormatError):
                read(given_bytes)


@given(values, st.randoms(use_true_random=False))
def test_damaged_values_are_read_or_refused(value: Any, chance: random.Random) -> None:
    segment = encode("k", value)
    for _ in range(10):
        damaged = bytearray(segment)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(damaged) + 1)
            match chance.randrange(3):
                case 0:
                    damaged[at : at + 1] = bytes([chance.randrange(256)])
                case 1:
                    del damaged[at : at + chance.randint(1, 5)]
                case _:
                    damaged[at:at] = chance.randbytes(chance.randint(1, 5))
        with contextlib.suppress(SessionFormatError):
            decode(bytes(damaged))


@given(segments, st.data())
def test_a_payload_cut_short_is_refused(segments: dict[str, bytes], data: st.DataObject) -> None:
    payload = join(segments, 10**9)
    with pytest.raises(SessionFormatError):
        split(payload[: data.draw(st.integers(0, len(payload) - 1))])


@given(segments, st.binary(max_size=5))
def test_what_follows_a_payload_changes_nothing(segments: dict[str, bytes], junk: bytes) -> None:
    assert split(join(segments, 10**9) + junk) == segments


@pytest.mark.parametrize(
    ("runs", "levels", "deep"),
    [
        (1, 1021, False),
        (2, 198, False),
        (2, 1000, True),
        (40, 1000, True),
        (100, 0, False),
        (300, 0, True),
        (3000, 0, True),
    ],
)
def test_hostile_nesting_neither_crashes_nor_recurses_without_end(
    runs: int, levels: int, deep: bool
) -> None:
    # Without a check of its own, 32 exts of 1,000 lists in one another overflow the C stack.
    segment = b"\xc0"
    for _ in range(runs):
        segment = ext(TUPLE, b"\x91" * (levels + 1) + segment)
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(type(decode(segment)))
        except SessionFormatError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert outcome == [f"a stored value cannot be read: {DEEP}" if deep else tuple]


def test_the_depth_check_reads_hostile_bytes_once() -> None:
    # Each ext says that it holds four thousand million objects; read on past its end, the check
    # would take hours for these 600 KB.
    part = ext(TUPLE, b"\xdd\xff\xff\xff\xff")
    parts = b"\xdd" + (75_000).to_bytes(4, "big") + part * 75_000
    assert unreadable(ext(TUPLE, b"\x91" + ext(TUPLE, parts))).endswith("it is cut short")


def test_exts_that_hold_nothing_but_exts_are_bounded_too() -> None:
    segment = b"\x90"
    for _ in range(500):
        segment = ext(TUPLE, segment)
    assert DEEP in unreadable(segment)


# -- registered types ------------------------------------------------------------------------------


def _codec(**changed: Any) -> dict[str, Any]:
    return {"encode": lambda value: None, "decode": lambda stored: None, **changed}


def test_registering_returns_the_class_and_serves_as_decorator() -> None:
    @dataclasses.dataclass
    class Basket:
        rows: list[Any]

    assert register_type(Basket, name="basket") is Basket
    back = decode(encode("k", Basket([Item("a"), Color.GREEN])))
    assert type(back) is Basket
    assert back == Basket([Item("a"), Color.GREEN])


def test_the_default_name_is_the_qualified_name_without_the_module() -> None:
    register_type(Order)
    assert b"\xa5Order" in encode("k", Order("x"))
    assert decode(encode("k", Order("x"))) == Order("x")

    class Local:
        pass

    with pytest.raises(ValueError, match=r"Local is local to a function: give it a name"):
        register_type(Local, **_codec())


@pytest.mark.parametrize(
    "cls",
    [
        *[type(None), bool, int, float, str, bytes, list, tuple, dict, set, frozenset],
        *[dt.datetime, dt.date, dt.time, dt.timedelta, uuid.UUID, Decimal],
    ],
)
def test_types_that_sessions_hold_cannot_be_registered(cls: type) -> None:
    with pytest.raises(TypeError, match="cannot be registered: sessions hold it already"):
        register_type(cls, name="mine", **_codec())


def test_other_things_that_cannot_be_registered() -> None:
    for cls in (bytearray, memoryview):
        with pytest.raises(TypeError, match="cannot be registered: use bytes"):
            register_type(cls, **_codec())
    with pytest.raises(TypeError, match="takes a class, not an object of type Point"):
        register_type(Point(1, 2))  # type: ignore[arg-type]
    codecs: list[dict[str, Any]] = [{}, {"encode": lambda v: 1}, {"decode": lambda v: 1}]
    for codec in codecs:
        with pytest.raises(TypeError, match=r"register_type\(Unknown, …\) needs encode= and dec"):
            register_type(Unknown, **codec)
    with pytest.raises(TypeError, match="Rights is a Flag, whose combinations have no name"):
        register_type(Rights)
    for name in ("", "a\nb", "x" * 101, 5):
        with pytest.raises(ValueError, match="1 to 100 printable characters"):
            register_type(Order, name=name)  # type: ignore[arg-type]
    assert Order not in BY_CLASS


def test_dataclasses_that_are_more_than_their_fields_need_a_codec() -> None:
    @dataclasses.dataclass
    class Late:
        a: int
        b: int = dataclasses.field(init=False, default=0)

    @dataclasses.dataclass
    class Started:
        a: int
        seed: dataclasses.InitVar[int]

    @dataclasses.dataclass(init=False)
    class Own:
        a: int

    @dataclasses.dataclass
    class Rows(list[int]):
        title: str = ""

    class Inherits(Order):
        pass

    for cls, text in [
        (Late, r"has fields with init=False \(b\)"),
        (Started, "cannot be made of its fields alone"),
        (Own, "cannot be made of its fields alone"),
        (Rows, "is more than its fields"),
        (Inherits, "needs encode= and decode="),
    ]:
        with pytest.raises(TypeError, match=text):
            register_type(cls, name="x")
    register_type(Late, name="late", encode=lambda late: late.a, decode=Late)
    assert decode(encode("k", Late(3))) == Late(3)


def test_a_name_belongs_to_one_class_and_a_class_has_one_name() -> None:
    with pytest.raises(ValueError, match=r"the name 'test.item' is taken by \S+\.Item: give"):
        register_type(Order, name="test.item")
    with pytest.raises(ValueError, match=r"Item is registered already, as 'test.item'"):
        register_type(Item, name="other")
    assert "other" not in BY_NAME
    assert BY_NAME["test.item"].cls is Item


def test_a_module_that_is_loaded_again_registers_its_classes_again() -> None:
    def load() -> Any:
        cls = dataclasses.make_dataclass("Reloaded", ["a"])
        cls.__module__ = "app"
        return register_type(cls, name="reloaded")

    old = load()
    segment = encode("k", old(1))
    new = load()
    assert new is not old
    assert type(decode(segment)) is new
    assert encode("k", new(1)) == segment
    assert encode("k", old(1)) == segment  # objects made before are still in use
    register_type(new, name="reloaded", encode=lambda v: [v.a], decode=lambda stored: new(*stored))
    assert decode(encode("k", new(2))) == new(2)


def test_a_subclass_of_a_registered_type_is_not_taken_for_it() -> None:
    class Special(Point):
        pass

    assert "Special is not a session type" in refused([Special(SECRET, 1)])


def test_members_of_an_enum_are_stored_by_name() -> None:
    register_type(Level, name="level")
    assert decode(encode("k", {Level.LOW: [Level.LOW]})) == {Level.LOW: [Level.LOW]}
    assert type(next(iter(decode(encode("k", {Level.LOW: 1}))))) is Level
    gone = encode("k", Color.RED).replace(b"RED", b"BLU")
    assert unreadable(gone).startswith('decode of registered type "test.color" raised KeyError')


def test_a_codec_that_fails_is_named_and_its_words_are_not_repeated() -> None:
    def fail(_: Any) -> Any:
        raise LookupError(SECRET)

    register_type(Unknown, name="bad", encode=fail, decode=fail)
    line = fail.__code__.co_firstlineno + 1
    where = f"raised LookupError at test_payload.py:{line}"
    assert refused([Unknown()]) == f'session["k"][0]: encode of registered type "bad" {where}'
    assert unreadable(ext(REGISTERED, b"\x92\xa3bad\xc0")) == (
        f'decode of registered type "bad" {where}'
    )
    register_type(Unknown, name="bad", encode=lambda u: None, decode=lambda stored: None)  # type: ignore[arg-type,return-value]
    assert unreadable(encode("k", Unknown())) == (
        'decode of registered type "bad" returned an object of type NoneType'
    )


def test_an_encode_that_returns_its_own_object_ends() -> None:
    register_type(Unknown, name="loop", encode=lambda u: u, decode=lambda stored: Unknown())
    assert refused(Unknown()) == 'session["k"]: the Unknown contains itself'
    register_type(Unknown, name="loop", encode=lambda u: Unknown(), decode=lambda s: Unknown())
    assert refused(Unknown()).endswith("it is nested too deeply")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_codec_is_not_swallowed(error: type[BaseException]) -> None:
    # ormsgpack turns whatever its callbacks raise into an error of its own.
    calls = []

    def interrupted(value: Any) -> Any:
        calls.append(value)
        raise error

    register_type(Unknown, name="slow", encode=interrupted, decode=interrupted)
    with pytest.raises(error):
        encode("k", [(Unknown(),)])
    with pytest.raises(error):
        decode(ext(TUPLE, b"\x91" + ext(REGISTERED, b"\x92\xa4slow\xc0")))
    assert len(calls) == 2  # nothing was tried again
    assert decode(encode("k", 1)) == 1  # and nothing is left over
    assert unreadable(b"") == "a stored value cannot be read: it is cut short"


def test_a_codec_may_itself_encode_and_decode() -> None:
    def inner(stored: bytes) -> Point:
        with pytest.raises(SessionFormatError):
            decode(b"\xc1")
        return Point(decode(stored), 2)

    register_type(Unknown, name="outer", encode=lambda u: 1, decode=lambda stored: Unknown())
    register_type(Point, name="test.point", encode=lambda p: encode("x", p.x), decode=inner)
    assert decode(encode("k", [Point("a", 2)]))[0].x == "a"


# -- values that cannot change ---------------------------------------------------------------------


def test_immutable_is_by_exact_type() -> None:
    fixed: list[Any] = [None, True, 1, 1.5, "a", b"a", NOON, NOON.date(), NOON.time()]
    for value in [*fixed, dt.timedelta(1), Decimal(1), uuid.uuid4()]:
        assert is_immutable(value)
    for value in [[], {}, set(), (), frozenset(), bytearray(), Text("a"), Color.RED, Item("a")]:
        assert not is_immutable(value)


def test_options_pass_every_type_that_is_not_msgpacks_own() -> None:
    # Without one of them ormsgpack would pack these natively, as something else.
    seen = []
    for value in [(), NOON, Order("x"), Text("x"), 2**64, uuid.UUID(int=1), Color.RED, Level.LOW]:
        ormsgpack.packb(value, lambda v: seen.append(type(v)), PACK_OPTIONS)
    assert seen == [tuple, dt.datetime, Order, Text, int, uuid.UUID, Color, Level]
    assert DICT == 4
