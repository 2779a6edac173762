"""Session ids and the cookie that carries them: exact shapes, and calm about hostile input."""

from __future__ import annotations

import hashlib
import os
import re
from base64 import urlsafe_b64decode
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gridsession.identity import (
    HANDLE_BYTES,
    ID_BYTES,
    SECRET_BYTES,
    CookieReader,
    CookieWriter,
    Identity,
    default_cookie_name,
    name_of,
    new_id,
    parse_id,
    rotated_id,
)

RANDOM = bytes(range(ID_BYTES))
ID = new_id(RANDOM)


def parsed(text: str) -> Identity:
    identity = parse_id(text.encode())
    assert identity is not None
    return identity


# -- ids --------------------------------------------------------------------------------------


def test_an_id_is_64_characters_that_any_cookie_can_carry() -> None:
    assert (HANDLE_BYTES * 8, SECRET_BYTES * 8) == (128, 256)
    for random in (RANDOM, bytes(ID_BYTES), b"\xff" * ID_BYTES, os.urandom(ID_BYTES)):
        text = new_id(random)
        assert re.fullmatch("[A-Za-z0-9_-]{64}", text)
        assert urlsafe_b64decode(text) == random


def test_the_grid_sees_hashes_only() -> None:
    handle, key, secret = parsed(ID)
    assert handle == RANDOM[:16]
    assert key == hashlib.sha256(RANDOM[:16]).digest()
    assert secret == hashlib.sha256(RANDOM[16:]).digest()


def test_a_rotated_id_is_the_same_record_under_another_secret() -> None:
    before = parsed(ID)
    after = parsed(rotated_id(before.handle, bytes(SECRET_BYTES)))
    assert (after.handle, after.key) == (before.handle, before.key)
    assert after.secret == hashlib.sha256(bytes(32)).digest() != before.secret


@given(st.binary(min_size=ID_BYTES, max_size=ID_BYTES))
def test_every_id_is_parsed_and_no_two_texts_are_one_id(random: bytes) -> None:
    text = new_id(random)
    assert parsed(text).handle == random[:16]
    assert rotated_id(random[:16], random[16:]) == text


@given(
    st.binary(max_size=200)
    | st.binary(min_size=64, max_size=64)
    | st.text(alphabet=ID + "=+/ \n\x00", min_size=60, max_size=68).map(str.encode)
)
@example(ID.encode() + b"\n")
@example(b"\n" + ID.encode()[1:])
@example(ID.encode()[:-1] + b"=")
@example(ID.encode()[:-2] + "é".encode())
@example(b"+/" * 32)
@example(b"A" * 65)
@example(b"A" * 63)
@example(b"A" * 100_000)
@example(b"")
def test_whatever_comes_is_parsed_or_refused_and_never_raises(text: bytes) -> None:
    identity = parse_id(text)
    if re.fullmatch(rb"[A-Za-z0-9_-]{64}(?!\n)", text):
        assert identity is not None
        assert rotated_id(identity.handle, urlsafe_b64decode(text)[16:]).encode() == text
    else:
        assert identity is None


def test_no_repr_shows_more_than_the_keys_name() -> None:
    identity = parsed(ID)
    for text in (repr(identity), str(identity), f"{identity}", f"{[identity]}"):
        assert text.strip("[]") == f"Identity({identity.key.hex()[:12]})"
    assert name_of(identity.key) == identity.key.hex()[:12]


# -- the cookie, read ---------------------------------------------------------------------------


def values(*cookies: bytes, name: str = "session") -> list[bytes]:
    return CookieReader(name).values([(b"cookie", cookie) for cookie in cookies])


@pytest.mark.parametrize(
    ("cookie", "found"),
    [
        (b"session=abc", [b"abc"]),
        (b"a=1; session=abc; b=2", [b"abc"]),
        (b"a=1;session=abc;b=2", [b"abc"]),
        (b" \tsession=abc; b=2", [b"abc"]),
        (b"session=abc \t; b=2", [b"abc \t"]),  # browsers send no such thing; it is no id
        (b"session=", [b""]),
        (b"session=;session=x", [b"", b"x"]),
        (b'session="abc"', [b'"abc"']),
        (b"session=a=b", [b"a=b"]),
        (b"session", []),
        (b"session; a=1", []),
        (b"", []),
        (b";;;", []),
        (b"=session=abc", []),
        (b"xsession=abc", []),
        (b"session2=abc", []),
        (b"x-session=abc", []),
        (b"Session=abc", []),
        (b"a=session=abc", []),
        (b'a="; session=abc', [b"abc"]),
        (b"a=1, session=abc", []),
        (b"a=1\nsession=abc", []),
        (b"__Host-session=abc", []),
        (b"session=abc; __Host-session=def", [b"abc"]),
        (b"session=a; session=b; session=c", [b"a", b"b", b"c"]),
        (b"session=\xff\xfe", [b"\xff\xfe"]),
    ],
)
def test_cookies_of_that_very_name_are_found(cookie: bytes, found: list[bytes]) -> None:
    assert values(cookie) == found


def test_two_headers_are_one_jar() -> None:
    assert values(b"session=a", b"b=2; session=c") == [b"a", b"c"]
    headers = [(b"host", b"session=x"), (b"x-cookie", b"session=x"), (b"cookie", b"session=a")]
    assert CookieReader("session").values(headers) == [b"a"]


@pytest.mark.parametrize("name", ["a.b", "a$", "^a", "session"])
def test_a_name_is_no_pattern(name: str) -> None:
    assert values(b"axb=1; a=2; " + name.encode() + b"=3", name=name) == [b"3"]


@given(st.lists(st.binary(max_size=60) | st.text("session=; \"'\\").map(str.encode), max_size=4))
def test_hostile_headers_never_raise(cookies: list[bytes]) -> None:
    for value in values(*cookies):
        assert b";" not in value
        parse_id(value)


def test_a_huge_header_is_read_in_no_time() -> None:
    huge = b"session=" + ID.encode() + b"; " + b";" * 200_000 + b" \t" * 100_000 + b"session"
    assert values(huge) == [ID.encode()]


# -- the cookie, written ------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "max_age": None,
    "path": "/",
    "domain": None,
    "same_site": "lax",
    "https_only": False,
    "partitioned": False,
}
REMOVED = "session=; Path=/; Expires=Thu, 01 Jan 1970 00:00:00 GMT; Max-Age=0; HttpOnly"


@pytest.mark.parametrize(
    ("options", "kept", "removed"),
    [
        ({}, "; Path=/; HttpOnly; SameSite=Lax", "; SameSite=Lax"),
        ({"max_age": 60}, "; Path=/; Max-Age=60; HttpOnly; SameSite=Lax", "; SameSite=Lax"),
        ({"max_age": 0}, "; Path=/; Max-Age=0; HttpOnly; SameSite=Lax", "; SameSite=Lax"),
        ({"max_age": -1}, "; Path=/; Max-Age=-1; HttpOnly; SameSite=Lax", "; SameSite=Lax"),
        (
            {"same_site": "strict"},
            "; Path=/; HttpOnly; SameSite=Strict",
            "; SameSite=Strict",
        ),
        (
            {"same_site": "none", "https_only": True, "partitioned": True},
            "; Path=/; HttpOnly; SameSite=None; Secure; Partitioned",
            "; SameSite=None; Secure; Partitioned",
        ),
        (
            {"domain": "example.com"},
            "; Path=/; HttpOnly; SameSite=Lax; Domain=example.com",
            "; SameSite=Lax; Domain=example.com",
        ),
        ({"path": "/shop"}, "; Path=/shop; HttpOnly; SameSite=Lax", None),
    ],
)
def test_set_cookie(options: dict[str, Any], kept: str, removed: str | None) -> None:
    writer = CookieWriter("session", **PLAIN | options)
    assert writer.set(ID) == f"session={ID}{kept}".encode()
    expected = REMOVED.replace("Path=/", "Path=/shop") + "; SameSite=Lax"
    assert writer.remove().decode() == (expected if removed is None else REMOVED + removed)


@pytest.mark.parametrize(
    ("https_only", "path", "domain", "name"),
    [
        (True, "/", None, "__Host-session"),
        (False, "/", None, "session"),
        (True, "/shop", None, "session"),
        (True, "/", "example.com", "session"),
    ],
)
def test_the_cookies_name_is_as_safe_as_it_can_be(
    https_only: bool, path: str, domain: str | None, name: str
) -> None:
    assert default_cookie_name(https_only=https_only, path=path, domain=domain) == name
