"""Every option with its unit, its default, its check and its reason: one frozen object."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

from gridsession.access import Access, AccessKind, AccessRules, Use
from gridsession.errors import SettingsError
from gridsession.identity import SameSite, default_cookie_name
from gridsession.sources.connection_string import Address, RedisAddress, parse, redacted
from gridsession.sources.environment import read_environment
from gridsession.sources.files import read_files
from gridsession.sources.given import FrameworkSettings, Given, Source
from gridsession.sources.installed import installed_grids
from gridsession.sources.keys import EncryptionKey, Keys
from gridsession.sources.kinds import (
    Choice,
    Flag,
    Kind,
    Names,
    Seconds,
    Text,
    Whole,
    checked,
    wrong,
)
from gridsession.sources.resolve import resolve, set_by

_DAY = 86_400.0
MAX_TIMEOUT = 3650 * _DAY  # seconds
_DEFAULT_TIMEOUT = 1200.0  # ASP.NET: 20 minutes
_SHORT_TIMEOUT = 60.0  # seconds; below, somebody may have meant minutes
_MIN_RENEWAL = 0.01  # seconds between two renewals of a lease
_TOKEN = re.compile(r"[A-Za-z0-9!#$&^_.~-]+")
_NOT_IN_PATH = re.compile(r"[;,?#\"\s\x00-\x1f\x7f]|[^\x00-\x7f]")
# No scheme, port, path or quotes: browsers drop such a cookie without a word.
_DOMAIN = re.compile(r"\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

Time = float | timedelta
ClientCacheType = Literal["LRU", "Random", "LRU-MaxMemory", "Random-MaxMemory"]


class SessionOptions(TypedDict, total=False):
    """What `SessionSettings.load` and the middlewares take as keywords, for type checkers."""

    connection_string: str
    connection_string_environment_variable: str
    connection_string_app_setting: str
    connection_string_element: str
    namespace: str | None
    remote_stores: str | list[str] | tuple[str, ...]
    timeout: Time
    absolute_timeout: Time | None
    regenerate_expired_session_id: bool
    handle_session_end: bool
    access: str | Mapping[str, str]
    allow_concurrent_requests_per_session: bool
    session_cookie: str | None
    max_age: int | None
    path: str
    domain: str | None
    same_site: SameSite
    https_only: bool
    partitioned: bool
    rolling: bool
    lock_lease: Time
    lock_wait_timeout: Time
    execution_timeout: Time
    request_queue_limit_per_session: int
    client_cache_type: ClientCacheType
    client_cache_capacity: int
    client_cache_coherency_interval: Time
    max_payload_bytes: int
    compression_enabled: bool
    encryption_keys: str | list[str] | tuple[str, ...]
    grid_timeout: Time
    sweep_interval: Time
    if_unreachable_at_start: Literal["serve", "fail"]
    if_grid_unavailable: Literal["fail", "read_cached"]


@dataclass(frozen=True, kw_only=True, repr=False)
class SessionSettings:
    """What an operator can set. Times are seconds, or `timedelta`.

    Made from arguments alone; `load` looks everywhere else, too, where an option may be set.

    Args:
        connection_string: which grid. `embedded:` (default) shares sessions between the workers
            of one machine; `embedded:///path?max_size=512MiB&durable=true` says where and how
            large; `redis://host:6379/0`, `rediss://…` with TLS and `redis+unix://…` share them
            between machines; `memory://` keeps them in one process. `load` also takes it from a
            place that you name.
        namespace: sets the sessions of several applications on one grid apart. By default the path
            under which the application knows to be mounted, else `/`; never a request's. FastAPI
            knows one by its argument `root_path`, which it now advises against: name one here.
        remote_stores: names of other sites' grids, asked in this order for a session that is not
            found here. Checked and kept; does not act yet.
        timeout: idle seconds after which a session expires (1200; ASP.NET: 20 minutes). A
            positive `max_age` given without it sets it.
        absolute_timeout: seconds after which a session expires however much it is used; None.
        regenerate_expired_session_id: True, always. An id that the grid does not know is never
            adopted: whoever planted it in a browser would know the session's id.
        handle_session_end: keep what a session held when it ends, for `on_session_end`. Checked
            and kept; does not act yet.
        access: `exclusive` (default), `concurrent` (written without waiting; changes are merged
            key by key at the end), `read_only`, `read_only wait_for_writer` or `none`; or rules by
            path, the first that matches: `{"GET /catalog/*": "read_only", "/static/*": "none"}`,
            where what no rule matches is exclusive.
        allow_concurrent_requests_per_session: what no rule of `access` names is concurrent and not
            exclusive. A rule that says exclusive stays so.
        session_cookie: the cookie's name; by default `__Host-session` when `https_only` is on,
            `path` is `/` and there is no `domain`, else `session`.
        max_age: seconds that a browser keeps the cookie; None (default) until it is closed. Zero
            and negative numbers make it forget at once.
        path: where below the site's root the browser sends the cookie to (`/`).
        domain: where else than to its own host the browser sends the cookie to; None: nowhere.
        same_site: `lax` (default), `strict` or `none`: whether a browser sends the cookie with
            requests that another site makes it send. No protection against CSRF by itself.
        https_only: send the cookie over HTTPS only. Off, for development; set it in production.
        partitioned: keep the cookie apart for each site that embeds this one (needs https_only).
        rolling: send the cookie with each response whose request used the session and was
            exclusive, or concurrent and changed something, so that `max_age` counts from the last
            such use; otherwise only when it is new, rotated or removed.
        lock_lease: seconds that a lock outlives its worker's death (15; renewed at a third).
        lock_wait_timeout: seconds that a request waits for its turn (30).
        execution_timeout: seconds after which a lock is not renewed any more, because its
            handler hangs (110, as ASP.NET's).
        request_queue_limit_per_session: how many may wait for one session, over all workers (50,
            as ASP.NET's).
        client_cache_type: which sessions leave a worker's client cache when it is full: those not
            used for longest (`LRU`, default) or any (`Random`), by their number or, with
            `-MaxMemory` after it, by their size. On `memory:` and `embedded:` there is no client
            cache: a read is cheaper than a look-up.
        client_cache_capacity: how many sessions a worker's client cache holds, or with
            `-MaxMemory` how many times 2²⁰ bytes of them as they are stored (100, as the
            specification's); 0 for none.
        client_cache_coherency_interval: seconds (0) that what a read_only request sees may be
            older than the grid, without the grid being asked; 0: each read asks whether what is
            kept is still the newest. All other requests ask always.
        max_payload_bytes: how large a session's stored bytes may be (1 MiB): one request that
            stores without end is not to fill the grid.
        compression_enabled: store sessions of 1 KiB and more compressed by zstd, where that makes
            them smaller. Compressed ones are read whether it is on or not. Needs
            `gridsession[compression]` before Python 3.14.
        encryption_keys: keys, such as `gridsession new-key` prints, to encrypt sessions with in
            the grid; the first encrypts, all decrypt. `plain` first writes them unencrypted still,
            `plain` later only reads such ones. By default sessions are not encrypted. A secret:
            give it by the environment, or a file that nobody else reads. Needs
            `gridsession[encryption]`; docs/encryption.md says how to begin and to change keys.
        grid_timeout: seconds within which the grid must have answered (1).
        sweep_interval: seconds between two looks for expired sessions, in each worker (5).
        if_unreachable_at_start: `serve` (default): start, answer 503 until the grid is there;
            `fail`: do not start. One recycled worker would then stop all others.
        if_grid_unavailable: `fail` (default): requests get 503; `read_cached`: in an outage,
            read_only requests get the last version that this worker knows, until its deadline, and
            `session.is_stale` is True then.

    Raises:
        SettingsError: a value is of the wrong kind or out of range; says which, and what to use.
    """

    connection_string: Annotated[str, Text()] = field(default="embedded:", repr=False)
    namespace: Annotated[str | None, Text(optional=True)] = None
    remote_stores: Annotated[str | list[str] | tuple[str, ...], Names()] = ()
    timeout: Annotated[Time, Seconds(0, MAX_TIMEOUT)] = _DEFAULT_TIMEOUT
    absolute_timeout: Annotated[Time | None, Seconds(0, MAX_TIMEOUT, optional=True)] = None
    regenerate_expired_session_id: Annotated[bool, Flag()] = True
    handle_session_end: Annotated[bool, Flag()] = False
    access: Annotated[str | Mapping[str, str], AccessKind()] = "exclusive"
    allow_concurrent_requests_per_session: Annotated[bool, Flag()] = False
    session_cookie: Annotated[str | None, Text(optional=True)] = None
    max_age: Annotated[int | None, Whole(of="seconds", optional=True)] = None
    path: Annotated[str, Text()] = "/"
    domain: Annotated[str | None, Text(optional=True)] = None
    same_site: Annotated[SameSite, Choice(("lax", "strict", "none"))] = "lax"
    https_only: Annotated[bool, Flag()] = False
    partitioned: Annotated[bool, Flag()] = False
    rolling: Annotated[bool, Flag()] = False
    lock_lease: Annotated[Time, Seconds(3 * _MIN_RENEWAL, 3600)] = 15.0
    lock_wait_timeout: Annotated[Time, Seconds(0, 3600)] = 30.0
    execution_timeout: Annotated[Time, Seconds(0, _DAY)] = 110.0
    request_queue_limit_per_session: Annotated[int, Whole(1)] = 50
    client_cache_type: Annotated[
        ClientCacheType, Choice(("LRU", "Random", "LRU-MaxMemory", "Random-MaxMemory"))
    ] = "LRU"
    client_cache_capacity: Annotated[int, Whole(0)] = 100
    client_cache_coherency_interval: Annotated[Time, Seconds(0, _DAY, or_equal=True)] = 0.0
    max_payload_bytes: Annotated[int, Whole(64, of="bytes")] = 1 << 20
    compression_enabled: Annotated[bool, Flag()] = False
    encryption_keys: Annotated[
        str | list[str] | tuple[str, ...] | tuple[EncryptionKey | str, ...], Keys()
    ] = field(default=(), repr=False)
    grid_timeout: Annotated[Time, Seconds(0, 60)] = 1.0
    sweep_interval: Annotated[Time, Seconds(0, 3600)] = 5.0
    if_unreachable_at_start: Annotated[Literal["serve", "fail"], Choice(("serve", "fail"))] = (
        "serve"
    )
    if_grid_unavailable: Annotated[
        Literal["fail", "read_cached"], Choice(("fail", "read_cached"))
    ] = "fail"

    _places: Mapping[str, str] = field(default_factory=dict, init=False, compare=False)
    _said: tuple[str, ...] = field(default=(), init=False, compare=False)
    _files: tuple[str, ...] = field(default=(), init=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        # "is": who says 1200 means it.
        if self.timeout is _DEFAULT_TIMEOUT and isinstance(self.max_age, int) and self.max_age > 0:
            put(self, "timeout", float(min(self.max_age, MAX_TIMEOUT)))
            put(self, "_places", {"timeout": "max_age"})
        for name, kind in KINDS.items():
            put(self, name, checked(kind, name, getattr(self, name)))
        if not self.regenerate_expired_session_id:
            raise SettingsError(
                "regenerate_expired_session_id=False cannot be used: a session id that the grid "
                "does not know is never adopted, for whoever planted it in a browser would know "
                "the id of what its user stores; leave it out",
                option="regenerate_expired_session_id",
            )
        if self.namespace is not None and not _is_text(self.namespace):
            raise wrong("namespace", self.namespace, "text without lone surrogates")
        self._check_cookie()
        self.access_rules()
        self.address()

    def _check_cookie(self) -> None:
        name = self.cookie_name
        if not _TOKEN.fullmatch(name):
            raise wrong("session_cookie", name, "a cookie name: letters, digits and -_.!#$&^~")
        if not self.path.startswith("/") or _NOT_IN_PATH.search(self.path):
            raise wrong(
                "path",
                self.path,
                "a path that begins with '/', without ';', ',', '?', '#', quotes and spaces",
            )
        if self.domain is not None and not _DOMAIN.fullmatch(self.domain):
            raise wrong("domain", self.domain, "a host's name alone, such as shop.example")
        if name.startswith("__Host-") and not (
            self.https_only and self.path == "/" and self.domain is None
        ):
            raise SettingsError(
                f"session_cookie {name!r}: browsers refuse a __Host- cookie unless https_only is "
                "on, path is '/' and no domain is set",
                option="session_cookie",
            )
        if name.startswith("__Secure-") and not self.https_only:
            raise SettingsError(
                f"session_cookie {name!r}: browsers refuse it without https_only",
                option="session_cookie",
            )
        for option, why in (("partitioned", self.partitioned), ("same_site", self.same_site)):
            if why in (True, "none") and not self.https_only:
                raise SettingsError(
                    f"{option}={why!r}: browsers refuse such a cookie unless https_only is on",
                    option=option,
                )

    # -- where it comes from --------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str] = os.environ,
        *,
        framework: FrameworkSettings | None = None,
        options: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> SessionSettings:
        """Settings from everywhere that an option may be set.

        The strongest first: arguments; the framework's own settings; the environment,
        `GRIDSESSION_TIMEOUT` for `timeout`; TOML; web.config. What none of them sets has its
        default. An empty environment variable sets nothing.

        Args:
            path: a TOML file, whose keys are options, or a web.config. By default the file that
                `GRIDSESSION_CONFIG` names, else `gridsession.toml`, or `[tool.gridsession]` in
                `pyproject.toml`, and `web.config`, each from the working directory.
            environ: the environment.
            framework: the framework's settings.
            options: arguments as a mapping, for the cookie's `path`, whose name is taken here.
            **arguments: options; and instead of `connection_string`, one of
                `connection_string_environment_variable`, `connection_string_app_setting` and
                `connection_string_element`, the name under which it is found in the environment, in
                the framework's settings or a file's `app_settings`, in a file's
                `connection_strings`.

        Raises:
            SettingsError: as for the constructor, and for an option that there is not; names the
                place where it was set.
        """
        given: dict[str, Any] = {**(options or {}), **arguments}
        ours = {name: Given(value, "") for name, value in given.items()}
        sources = [
            Source("arguments", ours, has_tables=False),
            *([framework.read()] if framework is not None else []),
            read_environment(environ),
            *read_files(path, environ),
        ]
        values, notes = resolve(sources, KINDS, environ)
        winners: dict[str, Any] = {name: value for name, (value, _) in values.items()}
        try:
            settings = cls(**winners)
        except SettingsError as error:
            if error.option not in values:
                raise
            raise set_by(values[error.option].place, error) from None
        put = object.__setattr__
        places = {name: place for name, (_, place) in values.items()}
        put(settings, "_places", {**settings._places, **places})
        put(settings, "_said", tuple(notes))
        put(settings, "_files", tuple(source.file for source in sources if source.file))
        return settings

    def origin(self, option: str) -> str:
        """Where an option was set, in words: `argument`, `environment variable GRIDSESSION_…`,
        `gridsession.toml: timeout`, another option that sets it; `default` where it was not.
        """
        place = self._places.get(option)
        if place is None:
            return "default" if getattr(self, option) == _DEFAULTS[option] else "argument"
        return place or "argument"

    @property
    def files(self) -> tuple[str, ...]:
        """The files that were read for these settings, the strongest first."""
        return self._files

    @property
    def notes(self) -> list[str]:
        """What an operator should know of these settings: logged as warnings at the start."""
        notes = [*self._said, *self.address().notes]
        if (timeout := seconds(self.timeout)) < _SHORT_TIMEOUT:
            notes.append(
                f"timeout={timeout:g} means seconds, where ASP.NET counts minutes; if minutes are "
                f"meant, set {timeout * 60:g}"
            )
        if self.namespace is None and isinstance(self.address(), RedisAddress):
            notes.append(
                "namespace is not set, and this grid may be shared: applications without one see "
                "each other's sessions; give each its own"
            )
        if not self.client_cache_capacity:
            notes += [
                f"{option}={value!r} has no effect with client_cache_capacity=0, for then nothing "
                "is kept in the worker; set a capacity, or leave it out"
                for option in _OF_THE_CACHE
                if (value := getattr(self, option)) != _DEFAULTS[option]
            ]
        notes += [
            f"{option} is set and does not act yet in this release: {instead}"
            for option, instead in _NOT_YET.items()
            if getattr(self, option) != _DEFAULTS[option]
        ]
        return notes

    # -- worked out -----------------------------------------------------------------------

    @property
    def cookie_name(self) -> str:
        """The cookie's name after its default is worked out."""
        if self.session_cookie is not None:
            return self.session_cookie
        return default_cookie_name(https_only=self.https_only, path=self.path, domain=self.domain)

    def access_rules(self) -> AccessRules:
        """The access option, ready to be asked.

        With `allow_concurrent_requests_per_session`, what is exclusive by default is concurrent.
        """
        default, rules = Use(Access.EXCLUSIVE), self.access
        if isinstance(rules, str):
            default, rules = Use.parse(rules), {}
        if self.allow_concurrent_requests_per_session and default.access is Access.EXCLUSIVE:
            default = Use(Access.CONCURRENT)
        return AccessRules(default, rules)

    def address(self) -> Address:
        """The connection string, taken apart."""
        return parse(self.connection_string, offered=installed_grids)

    def __repr__(self) -> str:
        shown = (
            f"{name}={redacted(value) if name == 'connection_string' else value!r}"
            for name in KINDS
            if (value := getattr(self, name)) != _DEFAULTS[name]
        )
        return f"SessionSettings({', '.join(shown)})"


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def seconds(value: float | timedelta) -> float:
    """A time option as seconds."""
    return value.total_seconds() if isinstance(value, timedelta) else float(value)


KINDS: Mapping[str, Kind] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(SessionSettings, include_extras=True).items()
    if not name.startswith("_")
}
"""What each option may be, by its name."""

_DEFAULTS = {option.name: option.default for option in fields(SessionSettings)}
_OF_THE_CACHE = ("client_cache_coherency_interval", "if_grid_unavailable")
_NOT_YET = {  # and what happens instead
    "remote_stores": "a session that is not found here is a new one",
    "handle_session_end": "nothing is kept when a session ends",
}
