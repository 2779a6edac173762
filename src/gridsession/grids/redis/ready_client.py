"""The server that a ready redis-py client leads to."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from typing import Any

from gridsession.errors import SettingsError
from gridsession.grids.redis.credentials import Credentials, asked
from gridsession.grids.redis.server import Server
from gridsession.grids.redis.tls import Tls, TlsOptions
from gridsession.sources.address_parts import wrong
from gridsession.sources.connection_string import RedisAddress

_CHECKS = {
    None: ssl.CERT_NONE,
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
}


def server_of(client: Any) -> Server:
    """Where a `redis.asyncio.Redis` leads and how it gets in.

    Its address, credentials (or credential provider), TLS options, database and name are taken
    over. Its time-outs, retries and pool are not: calls are bounded by `grid_timeout`, and a worker
    has one connection. The client itself is neither used nor closed, now or later.

    Args:
        client: may be a subclass of `redis.asyncio.Redis`, and have a pool of its own.

    Raises:
        SettingsError: it is no such client; it leads to a Cluster or by way of Sentinels; it
            connects in a way of its own; one of its options cannot be used.
    """
    kind, options = _configuration(client)
    path, tls = options.get("path"), None
    if kind == "TLS":
        tls = Tls(_tls_options(options))
    try:
        db = int(options.get("db") or 0)
        port = int(options.get("port") or 6379)
    except (TypeError, ValueError):
        raise wrong("db and port have to be whole numbers", "client") from None
    name = options.get("client_name")
    if name is not None and not re.fullmatch(r"[!-~]+", str(name)):
        raise wrong("client_name may have ASCII characters only, no spaces among them", "client")
    host = str(options.get("host") or "localhost")
    try:
        host.encode("idna")  # as the resolver does, which has no word for it
    except UnicodeError:
        raise wrong("host is no name that can be looked up", "client") from None
    hosts = ((host, port),) if kind != "socket" else ()
    credentials = _credentials(options)
    address = RedisAddress(
        kind="standalone",
        hosts=hosts,
        socket_path=path,
        tls=tls is not None,
        password=None if credentials is None else "",
        db=db,
    )
    return Server(
        where=address.shown(),
        hosts=hosts,
        socket_path=path,
        tls=tls,
        credentials=credentials,
        db=db,
        client_name=name,
        named_by="client",
    )


def _configuration(client: Any) -> tuple[str, Mapping[str, Any]]:
    """How it connects, `TCP`, `TLS` or by a `socket`, and its options."""
    wanted = "it must be a redis.asyncio.Redis for a single server"
    try:
        import redis.asyncio
        from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
        from redis.asyncio.sentinel import SentinelConnectionPool
    except ImportError:  # then it is none
        raise _unusable(client, wanted) from None
    if isinstance(client, redis.Redis | redis.RedisCluster):
        raise _unusable(
            client,
            "it is a synchronous one; hand in a redis.asyncio.Redis made with the same arguments, "
            "in synchronous applications too (it is only asked where it leads)",
        )
    if isinstance(client, redis.asyncio.RedisCluster):
        raise _unusable(
            client,
            "it is for a Cluster, for which this release of gridsession has no grid yet; hand in "
            "a redis.asyncio.Redis for a single server",
        )
    if not isinstance(client, redis.asyncio.Redis):
        raise _unusable(client, wanted)
    pool: Any = client.connection_pool
    if isinstance(pool, SentinelConnectionPool):
        raise _unusable(
            client,
            "it finds its server by Sentinels, for which this release of gridsession has no grid "
            "yet; hand in a client for a single server",
        )
    # Exactly: one that connects in another way, through a proxy or to nothing at all, leads to
    # another place than its options say.
    kinds: dict[Any, str] = {
        Connection: "TCP",
        SSLConnection: "TLS",
        UnixDomainSocketConnection: "socket",
    }
    kind = kinds.get(pool.connection_class)
    if kind is None:
        raise _unusable(
            client,
            f"its connections are of a class of their own, {pool.connection_class.__name__}, and "
            "what that does is not known here; use redis-py's own classes",
        )
    options: Mapping[str, Any] = pool.connection_kwargs
    if options.get("redis_connect_func") is not None:
        raise wrong(
            "redis_connect_func cannot be used: no connection of the client's is made", "client"
        )
    return kind, options


def _credentials(options: Mapping[str, Any]) -> Any:
    provider = options.get("credential_provider")
    username, password = options.get("username"), options.get("password")
    named = bool(username or password)  # as redis-py has it: empty ones are none
    if provider is not None:
        if named:
            raise wrong(
                "it names user or password, and so does credential_provider; keep one", "client"
            )
        return asked(provider)

    def credentials() -> Credentials:
        return username or None, password or ""

    return credentials if named else None


def _tls_options(options: Mapping[str, Any]) -> TlsOptions:
    given = {name: options[name] for name in options if name.startswith("ssl_")}
    checks = given.pop("ssl_cert_reqs", "required")
    try:
        required = checks if isinstance(checks, ssl.VerifyMode) else _CHECKS[checks]
        return TlsOptions(
            named_by="client",
            trusts_system=True,  # as redis-py does
            ssl_cert_reqs=required,
            ssl_include_verify_flags=tuple(given.pop("ssl_include_verify_flags", None) or ()),
            ssl_exclude_verify_flags=tuple(given.pop("ssl_exclude_verify_flags", None) or ()),
            **given,
        )
    except (KeyError, TypeError):
        raise wrong("its ssl_ options are none that gridsession knows", "client") from None


def _unusable(client: object, why: str) -> SettingsError:
    return SettingsError(f"client=<{type(client).__name__}> cannot be used: {why}")
