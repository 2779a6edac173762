"""What values an option takes, and how text from the environment becomes one of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from gridsession.errors import SettingsError

_NO = ("", "none", "null")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_WHOLE = re.compile(r"[+-]?\d{1,18}")
_NUMBER = re.compile(r"[+-]?(\d{1,18}(\.\d{1,18})?|\.\d{1,18})")
# What may be shown of a value that is wrong, for somebody may have put a password into this option:
# plain words, and a number with its unit.
_SECRET = ("connection_string", "encryption_keys")
_HARMLESS = re.compile(r"[A-Za-z_ .,*/-]{0,40}|[+-]?[0-9][0-9 .,_]{0,20}[A-Za-z]{0,8}")


class Kind(Protocol):
    """The values of one option.

    Attributes:
        allowed: which they are, in words; completes "it must be …".
    """

    @property
    def allowed(self) -> str: ...

    def check(self, value: object) -> object:
        """The value as it is kept.

        Raises:
            ValueError: it is none of this kind; its text completes "it must be …".
        """
        ...

    def read(self, text: str) -> object:
        """The value that a text stands for, not yet checked; the text where it stands for none."""
        ...


@dataclass(frozen=True)
class Seconds:
    """A time: a number of seconds, or a `timedelta`. Kept as a float.

    Attributes:
        above, most: the range, in seconds.
        optional: None is one of the values.
        or_equal: so is `above` itself.
    """

    above: float
    most: float
    optional: bool = False
    or_equal: bool = False

    @property
    def allowed(self) -> str:
        least = f"{'at least' if self.or_equal else 'more than'} {self.above:.15g}"
        return f"{least} and at most {self.most:.15g} seconds{_or_none(self)}"

    def check(self, value: object) -> object:
        if value is None and self.optional:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float, timedelta)):
            raise ValueError(f"a number of seconds or a timedelta{_or_none(self)}")
        number = value.total_seconds() if isinstance(value, timedelta) else value
        if not self.above <= number <= self.most or (number == self.above and not self.or_equal):
            raise ValueError(self.allowed)
        return float(number)

    def read(self, text: str) -> object:
        if self.optional and text.lower() in _NO:
            return None
        return float(text) if _NUMBER.fullmatch(text) else text


@dataclass(frozen=True)
class Whole:
    """A whole number.

    Attributes:
        least: the smallest.
        of: of what, in words.
        optional: None is one of the values.
    """

    least: int | None = None
    of: str = ""
    optional: bool = False

    @property
    def allowed(self) -> str:
        least = "" if self.least is None else f", at least {self.least}"
        return f"a whole number{f' of {self.of}' if self.of else ''}{least}{_or_none(self)}"

    def check(self, value: object) -> object:
        if value is None and self.optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(self.allowed)
        if self.least is not None and value < self.least:
            raise ValueError(self.allowed)
        return value

    def read(self, text: str) -> object:
        if self.optional and text.lower() in _NO:
            return None
        return int(text) if _WHOLE.fullmatch(text) else text


@dataclass(frozen=True)
class Flag:
    """True or False."""

    allowed: str = "True or False"

    def check(self, value: object) -> object:
        if not isinstance(value, bool):
            raise ValueError(self.allowed)
        return value

    def read(self, text: str) -> object:
        lower = text.lower()
        return lower in _TRUE if lower in (*_TRUE, *_FALSE) else text


@dataclass(frozen=True)
class Text:
    """A str.

    Attributes:
        optional: None is one of the values.
    """

    optional: bool = False

    @property
    def allowed(self) -> str:
        return f"a str{_or_none(self)}"

    def check(self, value: object) -> object:
        if value is None and self.optional:
            return None
        if not isinstance(value, str):
            raise ValueError(self.allowed)
        if not value:
            raise ValueError("not empty")
        return value

    def read(self, text: str) -> object:
        return None if self.optional and text.lower() in _NO else text


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(map(repr, self.words))

    def check(self, value: object) -> object:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError(self.allowed)
        return value

    def read(self, text: str) -> object:
        lowered = {word.lower(): word for word in self.words}
        return lowered.get(text.lower(), text)


@dataclass(frozen=True)
class Names:
    """Names in an order: a sequence of str, or one str with commas. Kept as a tuple."""

    allowed: str = "names, each once: a list of str, or one str with commas between them"

    def check(self, value: object) -> object:
        if isinstance(value, str):
            value = [name.strip() for name in value.split(",")] if value.strip() else []
        if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
            raise ValueError(self.allowed)
        names = tuple(value)
        if not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(self.allowed)
        if len(set(names)) != len(names):
            raise ValueError(self.allowed)
        return names

    def read(self, text: str) -> object:
        return [] if text.lower() in _NO else text


def is_quoted(text: str) -> bool:
    """Whether quotation marks are part of a text, as `docker --env-file` takes them over."""
    return len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"


def checked(kind: Kind, name: str, value: object) -> object:
    """A value of the option `name` as it is kept.

    Raises:
        SettingsError: names the option and what is allowed, and shows the value where that cannot
            be a secret.
    """
    try:
        return kind.check(value)
    except ValueError as error:
        raise wrong(name, value, str(error)) from None


def wrong(name: str, value: object, wanted: str) -> SettingsError:
    """The error for a value that an option cannot have.

    Args:
        name: the option's.
        value: shown only where it cannot be a secret that stands in the wrong place.
        wanted: completes "it must be …".
    """
    return SettingsError(
        f"{name}={shown(name, value)} cannot be used: it must be {wanted}", option=name
    )


def shown(name: str, value: object) -> str:
    """A value for an error's text; its type alone where it may hold a secret."""
    if name in _SECRET or isinstance(value, (bytes, bytearray)):
        return f"<{type(value).__name__}>"
    if isinstance(value, str):
        return repr(value) if _HARMLESS.fullmatch(value) else f"<str of {len(value)} characters>"
    if value is None or isinstance(value, (bool, float, timedelta)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 10**18 else "<int of many digits>"
    return f"<{type(value).__name__}>"


def _or_none(kind: Seconds | Whole | Text) -> str:
    return ", or None" if kind.optional else ""
