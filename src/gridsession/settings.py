"""Every option with its unit, its default, its check and its reason: one frozen object."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypedDict

from gridsession.errors import SettingsError
from gridsession.identity import SameSite, default_cookie_name

_DAY = 86_400.0
MAX_TIMEOUT = 3650 * _DAY  # seconds
_DEFAULT_TIMEOUT = 1200.0  # ASP.NET: 20 minutes


class Access(StrEnum):
    """How a request uses its session."""

    EXCLUSIVE = "exclusive"
    """Take the lock, see the latest data, write; other exclusive requests wait their turn."""
    READ_ONLY = "read_only"
    """See what the last commit left, lock nothing; assignment raises `SessionReadOnly`."""
    NONE = "none"
    """No session and no grid call; touching the session raises `SessionNotAvailable`."""


class Use(NamedTuple):
    """An access and, for `read_only`, whether it waits for a writer that is running."""

    access: Access
    wait_for_writer: bool = False

    @classmethod
    def parse(cls, text: str) -> Use:
        """From `exclusive`, `read_only`, `read_only wait_for_writer` or `none`.

        Raises:
            SettingsError: it is none of these.
        """
        name, *flags = (text.split() if isinstance(text, str) else ()) or [""]
        if name not in set(Access) or flags not in ([], ["wait_for_writer"]):
            raise SettingsError(
                f"access {text!r} is unknown; use one of: exclusive, read_only, "
                "read_only wait_for_writer, none"
            )
        if flags and name != Access.READ_ONLY:
            raise SettingsError(f"access {text!r}: wait_for_writer goes with read_only only")
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
        if not path.startswith(("/", "*")) or (method and not method.isalpha()):
            raise SettingsError(
                f"access rule {pattern!r} is unreadable; write '/path/*' or 'GET /path/*'"
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


class SessionOptions(TypedDict, total=False):
    """The options of `SessionSettings` as keywords of a middleware, for type checkers."""

    connection_string: str
    namespace: str
    timeout: float | timedelta
    absolute_timeout: float | timedelta | None
    access: str | Mapping[str, str]
    session_cookie: str | None
    max_age: int | None
    path: str
    domain: str | None
    same_site: SameSite
    https_only: bool
    partitioned: bool
    rolling: bool
    lock_lease: float | timedelta
    lock_wait_timeout: float | timedelta
    execution_timeout: float | timedelta
    request_queue_limit_per_session: int
    max_payload_bytes: int
    grid_timeout: float | timedelta
    sweep_interval: float | timedelta
    if_unreachable_at_start: Literal["serve", "fail"]


@dataclass(frozen=True, kw_only=True, repr=False)
class SessionSettings:
    """What an operator can set. Times are seconds, or `timedelta`.

    Args:
        connection_string: which grid. `embedded:` (default) shares sessions between the workers
            of one machine; `embedded:///path?max_size=512MiB&durable=true` says where and how
            large; `memory://` keeps them in one process.
        namespace: sets the sessions of several applications on one grid apart.
        timeout: idle seconds after which a session expires (1200; ASP.NET: 20 minutes). A
            positive `max_age` given without it sets it.
        absolute_timeout: seconds after which a session expires however much it is used; None.
        access: `exclusive` (default), `read_only`, `read_only wait_for_writer` or `none`; or
            rules by path, the first that matches: `{"GET /catalog/*": "read_only", "/static/*":
            "none"}`, where what no rule matches is exclusive.
        session_cookie: the cookie's name; by default `__Host-session` when `https_only` is on,
            `path` is `/` and there is no `domain`, else `session`.
        max_age: seconds that a browser keeps the cookie; None (default) until it is closed. Zero
            and negative numbers make it forget at once.
        path, domain: where the browser sends the cookie to.
        same_site: `lax`, `strict` or `none`. None of them is a protection against CSRF.
        https_only: send the cookie over HTTPS only.
        partitioned: keep the cookie apart for each site that embeds this one (needs https_only).
        rolling: send the cookie with each response that used the session, so that `max_age`
            counts from the last use; otherwise only when it is new, rotated or removed.
        lock_lease: seconds that a lock outlives its worker's death (15; renewed at a third).
        lock_wait_timeout: seconds that a request waits for its turn (30).
        execution_timeout: seconds after which a lock is not renewed any more, because its
            handler hangs (110, as ASP.NET's).
        request_queue_limit_per_session: how many may wait for one session, over all workers (50,
            as ASP.NET's).
        max_payload_bytes: how large a session's stored bytes may be (1 MiB).
        grid_timeout: seconds within which the grid must have answered (1).
        sweep_interval: seconds between two looks for expired sessions, in each worker (5).
        if_unreachable_at_start: `serve` (default): start, answer 503 until the grid is there;
            `fail`: do not start.

    Raises:
        SettingsError: a value is of the wrong kind or out of range; says which, and what to use.
    """

    connection_string: str = field(default="embedded:", repr=False)
    namespace: str = "/"
    timeout: float | timedelta = _DEFAULT_TIMEOUT
    absolute_timeout: float | timedelta | None = None
    access: str | Mapping[str, str] = "exclusive"
    session_cookie: str | None = None
    max_age: int | None = None
    path: str = "/"
    domain: str | None = None
    same_site: SameSite = "lax"
    https_only: bool = False
    partitioned: bool = False
    rolling: bool = False
    lock_lease: float | timedelta = 15.0
    lock_wait_timeout: float | timedelta = 30.0
    execution_timeout: float | timedelta = 110.0
    request_queue_limit_per_session: int = 50
    max_payload_bytes: int = 1 << 20
    grid_timeout: float | timedelta = 1.0
    sweep_interval: float | timedelta = 5.0
    if_unreachable_at_start: Literal["serve", "fail"] = "serve"

    def __post_init__(self) -> None:
        put = object.__setattr__
        # "is": who says 1200 means it.
        if self.timeout is _DEFAULT_TIMEOUT and isinstance(self.max_age, int) and self.max_age > 0:
            put(self, "timeout", float(min(self.max_age, MAX_TIMEOUT)))
        for name, low, high in _SECONDS:
            put(self, name, _checked_seconds(name, getattr(self, name), low, high))
        for name, kinds, what in _KINDS:
            value = getattr(self, name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise _wrong(name, value, what)
        for name, choices in _CHOICES:
            if getattr(self, name) not in choices:
                raise _wrong(name, getattr(self, name), "one of " + ", ".join(map(repr, choices)))
        for name, least in _LEAST:
            if getattr(self, name) < least:
                raise _wrong(name, getattr(self, name), f"at least {least}")
        if not self.namespace:
            raise _wrong("namespace", self.namespace, "not empty")
        if seconds(self.lock_lease) <= 3 * _MIN_RENEWAL:
            raise _wrong("lock_lease", self.lock_lease, f"more than {3 * _MIN_RENEWAL} s")
        self._check_cookie()
        self.access_rules()

    def _check_cookie(self) -> None:
        name = self.cookie_name
        if not _TOKEN.fullmatch(name):
            raise _wrong("session_cookie", name, "a cookie name: letters, digits and -_.!#$&^~")
        for option in ("path", "domain"):
            value = getattr(self, option)
            if value is not None and _NOT_IN_COOKIE.search(value):
                raise _wrong(option, value, "without ';', ',', spaces and control characters")
        if not self.path.startswith("/"):
            raise _wrong("path", self.path, "a path that begins with '/'")
        if name.startswith("__Host-") and not (
            self.https_only and self.path == "/" and self.domain is None
        ):
            raise SettingsError(
                f"session_cookie {name!r}: browsers refuse a __Host- cookie unless https_only is "
                "on, path is '/' and no domain is set"
            )
        if name.startswith("__Secure-") and not self.https_only:
            raise SettingsError(f"session_cookie {name!r}: browsers refuse it without https_only")
        for option, why in (("partitioned", self.partitioned), ("same_site", self.same_site)):
            if why in (True, "none") and not self.https_only:
                raise SettingsError(
                    f"{option}={why!r}: browsers refuse such a cookie unless https_only is on"
                )

    @property
    def cookie_name(self) -> str:
        """The cookie's name after its default is worked out."""
        if self.session_cookie is not None:
            return self.session_cookie
        return default_cookie_name(https_only=self.https_only, path=self.path, domain=self.domain)

    def access_rules(self) -> AccessRules:
        """The access option, ready to be asked."""
        if isinstance(self.access, str):
            return AccessRules(Use.parse(self.access), {})
        return AccessRules(Use(Access.EXCLUSIVE), self.access)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SessionSettings:
        """Settings from keyword options whose names nobody has checked yet.

        Raises:
            SettingsError: as for the constructor, and for an unknown name.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise SettingsError(
                    f"there is no option {name!r}"
                    + (f"; did you mean {near[0]!r}?" if near else f"; there are: {known}")
                )
        return cls(**options)

    def __repr__(self) -> str:
        shown = (
            f"{f.name}={redacted(value) if f.name == 'connection_string' else value!r}"
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default
        )
        return f"SessionSettings({', '.join(shown)})"


def seconds(value: float | timedelta) -> float:
    """A time option as seconds."""
    return value.total_seconds() if isinstance(value, timedelta) else float(value)


def redacted(connection_string: str) -> str:
    """A connection string without its credentials and options, for logs and errors."""
    # A password that nobody encoded may hold any character: what ends at the last @ is hidden.
    shown = re.sub(r"^([\w+.-]*:(?://)?|).*@", r"\1***@", connection_string, flags=re.DOTALL)
    shown = re.sub(r"^([^:?;@]*=)[^;]*", r"\1***", shown)
    return re.sub(r"([?;]).*", r"\1***", shown, flags=re.DOTALL)


_MIN_RENEWAL = 0.01  # seconds between two renewals of a lease
_TOKEN = re.compile(r"[A-Za-z0-9!#$&^_.~-]+")
_NOT_IN_COOKIE = re.compile(r"[;,\s\x00-\x1f\x7f]|[^\x00-\x7f]")
_SECONDS = (  # name, more than, at most
    ("timeout", 0.0, MAX_TIMEOUT),
    ("absolute_timeout", 0.0, MAX_TIMEOUT),
    ("lock_lease", 0.0, 3600.0),
    ("lock_wait_timeout", 0.0, 3600.0),
    ("execution_timeout", 0.0, _DAY),
    ("grid_timeout", 0.0, 60.0),
    ("sweep_interval", 0.0, 3600.0),
)
_KINDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("connection_string", (str,), "a str"),
    ("namespace", (str,), "a str"),
    ("access", (str, Mapping), "a str or a mapping from path rules to str"),
    ("session_cookie", (str, type(None)), "a str, or None"),
    ("max_age", (int, type(None)), "a whole number of seconds, or None"),
    ("path", (str,), "a str"),
    ("domain", (str, type(None)), "a str, or None"),
    ("https_only", (bool,), "True or False"),
    ("partitioned", (bool,), "True or False"),
    ("rolling", (bool,), "True or False"),
    ("request_queue_limit_per_session", (int,), "a whole number"),
    ("max_payload_bytes", (int,), "a whole number of bytes"),
)
_CHOICES = (
    ("same_site", ("lax", "strict", "none")),
    ("if_unreachable_at_start", ("serve", "fail")),
)
_LEAST = (("request_queue_limit_per_session", 1), ("max_payload_bytes", 64))


def _wrong(name: str, value: object, wanted: str) -> SettingsError:
    shown = f"<{type(value).__name__}>" if name == "connection_string" else repr(value)
    return SettingsError(f"{name}={shown} cannot be used: it must be {wanted}")


def _checked_seconds(name: str, value: object, low: float, high: float) -> float | None:
    if value is None and name == "absolute_timeout":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, timedelta)):
        raise _wrong(name, value, "a number of seconds or a timedelta")
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if not low < number <= high:
        raise _wrong(name, value, f"more than {low:g} and at most {high:g} seconds")
    return float(number)
