"""Which access a request has to its session, and the rules by path that say so."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from gridsession.errors import SettingsError
from gridsession.sources.kinds import shown

# A mistyped one would never match. (What else there is, WebDAV's, is no browser's.)
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "TRACE", "CONNECT")


class Access(StrEnum):
    """How a request uses its session."""

    EXCLUSIVE = "exclusive"
    """Take the lock, see the latest data, write; other exclusive requests wait their turn."""
    READ_ONLY = "read_only"
    """See what the last commit left, lock nothing; assignment raises `SessionReadOnly`."""
    CONCURRENT = "concurrent"
    """See what the last commit left, write without a lock; the commit merges, key by key."""
    NONE = "none"
    """No session and no grid call; touching the session raises `SessionNotAvailable`."""


class Use(NamedTuple):
    """An access and, for `read_only`, whether it waits for a writer that is running."""

    access: Access
    wait_for_writer: bool = False

    @classmethod
    def parse(cls, text: str) -> Use:
        """From `exclusive`, `concurrent`, `read_only`, `read_only wait_for_writer` or `none`.

        Raises:
            SettingsError: it is none of these.
        """
        name, *flags = (text.split() if isinstance(text, str) else ()) or [""]
        if name not in set(Access) or flags not in ([], ["wait_for_writer"]):
            raise SettingsError(
                f"access {shown('access', text)} is unknown; use one of: exclusive, concurrent, "
                "read_only, read_only wait_for_writer, none",
                option="access",
            )
        if flags and name != Access.READ_ONLY:
            raise SettingsError(
                f"access {text!r}: wait_for_writer goes with read_only only", option="access"
            )
        return cls(Access(name), bool(flags))


class AccessRules:
    """Which access a request has, by its method and path; the first rule that matches wins.

    A rule is `[METHOD ]/path`, where `*` stands for any characters, `/` among them. Paths are
    those that the application sees: without the prefix under which it is mounted.
    """

    def __init__(self, default: Use, rules: Mapping[str, str]) -> None:
        self._default = default
        self._rules = [(*self._compile(pattern), Use.parse(use)) for pattern, use in rules.items()]

    @staticmethod
    def _compile(pattern: str) -> tuple[str | None, re.Pattern[str]]:
        method, _, path = pattern.rpartition(" ") if isinstance(pattern, str) else ("", "", "")
        if not path.startswith(("/", "*")) or (method and method.upper() not in _METHODS):
            raise SettingsError(
                f"access rule {shown('access', pattern)} is unreadable; write '/path/*' or "
                f"'GET /path/*' (methods: {', '.join(_METHODS)})",
                option="access",
            )
        # Each part but the last is taken where it comes first, for good: a path that almost
        # matches a rule with several stars costs no more than one that does.
        first, *parts = map(re.escape, path.split("*"))
        last = f".*{parts.pop()}" if parts else ""
        expression = first + "".join(f"(?>.*?{part})" for part in parts) + last
        method = "GET" if method.upper() == "HEAD" else method.upper()
        return method or None, re.compile(expression, re.DOTALL)

    def use_of(self, method: str, path: str) -> Use:
        """The use that a request asks for. What is said of GET holds for HEAD."""
        if not self._rules:
            return self._default
        if method == "HEAD":
            method = "GET"
        for wanted, pattern, use in self._rules:
            if wanted in (None, method) and pattern.fullmatch(path):
                return use
        return self._default


@dataclass(frozen=True)
class AccessKind:
    """What the option `access` may be, for `gridsession.sources.kinds`."""

    allowed: str = "a str or a mapping from path rules to str"

    def check(self, value: object) -> object:
        if not isinstance(value, str | Mapping):
            raise ValueError(self.allowed)
        if isinstance(value, str) and value.lstrip().startswith("{"):
            if self.read(value) is not value:  # an argument, or a string in a file
                raise ValueError("a mapping; only the environment has rules as JSON text")
            raise ValueError(
                'a word, or rules as a JSON object, {"/path/*": "none"}, and this is no JSON object'
            )
        return value

    def read(self, text: str) -> object:
        """A word, or the rules as a JSON object."""
        if text.lstrip().startswith("{"):
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                return text
        return text
