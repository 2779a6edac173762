"""A Redis from a URL, or from the specification's list of gateways.

URLs, with the option names of redis-py's `from_url`:

    redis://[user:password@]host[:6379][/db]             rediss:// with TLS
    redis+unix://[user:password@]/path/to.sock[?db=0]
    redis+sentinel://[user:password@]h1[:26379],h2/service[/db]   rediss+sentinel:// with TLS
    redis+cluster://[user:password@]h1[:6379],h2         rediss+cluster:// with TLS

redis-py has no URL for Sentinel and Cluster; docket, Prefect and rustis write them so, TLS in the
scheme. It holds for the Sentinels too. Credentials before the @ are the data nodes'; those of the
Sentinels are `sentinel_username` and `sentinel_password`.

Gateways: `bootstrapGateways=h1:6379,h2:6379;useSecure=false;maxPoolSize=16;maxRequestRetries=2`,
keys in any case, beside them the URLs' options: `;username=shop;password=…;ssl_ca_certs=/ca.pem`.
Values are percent-encoded in both forms.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gridsession.errors import SettingsError
from gridsession.sources.address_parts import (
    ENCODE,
    bool_of,
    decoded,
    has_surrogates,
    number_of,
    parse_hosts,
    wrong,
)
from gridsession.sources.redis_address import (
    MAX_NUMBER,
    OPTIONS,
    SENTINEL_OPTIONS,
    Kind,
    RedisAddress,
    checked_path,
    make_address,
)

PORT = 6379
SENTINEL_PORT = 26379
_OTHER_VENDORS_PORT = 721  # of the grid that the specification was written for


# -- schemes and options ------------------------------------------------------------------------


class _Scheme(NamedTuple):
    kind: Kind
    tls: bool
    example: str


SCHEMES: Mapping[str, _Scheme] = {
    "redis": _Scheme("standalone", False, "redis://host:6379/0"),
    "rediss": _Scheme("standalone", True, "rediss://host:6379/0"),
    "redis+unix": _Scheme("standalone", False, "redis+unix:///run/redis.sock"),
    "redis+sentinel": _Scheme("sentinel", False, "redis+sentinel://h1:26379,h2:26379/mymaster"),
    "rediss+sentinel": _Scheme("sentinel", True, "rediss+sentinel://h1:26379,h2:26379/mymaster"),
    "redis+cluster": _Scheme("cluster", False, "redis+cluster://h1:6379,h2:6379"),
    "rediss+cluster": _Scheme("cluster", True, "rediss+cluster://h1:6379,h2:6379"),
}
# Lower case: keys of a connection string have none.
GATEWAY_KEYS = {
    key.lower(): key
    for key in ("bootstrapGateways", "useSecure", "maxPoolSize", "maxRequestRetries")
}
_MAY_BE_EMPTY = ("password", "sentinel_password")  # of a user who needs none
# Options that redis-py or others know, and what stands for them here.
_INSTEAD = {
    "protocol": "remove it: RESP3 is always used",
    "ssl": "the scheme says it: rediss://, rediss+sentinel://, rediss+cluster://",
    "tls": "the scheme says it: rediss://, rediss+sentinel://, rediss+cluster://",
    "socket_timeout": "remove it: the setting grid_timeout bounds every call",
    "timeout": "remove it: the setting grid_timeout bounds every call",
    "max_connections": "remove it: one multiplexed connection per node is used",
    "retry_on_timeout": "remove it: retries follow the setting grid_timeout",
    "health_check_interval": "remove it: connections are watched anyway",
    "socket_keepalive": "remove it: connections are watched anyway",
    "decode_responses": "remove it: records are bytes",
    "service_name": "write the service after the hosts: redis+sentinel://h1,h2/mymaster",
}


# -- URLs ---------------------------------------------------------------------------------------


def parse_url(scheme: str, rest: str) -> RedisAddress:
    """A Redis from a URL.

    Args:
        scheme: one of `SCHEMES`.
        rest: what follows its colon.

    Raises:
        SettingsError: names the part that is wrong and what to write, and shows none of it.
    """
    kind, tls, example = SCHEMES[scheme]
    if not rest.startswith("//"):
        raise wrong(f"two slashes follow {scheme}:, as in {example}")
    rest = rest[2:]
    if "#" in rest:
        raise wrong(f"a # has no place in it; {ENCODE}")
    if has_surrogates(rest):
        raise wrong("it is not UTF-8; percent-encode each byte")
    authority = re.split(r"[/?]", rest, maxsplit=1)[0]
    path, _, query = rest[len(authority) :].partition("?")
    if "@" in path or "@" in query:
        # What was taken for host, port or db may be the first half of a password.
        raise wrong(f"an @ stands behind the first / or ?, where it is written %40; {ENCODE}")
    userinfo, at, places = authority.rpartition("@")
    options = _named(_pairs(query), (*OPTIONS, *SENTINEL_OPTIONS), "after the ?")
    username, password = _credentials(userinfo if at else None, options)
    if scheme == "redis+unix":
        return make_address(
            kind, options, username=username, password=password, socket_path=_socket(places, path)
        )
    if not places:
        raise wrong(f"the host is missing; write {example}")
    if kind == "standalone" and "," in places:
        raise wrong(
            "more than one host; write redis+sentinel:// or redis+cluster:// for several, or "
            f"encode the commas of a password as %2C; {ENCODE}"
        )
    hosts = parse_hosts(places, SENTINEL_PORT if kind == "sentinel" else PORT)
    service, number = _service(path, example) if kind == "sentinel" else (None, path[1:])
    if number and "db" in options:
        raise wrong("db is named twice: after the host and as the option db; keep one")
    if number:
        options["db"] = number
    return make_address(
        kind,
        options,
        hosts=hosts,
        tls=tls,
        username=username,
        password=password,
        service=service,
    )


def _credentials(userinfo: str | None, options: dict[str, str]) -> tuple[str | None, str | None]:
    """User and password, from before the @ or from the options that they are taken out of."""
    username, password = options.pop("username", None), options.pop("password", None)
    if userinfo is not None:
        user, colon, secret = userinfo.partition(":")
        if not colon and userinfo:
            raise wrong(
                "no ':' stands before the @; write :password@ or user:password@ (user:@ for a "
                "user who needs no password)"
            )
        if not user and not secret:
            raise wrong("user and password before the @ are empty; write them, or remove the @")
        for name, before, option in (
            ("username", user, username),
            ("password", secret, password),
        ):
            if before and option is not None:
                raise wrong(f"{name} is named twice: before the @ and as an option; keep one")
        username = decoded("the user before the @", user) if user else username
        if password is None:
            password = decoded("the password before the @", secret)
    if username is not None and password is None:
        raise wrong("username needs a password; add password=…, empty for a user without one")
    if username is None and password == "":
        raise wrong("password is empty; write it, or remove the option")
    return username, password


def _socket(places: str, path: str) -> str:
    if places or not path.strip("/") or path.endswith("/"):
        raise wrong(
            "the socket's path must be absolute, with three slashes or a / after the @: "
            f"redis+unix:///run/redis.sock; {ENCODE}"
        )
    return checked_path("the socket's path", decoded("the socket's path", path))


def _service(path: str, example: str) -> tuple[str, str]:
    """The service's name and the number of the database, as text; empty where there is none."""
    name, _, number = path[1:].partition("/")
    if not name:
        raise wrong(f"the service is missing; write its name after the hosts: {example}")
    name = decoded("the service", name)
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):  # as Redis checks it
        raise wrong(f"the service may have letters, digits, '.', '-' and '_' only; {ENCODE}")
    if name.isdigit():
        raise wrong(f"a number stands where the service does; write {example}/0 for a db")
    return name, number


# -- gateways -----------------------------------------------------------------------------------


def parse_gateways(connection_string: str) -> RedisAddress:
    """A Redis from `bootstrapGateways=h1:6379,h2:6379;useSecure=false;…`.

    Raises:
        SettingsError: names the key that is wrong and what to write, and shows no value.
    """
    if has_surrogates(connection_string):
        raise wrong("it is not UTF-8; percent-encode each byte")
    segments = [part.partition("=") for part in connection_string.split(";") if part.strip()]
    pairs = [
        (name.strip().lower(), value.strip() if equals else None)
        for name, equals, value in segments
    ]
    for name, value in pairs:
        if value and value[0] in "'\"":
            what = GATEWAY_KEYS.get(name) or (name if name in OPTIONS else "a value")
            raise wrong(f'{what} is in quotes; remove them, and write ; as %3B, " as %22')
    options = _named(pairs, (*GATEWAY_KEYS, *OPTIONS), "between the semicolons", GATEWAY_KEYS)
    if "bootstrapgateways" not in options:
        raise wrong("bootstrapGateways is missing; write bootstrapGateways=h1:6379,h2:6379")
    gateways = ",".join(map(str.strip, options.pop("bootstrapgateways").split(",")))
    if "@" in gateways:
        raise wrong("bootstrapGateways has an @; write ;username=…;password=… instead")
    hosts = parse_hosts(gateways, PORT, cure="write bootstrapGateways=h1:6379,h2:6379")
    tls = bool_of(options.pop("usesecure", "false"))
    if tls is None:
        raise wrong("useSecure: write true or false")
    notes = []
    for key, least, why in (
        ("maxpoolsize", 1, "one multiplexed connection per node is used"),
        ("maxrequestretries", 0, "retries follow the setting grid_timeout"),
    ):
        text = options.pop(key, None)
        if text is None:
            continue
        if number_of(text, least, MAX_NUMBER) is None:
            raise wrong(f"{GATEWAY_KEYS[key]} must be a whole number of {least} or more")
        notes.append(f"{GATEWAY_KEYS[key]} has no effect: {why}")
    if any(port == _OTHER_VENDORS_PORT for _, port in hosts):
        notes.append(
            f"bootstrapGateways names port {_OTHER_VENDORS_PORT}, another vendor's; a Redis "
            f"listens on {PORT} unless it was told otherwise"
        )
    username, password = _credentials(None, options)
    return make_address(
        "gateways",
        options,
        hosts=hosts,
        tls=tls,
        username=username,
        password=password,
        notes=tuple(notes),
    )


# -- options ------------------------------------------------------------------------------------


def _pairs(query: str) -> list[tuple[str, str | None]]:
    # Forms read a plus as a space, URLs do not; a password must not depend on who is right.
    if "+" in query:
        raise wrong("a + stands after the ?; write %2B for a plus, %20 for a space")
    found = (part.partition("=") for part in query.split("&")) if query else ()
    return [(name, value if equals else None) for name, equals, value in found]


def _named(
    pairs: Iterable[tuple[str, str | None]],
    known: tuple[str, ...],
    where: str,
    spelled: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Options by their names, each once and with a value, decoded.

    Args:
        pairs: names and values as written; None where there is no `=`.
        known: the names that there are.
        where: they stand, in words.
        spelled: how to write a name in an error, where not as in `known`.
    """
    spelling = {name: name for name in known} | dict(spelled or {})
    found: dict[str, str] = {}
    for position, (name, value) in enumerate(pairs, 1):
        if name not in spelling:
            raise _unknown(name, f"option {position} {where}", spelling)
        shown = spelling[name]
        if name in found:
            raise wrong(f"{shown} is named twice; keep one")
        if value is None or (not value and name not in _MAY_BE_EMPTY):
            raise wrong(f"{shown} has no value; write {shown}=…, or remove it")
        found[name] = value if name == "bootstrapgateways" else decoded(shown, value)
    return found


def _unknown(name: str, part: str, spelling: Mapping[str, str]) -> SettingsError:
    """The error for an unknown name, unsaid: it may be half of a password with a & in it."""
    if name in _INSTEAD:
        cure = _INSTEAD[name]
        if name in ("ssl", "tls") and "usesecure" in spelling:
            cure = "write useSecure=true"
        return wrong(f"there is no option {name}; {cure}")
    near = difflib.get_close_matches(name.strip().lower()[:64], spelling, n=1)
    cure = f"did you mean {spelling[near[0]]}? " if near else ""
    return wrong(
        f"{part} is unknown; {cure}There are: {', '.join(spelling.values())}. In a password, "
        "& is %26 and ; is %3B"
    )
