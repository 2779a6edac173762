"""A session is a dict to whoever reads it, and only what changed is ever written."""

from __future__ import annotations

import copy
import enum
import json
import pickle  # noqa: TID251 - that a session pickles as its data; no bytes of a grid are unpickled
import pprint
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from typing import Any

import jinja2
import msgspec
import orjson
import ormsgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from gridsession import (
    Access,
    Session,
    SessionClosed,
    SessionNotAvailable,
    SessionReadOnly,
    SessionReplaced,
    SessionTypeError,
    payload,
)
from gridsession.provider.no_session import NoSession
from gridsession.session import Phase

DATA: dict[str, Any] = {
    "cart": [{"sku": "tea", "count": 2}],
    "name": "Ann",
    "seen": 3,
    "when": datetime(2026, 1, 2, tzinfo=UTC),
    "blob": b"\x00marker\xff",
}
JSON: dict[str, Any] = {"cart": [{"sku": "tea", "count": 2}], "name": "Ann", "seen": 3, "no": None}
SECRET = "s3cr3t-session-id"


class Lender:
    """What a provider lends, without one."""

    session_id = SECRET
    session_key = b"\x5e" * 32
    may_change = True

    def check_id_may_change(self) -> None:
        if not self.may_change:
            raise SessionClosed

    async def save(self, session: Session) -> None:
        raise NotImplementedError

    async def release(self, session: Session) -> None:
        raise NotImplementedError

    def exclusive(self, session: Session) -> AbstractAsyncContextManager[Session]:
        raise NotImplementedError


def a_session(
    data: dict[str, Any] | None = None,
    *,
    phase: Phase = Phase.WRITABLE,
    user: str | None = None,
    replaced: bool = False,
    bound: Lender | None = None,
) -> Session:
    """A session as a grid's record leaves it: nothing decoded yet."""
    kind = NoSession if phase is Phase.NOT_AVAILABLE else Session
    session = kind(bound or Lender(), Access.EXCLUSIVE, phase, 60.0)
    segments = {key: payload.encode(key, value) for key, value in (data or {}).items()}
    session._load(segments, user, 60.0, is_new=data is None, replaced=replaced)
    return session


def commit(session: Session) -> dict[str, bytes]:
    """As a provider does: what is stored from now on, by way of stored bytes."""
    segments = session._segments_with(session._delta())
    session._committed(segments, session._user, session._timeout)
    return payload.split(payload.join(segments, 1 << 20))


def is_undecoded(session: Session, key: str) -> bool:
    """Whether nobody has decoded a value yet; looks past the session."""
    return type(dict.get(session, key)) is type(dict.get(a_session({"x": 1}), "x"))


# -- readers -----------------------------------------------------------------------------------

READERS: dict[str, Callable[[Session], object]] = {
    "dict": dict,
    "double star": lambda s: {**s},
    "call": lambda s: called(**s),
    "or": lambda s: s | {},
    "ror": lambda s: {} | s,
    "or of two": lambda s: a_session({}) | s,
    "ror of an OrderedDict": lambda s: dict(OrderedDict() | s),
    "update of a dict": lambda s: updated({}, s),
    "ior of a dict": lambda s: ior({}, s),
    "update of a session": lambda s: dict(updated(a_session({}), s)),
    "ior of a session": lambda s: dict(ior(a_session({}), s)),
    "copy": lambda s: s.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "pickle, first protocol": lambda s: pickle.loads(pickle.dumps(s, 0)),
    "items": lambda s: dict(s.items()),
    "keys and values": lambda s: dict(zip(s.keys(), s.values(), strict=True)),
    "iteration": lambda s: {key: s[key] for key in s},
    "get": lambda s: {key: s.get(key) for key in s},
    "pop": lambda s: {key: s.pop(key) for key in list(s)},
    "popitem": lambda s: dict(reversed([s.popitem() for _ in range(len(s))])),
    "setdefault": lambda s: {key: s.setdefault(key, 0) for key in s},
    "reversed": lambda s: {key: s[key] for key in reversed(list(reversed(s)))},
    "match": lambda s: matched(s),  # noqa: PLW0108 - matched is defined below
    "mapping of keys": lambda s: {key: s.keys().mapping[key] for key in s},  # type: ignore[attr-defined]
    "OrderedDict": lambda s: dict(OrderedDict(s)),
    "pydantic validation": TypeAdapter(dict[str, Any]).validate_python,
}


def called(**values: object) -> dict[str, object]:
    return values


def updated(target: dict[str, Any], source: Session) -> dict[str, Any]:
    target.update(source)
    return target


def ior(target: dict[str, Any], source: Session) -> dict[str, Any]:
    target |= source
    return target


def matched(session: Session) -> dict[str, Any]:
    match session:
        case {"cart": cart, **rest}:
            return {"cart": cart, **rest}
    raise AssertionError("a session matches no mapping pattern")


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_every_reader_sees_the_data_undecoded_or_not(reader: Callable[[Session], object]) -> None:
    fresh, half, read = a_session(DATA), a_session(DATA), a_session(DATA)
    assert half["name"] == "Ann"
    assert list(read.values()) == list(DATA.values())
    for session in (fresh, half, read):
        seen = reader(session)
        assert seen == DATA
        assert type(seen) is dict
        assert list(seen) == list(DATA)
        assert [type(value) for value in seen.values()] == [type(v) for v in DATA.values()]


TEXTS: dict[str, tuple[Callable[[Session], str], str]] = {
    "json": (json.dumps, json.dumps(JSON)),
    "json, indented": (lambda s: json.dumps(s, indent=1), json.dumps(JSON, indent=1)),
    "json, sorted": (lambda s: json.dumps(s, sort_keys=True), json.dumps(JSON, sort_keys=True)),
    "json, nested": (lambda s: json.dumps([s]), json.dumps([JSON])),
    "json, in Python": (lambda s: "".join(json.JSONEncoder().iterencode(s)), json.dumps(JSON)),
    "format_map": ("{name}: {cart[0][sku]}".format_map, "Ann: tea"),
    "percent": (lambda s: "%(name)s has %(seen)d" % s, "Ann has 3"),  # noqa: UP031 - what is tested
    "format": (lambda s: "{s[name]}".format(s=s), "Ann"),  # noqa: UP032 - what is tested
    "jinja": (
        lambda s: jinja2.Template(
            "{{ s.name }}{{ s['seen'] }}{% for k, v in s.items() %} {{ k }}={{ v }}{% endfor %}"
            "{{ s.cart[0].sku }}{% if 'no' in s %}!{% endif %}{{ s|length }}{{ s|tojson }}"
        ).render(s=s),
        "Ann3 cart=[{'sku': 'tea', 'count': 2}] name=Ann seen=3 no=Nonetea!4"
        + json.dumps(JSON, sort_keys=True),
    ),
}


@pytest.mark.parametrize(("writer", "text"), TEXTS.values(), ids=TEXTS)
def test_texts_made_from_a_session_show_the_data(
    writer: Callable[[Session], str], text: str
) -> None:
    if text.endswith("}") and "!" in text:  # jinja's tojson escapes for HTML
        text = text.replace('"', "&#34;") if "&#34;" in writer(a_session(JSON)) else text
    assert writer(a_session(JSON)) == text


READ_BY_C: dict[str, tuple[Callable[[Any], object], object]] = {
    "orjson": (orjson.dumps, orjson.dumps(JSON)),
    "msgspec to JSON": (msgspec.json.encode, msgspec.json.encode(JSON)),
    "msgspec to msgpack": (msgspec.msgpack.encode, msgspec.msgpack.encode(JSON)),
    "msgspec to builtins": (msgspec.to_builtins, JSON),
    "ormsgpack": (ormsgpack.packb, ormsgpack.packb(JSON)),
    "pydantic": (TypeAdapter(dict[str, Any]).dump_python, JSON),
    "pydantic to JSON": (TypeAdapter(dict[str, Any]).dump_json, orjson.dumps(JSON)),
    "pydantic, Any": (TypeAdapter(Any).dump_python, JSON),
    "pydantic, Any, to JSON": (TypeAdapter(Any).dump_json, orjson.dumps(JSON)),
    "pydantic, JSON mode": (lambda s: TypeAdapter(dict).dump_python(s, mode="json"), JSON),
}


@pytest.mark.parametrize(("reader", "read"), READ_BY_C.values(), ids=READ_BY_C)
def test_readers_in_c_raise_rather_than_show_a_placeholder(
    reader: Callable[[Any], object], read: object
) -> None:
    session = a_session(JSON)
    with pytest.raises((TypeError, ValueError), match="Undecoded"):
        reader(session)
    assert session["name"] == "Ann"  # one decoded value among others that are not
    with pytest.raises((TypeError, ValueError), match="Undecoded"):
        reader(session)
    assert reader(dict(session)) == read  # what they are to be handed
    assert reader(session) == read  # and once everything is decoded, nothing is wrong


def test_what_c_code_can_take_out_unseen_says_what_to_do_and_holds_no_data() -> None:
    taken = msgspec.convert(a_session(DATA), dict)
    for text in (repr(taken), orjson.dumps(a_session(DATA), default=str).decode()):
        assert text.count("dict(session)") == len(DATA)
        assert "tea" not in text
    for value in taken.values():
        with pytest.raises(TypeError, match=r"dict\(session\)"):
            pickle.dumps(value)
        with pytest.raises(TypeError, match=r"dict\(session\)"):
            copy.deepcopy(value)


def test_equality_is_a_dicts() -> None:
    pairs: list[tuple[Any, Any]] = [
        (a_session(DATA), dict(DATA)),
        (a_session(DATA), a_session(DATA)),
    ]
    for mine, theirs in pairs:
        assert mine == theirs
        assert theirs == mine
        assert (mine != theirs, theirs != mine) == (False, False)
    for other in ({}, {**DATA, "seen": 4}, a_session({}), None, 3):
        assert a_session(DATA) != other
        assert other != a_session(DATA)
        assert (a_session(DATA) == other, other == a_session(DATA)) == (False, False)
    with pytest.raises(TypeError, match="unhashable"):
        hash(a_session(DATA))


def test_or_keeps_order_and_precedence() -> None:
    session = a_session({"a": 1, "b": [2]})
    assert list((session | {"b": 3, "c": 4}).items()) == [("a", 1), ("b", 3), ("c", 4)]
    assert list(({"b": 3, "c": 4} | session).items()) == [("b", [2]), ("c", 4), ("a", 1)]
    assert type(session | {}) is dict
    with pytest.raises(TypeError):
        session | [("a", 1)]
    with pytest.raises(TypeError):
        3 | session


def test_a_copy_is_the_callers_and_changes_nothing() -> None:
    session = a_session({"cart": [1]})
    deep = copy.deepcopy(session)
    deep["cart"].append(2)
    deep["more"] = 1
    shallow = session.copy()
    shallow["more"] = 1
    assert session == {"cart": [1]}
    assert not session._delta().changes


def test_views_size_and_truth() -> None:
    session = a_session({"a": 1, "b": 2})
    assert len(session) == 2
    assert session
    assert not a_session({})
    assert "a" in session
    assert "c" not in session
    assert (3 in session) is False  # type: ignore[comparison-overlap]
    assert list(session.keys() & {"b", "c"}) == ["b"]
    assert sorted(session.values()) == [1, 2]
    backwards = list(reversed(session.items()))  # type: ignore[call-overload]
    assert backwards == [("b", 2), ("a", 1)]
    assert ("a", 1) in session.items()
    assert isinstance(session, dict)


def test_absent_keys_are_told_as_a_dict_tells_them() -> None:
    session = a_session({"a": 1})
    with pytest.raises(KeyError, match="nothing"):
        session["nothing"]
    with pytest.raises(KeyError, match="nothing"):
        session.pop("nothing")
    with pytest.raises(KeyError, match="popitem"):
        a_session().popitem()
    assert session.get("nothing") is None
    assert session.get("nothing", 5) == 5
    assert session.pop("nothing", 5) == 5
    assert not session.modified
    with pytest.raises(KeyError, match="nothing"):
        del session["nothing"]
    assert not session._delta().changes


def test_update_takes_what_a_dict_takes() -> None:
    session = a_session({"a": 1})
    session.update({"b": 2}, c=3)
    session.update([("d", 4)])
    session.update(**{"self": 5})
    session |= [("e", 6)]
    assert session == {"a": 1, "b": 2, "c": 3, "d": 4, "self": 5, "e": 6}
    with pytest.raises(TypeError):
        session.update(3)


# -- what nobody may see -----------------------------------------------------------------------


@pytest.mark.parametrize("decoded", [False, True])
def test_no_repr_shows_data_or_id(decoded: bool) -> None:
    session = a_session({"card": "4111 1111"}, user="ann@example.com")
    if decoded:
        session["card"] += "!"
    texts = (repr(session), str(session), f"{session}", f"{[session]!r}", pprint.pformat(session))
    for text in (*texts, repr(session._delta())):
        for secret in ("4111", "ann@", SECRET):
            assert secret not in text
    assert "1 keys, exclusive, writable" in repr(session)


# -- changes -----------------------------------------------------------------------------------


def test_a_pure_read_is_no_write_and_decodes_what_it_touches_only() -> None:
    session = a_session(DATA)
    assert session["cart"] == DATA["cart"]
    assert session.get("name") == "Ann"
    assert [is_undecoded(session, key) for key in DATA] == [False, False, True, True, True]
    assert session == DATA
    assert not session._delta().changes
    assert not session.modified


def test_only_values_that_can_change_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    session = a_session(DATA)
    assert session == DATA
    encoded = []

    def encode(key: str, value: object) -> bytes:
        encoded.append(key)
        return payload.encode(key, value)

    monkeypatch.setattr("gridsession.changes.payload", _Payload(encode))
    assert not session._delta().changes
    assert encoded == ["cart"]


class _Payload:
    def __init__(self, encode: Callable[[str, object], bytes]) -> None:
        self.encode = encode


def test_a_nested_change_is_seen_and_written_alone() -> None:
    session = a_session(DATA)
    session["cart"][0]["count"] = 3
    session["cart"].append({"sku": "milk", "count": 1})
    assert list(session._delta().set) == ["cart"]
    assert not session.modified  # as Starlette's, which does not see it
    kept = commit(session)
    assert payload.decode(kept["cart"])[0] == {"sku": "tea", "count": 3}
    assert not session._delta().changes
    session["cart"].pop()  # values in hand stay compared after a commit
    assert list(session._delta().set) == ["cart"]


def test_setting_what_is_there_is_no_write() -> None:
    session = a_session(DATA)
    for key, value in copy.deepcopy(DATA).items():
        session[key] = value
    assert session.modified
    assert not session._delta().changes
    del session["name"]
    session["name"] = "Ann"
    session.setdefault("name", "Bob")
    session.update(seen=3)
    assert not session._delta().changes


@pytest.mark.parametrize(("old", "new"), [(1, True), (1, 1.0), ([1], (1,)), (0.0, -0.0)])
def test_equal_values_of_another_type_are_a_change(old: object, new: object) -> None:
    session = a_session({"a": old})
    session["a"] = new
    assert list(session._delta().set) == ["a"]


def test_removed_and_added_keys() -> None:
    session = a_session({"a": 1, "b": 2, "c": 3})
    del session["a"]
    session["d"] = 4
    session["e"] = 5
    del session["e"]
    delta = session._delta()
    assert delta.removed == ["a"]
    assert list(delta.set) == ["d"]
    assert list(commit(session)) == ["b", "c", "d"]


@pytest.mark.parametrize("data", [None, {"a": 1, "b": 2}])
def test_order_of_keys_is_kept_as_a_dict_keeps_it(data: dict[str, Any] | None) -> None:
    session, model = a_session(data), dict(data or {})
    for target in (session, model):
        target["a"] = 3
        target["b"] = 4
        del target["a"]
        target["c"] = 5
        target["a"] = 6
    assert list(session) == list(model)
    assert list(commit(session)) == list(model)


def test_clear_forgets_everything_and_the_user() -> None:
    session = a_session(DATA, user="ann")
    session.clear()
    assert session == {}
    assert session.user is None
    assert set(session._delta().removed) == set(DATA)
    assert commit(session) == {}


class Name(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "not this"


class Shade(enum.StrEnum):
    RED = "red"


def test_keys_that_are_a_kind_of_str_become_str() -> None:
    session = a_session({"old": [1]})
    session[Name("new")] = 1
    session[Shade.RED] = 2
    session[Name("old")].append(2)
    assert session.pop(Name("new")) == 1
    session[Name("new")] = 3
    assert [(type(key), key) for key in session] == [(str, "old"), (str, "red"), (str, "new")]
    kept = commit(session)
    assert {key: payload.decode(kept[key]) for key in kept} == {"old": [1, 2], "red": 2, "new": 3}


@pytest.mark.parametrize("key", [1, None, b"a", ("a",), 1.0])
def test_other_keys_are_refused_at_once(key: Any) -> None:
    session = a_session({"a": 1})
    for change in (
        lambda: session.__setitem__(key, 1),
        lambda: session.setdefault(key, 1),
        lambda: session.update({key: 1}),
    ):
        with pytest.raises(TypeError, match=f"keys of a session are str, not {type(key).__name__}"):
            change()
    assert session == {"a": 1}
    assert not session.modified


def test_a_value_of_no_stored_type_is_refused_with_its_path() -> None:
    session = a_session({"a": {"b": [1]}})
    session["a"]["b"].append(object())
    with pytest.raises(SessionTypeError, match=r'session\["a"\]\["b"\]\[1\]: object is not'):
        session._delta()


def test_forgotten_changes_are_gone() -> None:
    session = a_session(DATA, user="ann")
    session["cart"].clear()
    session["new"] = 1
    del session["name"]
    session.user = "bob"
    session.timeout = 5
    session.regenerate_id()
    session._discard()
    assert session == DATA
    assert (session.user, session.timeout) == ("ann", 60.0)
    assert not session._delta().changes
    assert not session._has_new_terms


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.tuples(inner)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=6))
def test_any_data_survives_a_commit_with_its_order(data: dict[str, Any]) -> None:
    session = a_session()
    session.update(data)
    again = a_session()
    again._load(commit(session), None, 60.0, is_new=False, replaced=False)
    assert list(again.items()) == list(data.items())
    assert not again._delta().changes


# -- Starlette's flags -------------------------------------------------------------------------

TOUCHES: dict[str, tuple[Callable[[Session], object], bool]] = {
    "getitem": (lambda s: s["a"], False),
    "get": (lambda s: s.get("nothing"), False),
    "contains": (lambda s: "a" in s, False),
    "len": (len, False),
    "iter": (list, False),
    "keys": (lambda s: s.keys(), False),
    "values": (lambda s: s.values(), False),
    "items": (lambda s: s.items(), False),
    "copy": (lambda s: s.copy(), False),
    "eq": (lambda s: s == {}, False),
    "bool": (bool, False),
    "id": (lambda s: s.id, False),
    "key": (lambda s: s.key, False),
    "user": (lambda s: s.user, False),
    "timeout": (lambda s: s.timeout, False),
    "mark_accessed": (lambda s: s.mark_accessed(), False),
    "mark_modified": (lambda s: s.mark_modified(), True),
    "setitem": (lambda s: s.__setitem__("a", 1), True),
    "delitem": (lambda s: s.__delitem__("a"), True),
    "pop": (lambda s: s.pop("a"), True),
    "pop of nothing": (lambda s: s.pop("nothing", 0), False),
    "popitem": (lambda s: s.popitem(), True),
    "clear": (lambda s: s.clear(), True),
    "update": (lambda s: s.update(b=2), True),
    "ior": (lambda s: s.__ior__({"b": 2}), True),
    "setdefault": (lambda s: s.setdefault("b", 2), True),
    "setdefault of what is there": (lambda s: s.setdefault("a", 2), False),
}


@pytest.mark.parametrize(("touch", "modifies"), TOUCHES.values(), ids=TOUCHES)
def test_flags_are_starlettes(touch: Callable[[Session], object], modifies: bool) -> None:
    session = a_session({"a": [1]})
    assert (session.accessed, session.modified) == (False, False)
    touch(session)
    assert (session.accessed, session.modified) == (True, modifies)


def test_what_is_about_the_request_does_not_count_as_access() -> None:
    session = a_session({"a": 1})
    repr(session)
    assert (session.is_new, session.is_read_only, session.access) == (
        False,
        False,
        Access.EXCLUSIVE,
    )
    assert not session.accessed


# -- phases ------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Session], object]] = {
    "setitem": lambda s: s.__setitem__("a", 1),
    "delitem": lambda s: s.__delitem__("a"),
    "pop": lambda s: s.pop("a"),
    "pop of nothing": lambda s: s.pop("nothing", None),
    "popitem": lambda s: s.popitem(),
    "setdefault": lambda s: s.setdefault("a", 1),
    "update": lambda s: s.update(a=1),
    "update with nothing": lambda s: s.update(),
    "ior": lambda s: s.__ior__({"a": 1}),
    "clear": lambda s: s.clear(),
    "user": lambda s: setattr(s, "user", "bob"),
    "timeout": lambda s: setattr(s, "timeout", 5),
    "regenerate_id": lambda s: s.regenerate_id(),
    "abandon": lambda s: s.abandon(),
    "mark_modified": lambda s: s.mark_modified(),
    "save": lambda s: drive(s.save()),
}


def drive(waiting: Coroutine[Any, Any, None]) -> None:
    """Run what raises before its first await."""
    try:
        waiting.send(None)
    finally:
        waiting.close()


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize(
    ("phase", "error", "help_text"),
    [
        (Phase.READ_ONLY, SessionReadOnly, 'open it with access "exclusive"'),
        (Phase.CLOSED, SessionClosed, "session.exclusive()"),
        (Phase.NOT_AVAILABLE, SessionNotAvailable, 'its access is "none"'),
    ],
)
def test_a_write_out_of_phase_raises_what_helps(
    write: Callable[[Session], object], phase: Phase, error: type[Exception], help_text: str
) -> None:
    session = a_session({"a": 1}, phase=phase, user="ann")
    with pytest.raises(error) as raised:
        write(session)
    assert help_text in str(raised.value)
    session._phase = Phase.WRITABLE
    held = Session.copy(session) if phase is not Phase.NOT_AVAILABLE else {"a": 1}
    assert held == {"a": 1}
    assert set(dict.keys(session)) == {"a"}
    assert not session._delta().changes
    assert not session._has_new_terms
    assert not session.modified


@pytest.mark.parametrize(
    "read",
    [
        *(pytest.param(touch, id=name) for name, (touch, writes) in TOUCHES.items() if not writes),
        *(pytest.param(READERS[name], id=name) for name in READERS if "pydantic" not in name),
        lambda s: s.exclusive(),
        lambda s: drive(s.release()),
    ],
)
def test_without_a_session_every_touch_says_so(read: Callable[[Session], object]) -> None:
    with pytest.raises(SessionNotAvailable):
        read(a_session({"a": 1}, phase=Phase.NOT_AVAILABLE))


@pytest.mark.parametrize("phase", [Phase.READ_ONLY, Phase.CLOSED])
def test_out_of_phase_sessions_can_be_read(phase: Phase) -> None:
    session = a_session(DATA, phase=phase, user="ann")
    assert session == DATA
    assert session.is_read_only
    assert (session.user, session.timeout, session.id) == ("ann", 60.0, SECRET)
    assert session.key == "5e" * 32


# -- terms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "kept"), [(5, 5.0), (0.5, 0.5), (timedelta(minutes=2), 120.0)], ids=str
)
def test_timeout_is_set_in_seconds(given_: float | timedelta, kept: float) -> None:
    session = a_session({"a": 1})
    session.timeout = given_
    assert session.timeout == kept
    assert session._has_new_terms
    assert not session._delta().changes


@pytest.mark.parametrize(
    "bad", [0, -1, float("nan"), float("inf"), timedelta(0), 1e12, timedelta(days=9999)], ids=str
)
def test_a_timeout_out_of_range_is_refused(bad: float | timedelta) -> None:
    session = a_session({"a": 1})
    with pytest.raises(ValueError, match=r"timeout=.*more than 0 and at most ten years"):
        session.timeout = bad
    assert session.timeout == 60.0


def test_user_is_a_str_or_nobody() -> None:
    session = a_session({"a": 1})
    session.user = "ann"
    assert session._has_new_terms is True
    session.user = None
    assert bool(session._has_new_terms) is False
    wrong: Any
    for wrong in (3, b"ann", Name("ann")):
        with pytest.raises(TypeError, match="must be a str or None, not"):
            session.user = wrong


def test_a_replaced_id_changes_neither_user_nor_id() -> None:
    session = a_session({"a": 1}, user="ann", replaced=True)
    with pytest.raises(SessionReplaced, match="cannot change the user"):
        session.user = "bob"
    session.user = "ann"
    session.regenerate_id()
    assert not session._has_new_terms
    session.clear()  # a logout needs no new id
    assert session.user is None


def test_no_new_id_once_the_headers_have_left() -> None:
    lender = Lender()
    lender.may_change = False
    session = a_session({"a": 1}, user="ann", bound=lender)
    with pytest.raises(SessionClosed):
        session.user = "bob"
    with pytest.raises(SessionClosed):
        session.regenerate_id()
    session.user = "ann"
    assert not session._has_new_terms
    session.clear()  # a logout needs no new id
    assert session.user is None
