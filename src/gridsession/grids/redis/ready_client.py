"""The server that a ready redis-py client leads to."""

from __future__ import annotations

from typing import Any

from gridsession.errors import SettingsError
from gridsession.grids.redis.server import Credentials, Server, asked
from gridsession.grids.redis.tls import Tls
from gridsession.sources.address_parts import shown_host


def server_of(client: Any) -> Server:
    """Where a `redis.asyncio.Redis` leads and how it gets in; the client itself is not used.

    Its addresses, credentials (or credential provider), TLS options, database, name and
    `socket_connect_timeout` are taken over; its time-outs, retries and pool are not: calls are
    bounded by `grid_timeout`, and a worker has one connection.

    Raises:
        SettingsError: it is no such client; it leads to a Cluster or by way of Sentinels.
    """
    pool: Any = getattr(client, "connection_pool", None)
    options = getattr(pool, "connection_kwargs", None)
    if not isinstance(options, dict):
        raise SettingsError(
            f"client=<{type(client).__name__}> cannot be used: it must be a redis.asyncio.Redis "
            "for a single server"
        )
    if "connection_pool" in options or hasattr(pool, "sentinel_manager"):
        raise SettingsError(
            "client: it finds its server by Sentinels, for which this release of gridsession has "
            "no grid yet; hand in a client for a single server"
        )
    provider = options.get("credential_provider")
    username, password = options.get("username"), options.get("password")

    def named() -> Credentials:
        return username, password

    credentials = None
    if provider is not None:
        credentials = asked(provider)
    elif username is not None or password is not None:
        credentials = named
    hidden = "" if credentials is None else "***@"
    db = int(options.get("db") or 0)
    path = options.get("path")
    connection = pool.make_connection()
    context = getattr(connection, "ssl_context", None)
    tls = None if context is None else Tls(context.get)
    if path is not None:
        where = f"redis+unix://{hidden}{path}" + (f"?db={db}" if db else "")
        hosts: tuple[tuple[str, int], ...] = ()
    else:
        hosts = ((options.get("host", "localhost"), int(options.get("port", 6379))),)
        where = f"{'redis' if tls is None else 'rediss'}://{hidden}{shown_host(*hosts[0])}/{db}"
    return Server(
        where=where,
        hosts=hosts,
        socket_path=path,
        tls=tls,
        credentials=credentials,
        db=db,
        client_name=options.get("client_name"),
        connect_timeout=options.get("socket_connect_timeout"),
    )
