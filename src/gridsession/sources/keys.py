"""Keys that sessions are encrypted with: how they are written; kept so that nothing shows them."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

KEY_BYTES: Final = 32  # AES-256
PLAIN: Final = "plain"
"""Stands among the keys, for "not encrypted"."""

_HEX = re.compile(r"[0-9A-Fa-f]{64}")  # 48 bytes as base64, so that it can be nothing else
_BASE64 = re.compile(r"([A-Za-z0-9+/_-]{43})=?")
_FEW = 16  # different bytes; chance gives a key so few of them once in 10¹⁵ times


class EncryptionKey:  # no dataclass: asdict() of the settings would show what is in it
    """A key that records' own keys are derived from; no text of it shows it.

    Attributes:
        secret: its 32 bytes.
    """

    __slots__ = ("secret",)

    def __init__(self, secret: bytes) -> None:
        self.secret: Final = secret

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncryptionKey) and other.secret == self.secret

    def __hash__(self) -> int:
        return hash(self.secret)

    def __repr__(self) -> str:
        return "<encryption key>"


EncryptionKeys = tuple[EncryptionKey | str, ...]


@dataclass(frozen=True)
class Keys:
    """Encryption keys in an order, the first of them the one to encrypt with, and `plain` among
    them. Kept as a tuple of `EncryptionKey` and `PLAIN`.
    """

    allowed: str = (
        "keys of 32 random bytes in base64 or hex, such as `gridsession new-key` prints, each "
        "once: a list of str, or one str with commas between them; beside them, plain for sessions "
        "that are not encrypted"
    )

    def check(self, value: object) -> EncryptionKeys:
        if isinstance(value, str):
            value = value.split(",") if value.strip() else []
        if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
            raise ValueError(self.allowed)
        keys: list[EncryptionKey | str] = []
        for number, item in enumerate(value, start=1):
            try:
                key = _key(item)
                if key in keys:
                    raise ValueError(f"is item {keys.index(key) + 1} again")
            except ValueError as error:
                raise ValueError(f"{self.allowed}; item {number} of {len(value)} {error}") from None
            keys.append(key)
        if keys == [PLAIN]:
            raise ValueError(f"{self.allowed}; plain alone is no key: leave the option out")
        return tuple(keys)

    def read(self, text: str) -> object:
        return [] if text.lower() in ("none", "null") else text


def _key(item: object) -> EncryptionKey | str:
    """One item; a ValueError's text says what is wrong with it, and shows nothing of it."""
    if isinstance(item, EncryptionKey):
        return item
    if not isinstance(item, str):
        raise ValueError(f"is of type {type(item).__name__}, not str")
    text = item.strip()
    if text.lower() == PLAIN:
        return PLAIN
    if not text:
        raise ValueError("is empty")
    if _HEX.fullmatch(text):
        secret = bytes.fromhex(text)
    elif found := _BASE64.fullmatch(text):
        digits = found[1].replace("-", "+").replace("_", "/")
        secret = base64.b64decode(f"{digits}=")
        if base64.b64encode(secret).decode() != f"{digits}=":
            raise ValueError("has a wrong last character: it was not copied as it is")
    else:
        raise ValueError(f"is none: it has {len(text)} characters, base64 of a key 43 or 44")
    if len(set(secret)) < _FEW:
        raise ValueError("is not random: whoever can guess it reads every session")
    return EncryptionKey(secret)


def new_key(random_bytes: Callable[[int], bytes]) -> str:
    """A new key as text: 43 characters of base64 that mean nothing to shells and files.

    Args:
        random_bytes: a source of random bytes that nobody can foretell, such as os.urandom.
    """
    return base64.urlsafe_b64encode(random_bytes(KEY_BYTES)).decode().rstrip("=")


def summary(keys: Sequence[EncryptionKey | str]) -> str:
    """What stands in a list of keys, for people: `2 keys`, `plain and 1 key`, `1 key and plain`."""
    count = sum(isinstance(key, EncryptionKey) for key in keys)
    words = f"{count} key{'' if count == 1 else 's'}"
    if PLAIN not in keys:
        return words if count else "none"
    return f"{PLAIN} and {words}" if keys[0] == PLAIN else f"{words} and {PLAIN}"
