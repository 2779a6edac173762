"""Where a Redis is and how to get in, and what its options may say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from gridsession.sources.address_parts import (
    ENCODE,
    Hosts,
    bool_of,
    number_of,
    shown_host,
    wrong,
)

Kind = Literal["standalone", "sentinel", "cluster", "gateways"]
MAX_NUMBER = 2**31 - 1  # what Redis reads of a db; how many it has, only the server knows
MAX_CONNECT_TIMEOUT = 3600.0  # seconds
MAX_REPLICAS = 1000


@dataclass(frozen=True, kw_only=True, repr=False)
class RedisAddress:
    """Where a Redis is and how to get in.

    Attributes:
        kind: what stands behind the hosts: one server, Sentinels, nodes of a cluster; or
            gateways, asked in order, of which the first that answers says which it is.
        hosts: names and ports; empty where there is a socket.
        tls: connections are encrypted, and the certificate is always checked.
        socket_path: of a UNIX socket; None where there are hosts.
        username, password: for the servers that keep data.
        db: number of the database; 0 for a cluster.
        service: the name under which the Sentinels watch the server.
        ssl_ca_certs, ssl_certfile, ssl_keyfile: paths of PEM files; None for the system's
            authorities, and for no certificate of our own.
        ssl_check_hostname: the certificate must name the host.
        socket_connect_timeout: seconds; None for the grid's own.
        client_name: shown by CLIENT LIST.
        min_replicas: how many replicas must have a commit before it counts as stored.
        sentinel_username, sentinel_password: for the Sentinels.
        notes: what was accepted and has no effect, in words, for the operator's log.
    """

    kind: Kind
    hosts: Hosts = ()
    tls: bool = False
    socket_path: str | None = None
    username: str | None = None
    password: str | None = None
    db: int = 0
    service: str | None = None
    ssl_ca_certs: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_check_hostname: bool = True
    socket_connect_timeout: float | None = None
    client_name: str | None = None
    min_replicas: int = 0
    sentinel_username: str | None = None
    sentinel_password: str | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"RedisAddress({self.shown()!r})"

    def shown(self) -> str:
        """It without credentials and options: `redis://***@cache-1:6379/0`."""
        hosts = ",".join(shown_host(*host) for host in self.hosts)
        hidden = self.username is not None or self.password is not None
        if self.kind == "gateways":
            secure = "true" if self.tls else "false"
            db = f";db={self.db}" if self.db else ""
            return f"bootstrapGateways={hosts};useSecure={secure}{db}" + ";***" * hidden
        credentials = "***@" if hidden else ""
        if self.socket_path is not None:
            path = quote(self.socket_path, errors="surrogateescape")
            return f"redis+unix://{credentials}{path}" + (f"?db={self.db}" if self.db else "")
        scheme = "rediss" if self.tls else "redis"
        if self.kind == "standalone":
            return f"{scheme}://{credentials}{hosts}/{self.db}"
        if self.kind == "sentinel":
            return f"{scheme}+sentinel://{credentials}{hosts}/{self.service}/{self.db}"
        return f"{scheme}+cluster://{credentials}{hosts}"


# -- options ------------------------------------------------------------------------------------

_TLS_OPTIONS = (
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_check_hostname",
    "ssl_cert_reqs",
)
_TURN_ON: Mapping[Kind, str] = {
    "standalone": "write rediss://",
    "sentinel": "write rediss+sentinel://",
    "cluster": "write rediss+cluster://",
    "gateways": "write useSecure=true",
}
SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")
OPTIONS = (
    "username",
    "password",
    "db",
    *_TLS_OPTIONS,
    "socket_connect_timeout",
    "client_name",
    "min_replicas",
)


def make_address(
    kind: Kind,
    options: Mapping[str, str],
    *,
    username: str | None,
    password: str | None,
    hosts: Hosts = (),
    tls: bool = False,
    socket_path: str | None = None,
    service: str | None = None,
    notes: tuple[str, ...] = (),
) -> RedisAddress:
    """The address, its options checked against each other and one by one."""
    for name in _TLS_OPTIONS:
        if name in options and not tls:
            cure = _TURN_ON[kind] if socket_path is None else "a socket has none: remove it"
            raise wrong(f"{name} is for TLS; {cure}")
    for name in SENTINEL_OPTIONS:
        if name in options and kind != "sentinel":
            raise wrong(f"{name} is for redis+sentinel:// only; remove it")
    for name, needed in (
        ("ssl_keyfile", "ssl_certfile"),
        ("sentinel_username", "sentinel_password"),
    ):
        if name in options and needed not in options:
            raise wrong(f"{name} needs {needed}")
    if options.get("ssl_cert_reqs", "required") != "required":
        raise wrong(
            "ssl_cert_reqs can only be required: the certificate is always checked; name the "
            "authority that signed it with ssl_ca_certs"
        )
    if options.get("sentinel_password") == "" and "sentinel_username" not in options:
        raise wrong("sentinel_password is empty; write it, or remove the option")
    check = bool_of(options.get("ssl_check_hostname", "true"))
    if check is None:
        raise wrong("ssl_check_hostname: write true or false")
    db = number_of(options.get("db", "0"), 0, MAX_NUMBER)
    if db is None:
        raise wrong(f"db must be a whole number from 0 on, as in redis://host:6379/0; {ENCODE}")
    if db and kind == "cluster":
        raise wrong("db can only be 0: a cluster has no other")
    replicas = number_of(options.get("min_replicas", "0"), 0, MAX_REPLICAS)
    if replicas is None:
        raise wrong(f"min_replicas must be a whole number from 0 to {MAX_REPLICAS}")
    client_name = options.get("client_name")
    if client_name is not None and not re.fullmatch(r"[!-~]{1,100}", client_name):
        raise wrong("client_name may have up to 100 ASCII characters, no spaces among them")
    paths = {
        name: checked_path(name, options[name])
        for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
        if name in options
    }
    return RedisAddress(
        kind=kind,
        hosts=hosts,
        tls=tls,
        socket_path=socket_path,
        username=username,
        password=password,
        db=db,
        service=service,
        ssl_ca_certs=paths.get("ssl_ca_certs"),
        ssl_certfile=paths.get("ssl_certfile"),
        ssl_keyfile=paths.get("ssl_keyfile"),
        ssl_check_hostname=check,
        socket_connect_timeout=_connect_timeout(options.get("socket_connect_timeout")),
        client_name=client_name,
        min_replicas=replicas,
        sentinel_username=options.get("sentinel_username"),
        sentinel_password=options.get("sentinel_password"),
        notes=notes,
    )


def _connect_timeout(text: str | None) -> float | None:
    if text is None:
        return None
    number = float(text) if re.fullmatch(r"[0-9]{1,6}(?:\.[0-9]{1,9})?", text) else 0.0
    if not 0 < number <= MAX_CONNECT_TIMEOUT:
        raise wrong(
            "socket_connect_timeout must be a number of seconds, more than 0 and at most "
            f"{MAX_CONNECT_TIMEOUT:g}, as in 0.5"
        )
    return number


def checked_path(part: str, text: str) -> str:
    if "\0" in text:
        raise wrong(f"{part} cannot have a null character")
    return text
