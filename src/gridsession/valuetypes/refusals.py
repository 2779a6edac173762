"""What the fast way of packing cannot do: dicts with keys other than str, and saying what is wrong.

ormsgpack says of a value that it cannot pack neither where it is nor what it is. This walk, in
Python, is made only then: it ends with the same bytes as the fast way would have made, or with a
SessionTypeError that a developer can act on and that holds no value of the session.
"""

from __future__ import annotations

import dataclasses
import json
from enum import Enum, Flag
from pathlib import PurePath
from typing import Any, Final

from ormsgpack import Ext, packb

from gridsession.errors import SessionTypeError
from gridsession.valuetypes.builtin import (
    BUILT_IN,
    CONTAINERS,
    DICT,
    DISGUISED,
    ENCODERS,
    FROZENSET,
    REGISTERED,
    SET,
    TUPLE,
    RefusedError,
)
from gridsession.valuetypes.packing import (
    DEEP_HEADERS,
    PACK_OPTIONS,
    RUN_LEVELS,
    TOO_DEEP,
    pack_set,
)
from gridsession.valuetypes.registry import BY_CLASS, Registration

_SHOWN_CHARACTERS: Final = 40  # of a key, in errors

# Where in a session's value one is: the level above, how to get here from there, by which key.
_Path = tuple["_Path | None", str, Any]


def encode_slowly(key: str, value: object) -> bytes:
    """Raises SessionTypeError, or returns what `encode` does for the same value."""
    path: _Path = (None, "key", key)
    try:
        return packb(_Walk().plain(value, path, 0, 0), None, PACK_OPTIONS)
    except RecursionError:
        raise SessionTypeError(f"{_rendered(path)}: {TOO_DEEP}") from None


class _Walk:
    """Rewrites one value into what ormsgpack packs by itself, or says what in it is refused."""

    def __init__(self) -> None:
        self._open: set[int] = set()  # ids of the objects around the one that is looked at

    def plain(self, value: Any, path: _Path, run: int, depth: int) -> Any:
        """`depth`: levels around `value` in runs 0 and 1, msgpack headers from run 2 on."""
        kind = type(value)
        if kind is str:
            if not value.isascii():
                _check_text(value, path)
            return value
        if kind is int and -(2**63) <= value < 2**64:
            return value
        if value is None or kind in (bool, float, bytes):
            return value
        if (leaf := ENCODERS.get(kind)) is not None:
            try:
                return leaf(value)
            except RefusedError as error:
                reason = str(error)
            raise _refusal(path, f"a {kind.__name__} that cannot be stored: {reason}")
        registration = BY_CLASS.get(kind)
        if registration is None and kind not in CONTAINERS:
            raise _refusal(path, why_not(kind))
        if id(value) in self._open:
            raise _refusal(path, f"the {kind.__qualname__} contains itself")
        self._open.add(id(value))
        try:
            if kind is list or (kind is dict and all(type(key) is str for key in value)):
                depth += 1
                if depth > (RUN_LEVELS if run < 2 else DEEP_HEADERS):
                    raise _refusal(path, TOO_DEEP)
                if kind is list:
                    return [
                        self.plain(member, (path, "index", index), run, depth)
                        for index, member in enumerate(value)
                    ]
                return self._plain_dict(value, path, run, depth)
            run += 1
            depth = 1 if run <= 2 else depth + 2
            if depth > DEEP_HEADERS:
                raise _refusal(path, TOO_DEEP)
            if registration is not None:
                return self._plain_registered(value, path, registration, run, depth)
            return self._plain_ext(kind, value, path, run, depth)
        finally:
            self._open.discard(id(value))

    def _plain_dict(self, value: dict[str, Any], path: _Path, run: int, depth: int) -> Any:
        plain = {}
        for key, member in value.items():
            if not key.isascii():
                _check_text(key, (path, "index", key))
            plain[key] = self.plain(member, (path, "index", key), run, depth)
        return plain

    def _plain_ext(self, kind: type, value: Any, path: _Path, run: int, depth: int) -> Ext:
        if kind is dict:
            pairs: list[Any] = []
            for key, member in value.items():
                inside: _Path = (path, "index", key if type(key) is str else type(key))
                pairs.append(self.plain(key, inside, run, depth))
                pairs.append(self.plain(member, inside, run, depth))
            return Ext(DICT, packb(pairs, None, PACK_OPTIONS))
        if kind is tuple:
            members = [
                self.plain(member, (path, "index", index), run, depth)
                for index, member in enumerate(value)
            ]
            return Ext(TUPLE, packb(members, None, PACK_OPTIONS))
        packed = [
            packb(self.plain(member, (path, "member", None), run, depth), None, PACK_OPTIONS)
            for member in value
        ]
        return Ext(SET if kind is set else FROZENSET, pack_set(packed))

    def _plain_registered(
        self, value: Any, path: _Path, registration: Registration, run: int, depth: int
    ) -> Ext:
        try:
            stored = registration.encode(value)
        except Exception as error:
            reason = f"encode of registered type {shown(registration.name)} raised {failure(error)}"
        else:
            plain = self.plain(stored, (path, "object", None), run, depth)
            return Ext(REGISTERED, packb([registration.name, plain], None, PACK_OPTIONS))
        raise _refusal(path, reason)


def _check_text(text: str, path: _Path) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        reason = "the text holds a lone surrogate (U+D800 to U+DFFF), which UTF-8 cannot express"
    else:
        return
    raise _refusal(path, reason)


def _refusal(path: _Path, reason: str) -> SessionTypeError:
    return SessionTypeError(f"{_rendered(path)}: {reason}")


def _rendered(path: _Path | None) -> str:
    """As one would write it: session["cart"][3].photo. Keys that are str or an index, no values."""
    steps: list[str] = []
    field = False
    here = path
    outward: list[_Path] = []
    while here is not None:
        outward.append(here)
        here = here[0]
    for _, step, key in reversed(outward):
        if step == "key":
            steps.append(f"session[{shown(key)}]")
        elif step == "member":
            steps.append("[<member>]")
        elif step == "index" and isinstance(key, str):
            named = field and key.isidentifier() and len(key) <= _SHOWN_CHARACTERS
            steps.append(f".{key}" if named else f"[{shown(key)}]")
        elif step == "index":
            steps.append(f"[<{key.__qualname__} key>]" if isinstance(key, type) else f"[{key}]")
        field = step == "object"
    text = "".join(steps)
    return text if len(text) <= 400 else f"{text[:200]} … {text[-200:]}"


def shown(key: object, characters: int = _SHOWN_CHARACTERS) -> str:
    """A key in double quotes, shortened, harmless in any log."""
    if not isinstance(key, str):
        return f"<{type(key).__qualname__} key>"
    text = key if len(key) <= characters else f"{key[: characters - 1]}…"
    return json.dumps(text, ensure_ascii=not text.isprintable())


# -- words for errors ------------------------------------------------------------------------------


def why_not(cls: type) -> str:
    """Why an object of `cls` cannot be stored and what to do: never a word of the object itself."""
    title = cls.__qualname__
    if cls in (bytearray, memoryview):
        return f"{title} would come back as bytes; use bytes"
    if cls in DISGUISED:
        return f"ormsgpack.{title} is not a session type; give the value itself"
    if issubclass(cls, Flag):
        codec = f", encode=lambda flags: flags.value, decode={title}"
    elif issubclass(cls, Enum) or dataclasses.is_dataclass(cls):
        codec = ""
    elif issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return (
            f"{title} is a namedtuple, which is more than a tuple; use a tuple, or "
            f"gridsession.register_type({title}, encode=list, decode={title}._make)"
        )
    else:
        codec = ", encode=…, decode=…"
        # The nearest one: datetime before date.
        base = next((base for base in cls.__mro__[1:] if base in BUILT_IN), None)
        if base is not None:
            return (
                f"{title} would come back as {base.__name__}; use {base.__name__}, or "
                f"gridsession.register_type({title}{codec})"
            )
    return (
        f"{title} is not a session type; register it with gridsession.register_type({title}{codec})"
    )


def failure(error: Exception) -> str:
    """What an application's codec raised, and where: its text could hold the session's values."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    title = type(error).__qualname__
    if trace is None or trace.tb_frame.f_globals.get("__name__", "").startswith("gridsession."):
        return title
    return f"{title} at {PurePath(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
