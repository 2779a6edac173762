"""Session ids: made, checked, hashed to keys; the cookie read and written.

A session id is what the browser's cookie carries: 16 random bytes of *handle* and 32 of *secret*,
in base64url, 64 characters. The grid sees the SHA-256 of each half only: the handle's hash is the
record's key, the secret's hash is compared inside the grid. So nobody who reads the grid, its
backups or a log can come in with what is written there, and who knows a key alone can't either.

Pure: random bytes are arguments.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64encode
from binascii import a2b_base64
from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from string import ascii_letters, digits
from typing import Literal, NamedTuple

HANDLE_BYTES = 16  # 128 bits; ASP.NET: 120
SECRET_BYTES = 32
ID_BYTES = HANDLE_BYTES + SECRET_BYTES
_LENGTH = 64  # characters of an id
_ALPHABET = bytes(sorted({*ascii_letters.encode(), *digits.encode(), *b"-_"}))
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_EPOCH = "Thu, 01 Jan 1970 00:00:00 GMT"

SameSite = Literal["lax", "strict", "none"]


class Identity(NamedTuple):
    """A well-formed session id, taken apart.

    Attributes:
        handle: names the record for as long as it lives, through rotations.
        key: SHA-256 of the handle; what the grid and the logs know.
        secret: SHA-256 of the secret.
    """

    handle: bytes
    key: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"Identity({name_of(self.key)})"


def new_id(random: bytes) -> str:
    """A session id from `ID_BYTES` random bytes."""
    return urlsafe_b64encode(random).decode("ascii")


def rotated_id(handle: bytes, random: bytes) -> str:
    """The same handle with a new secret of `SECRET_BYTES` random bytes."""
    return urlsafe_b64encode(handle + random).decode("ascii")


def parse_id(text: bytes) -> Identity | None:
    """A session id taken apart; None for anything that `new_id` cannot have made."""
    return _parse(text) if len(text) == _LENGTH else None


# A browser's next request brings the same id, and two hashes are a twentieth of what a session
# adds to a request. A few are kept, in memory only, where nothing lists them.
@lru_cache(maxsize=512)
def _parse(text: bytes) -> Identity | None:
    if text.translate(None, _ALPHABET):  # something else is left
        return None
    raw = a2b_base64(text.translate(_FROM_URL_SAFE))
    handle = raw[:HANDLE_BYTES]
    key, secret = sha256(handle).digest(), sha256(raw[HANDLE_BYTES:]).digest()
    return tuple.__new__(Identity, (handle, key, secret))


def name_of(key: bytes) -> str:
    """How logs and errors call a record: enough of its key to find it, none of its id."""
    return key[:6].hex()


class CookieReader:
    """Finds one cookie in the raw headers of a request.

    Args:
        name: the cookie's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # A cookie's name begins the header or follows "; ". Values in quotes are taken as they
        # stand: a session id has no quotes, so a quoted one is of the wrong shape anyway.
        self._pattern = re.compile(rb"(?:^|;)[ \t]*" + re.escape(name.encode()) + rb"=([^;]*)")

    def values(self, headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
        """All values that came under the name, over all `cookie` headers."""
        found: list[bytes] = []
        for name, value in headers:
            if name == b"cookie":
                found += self._pattern.findall(value)
        return found


class CookieWriter:
    """Writes `Set-Cookie` values; all of its attributes are fixed at start.

    Args:
        name: the cookie's name.
        max_age: seconds that the browser keeps it, or None for a cookie of the browser session.
        path, domain, same_site, https_only, partitioned: as in Starlette's middleware.
    """

    def __init__(
        self,
        name: str,
        *,
        max_age: int | None,
        path: str,
        domain: str | None,
        same_site: SameSite,
        https_only: bool,
        partitioned: bool,
    ) -> None:
        attributes = f"; HttpOnly; SameSite={same_site.capitalize()}"
        if https_only:
            attributes += "; Secure"
        if domain is not None:
            attributes += f"; Domain={domain}"
        if partitioned:
            attributes += "; Partitioned"
        age = "" if max_age is None else f"; Max-Age={max_age}"
        self._name = name
        self._kept = f"; Path={path}{age}{attributes}"
        self._removed = f"{name}=; Path={path}; Expires={_EPOCH}; Max-Age=0{attributes}".encode()

    def set(self, session_id: str) -> bytes:
        """The header's value that hands a session id to the browser."""
        return f"{self._name}={session_id}{self._kept}".encode("latin-1")

    def remove(self) -> bytes:
        """The header's value that takes the cookie away again."""
        return self._removed


def default_cookie_name(*, https_only: bool, path: str, domain: str | None) -> str:
    """`__Host-session` where browsers accept that prefix, else `session`."""
    return "__Host-session" if https_only and path == "/" and domain is None else "session"
