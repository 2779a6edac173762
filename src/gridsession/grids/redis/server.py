"""Where a Redis is, how to reach it and how to get in; the same for every connection to it."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import hiredis

from gridsession.errors import GridUnavailable, SettingsError
from gridsession.grids.redis.replies import ConnectionLost, Misset, ServerReply, failure
from gridsession.grids.redis.tls import Tls
from gridsession.sources.connection_string import RedisAddress

OLDEST = (7, 0)  # sharded notices, flags of scripts, what a script may ask of its own permissions
_KEEPALIVE = (  # so that a connection on which nobody asks is not forgotten on the way
    ("TCP_KEEPIDLE", 30),
    ("TCP_KEEPINTVL", 10),
    ("TCP_KEEPCNT", 3),
)

Word = bytes | str | int | float  # of a command
# Its own annotation says that a command has one word.
pack_command: Callable[[tuple[Word, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]

Credentials = tuple[str | None, str | None]  # user, password


class CredentialProvider(Protocol):
    """Asked at each new connection: redis-py's interface, whose implementations fit.

    One that has `get_credentials_async` is asked by that.
    """

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """(user, password), or (password,)."""
        ...


class Asker(asyncio.Protocol):
    """A connection that can be asked before it is handed on."""

    def ask(self, *words: Word) -> asyncio.Future[Any]:
        """A future of the reply to a command."""
        raise NotImplementedError

    def lose(self, error: GridUnavailable) -> None:
        """End it; whoever waits for a reply is told the error."""
        raise NotImplementedError


Connection = TypeVar("Connection", bound=Asker)


@dataclass(frozen=True, kw_only=True, repr=False)
class Server:
    """Where a Redis is and how to get in.

    Attributes:
        where: it in words, without credentials, for errors and logs.
        hosts: names and ports; more than one are tried in order.
        socket_path: of a UNIX socket, instead of hosts.
        tls: None where connections are not encrypted.
        credentials: asked at each new connection for user and password; it may be asynchronous.
        db: number of the database.
        client_name: shown by CLIENT LIST.
        connect_timeout: seconds for one try to connect, the greeting included; None for as long as
            a call may take.
    """

    where: str
    hosts: tuple[tuple[str, int], ...] = ()
    socket_path: str | None = None
    tls: Tls | None = None
    credentials: Callable[[], Credentials | Awaitable[Credentials]] | None = None
    db: int = 0
    client_name: str | None = None
    connect_timeout: float | None = None

    def __repr__(self) -> str:
        return f"Server({self.where!r})"

    @classmethod
    def at(
        cls, address: RedisAddress, credential_provider: CredentialProvider | None = None
    ) -> Server:
        """The server that a connection string names.

        Args:
            credential_provider: is asked for user and password; the address names none then.

        Raises:
            SettingsError: the address names both; it is no single server's; a certificate cannot
                be read.
        """
        for kind, what in (("sentinel", "Sentinel"), ("cluster", "Cluster")):
            if address.kind == kind:
                raise _wrong(
                    f"it is well-formed, but this release of gridsession has no grid for {what} "
                    "yet; name a single server: redis://host:6379"
                )
        if address.min_replicas:
            raise _wrong(
                "min_replicas: this release does not ask replicas to confirm a commit; remove it "
                "(the server's own min-replicas-to-write is obeyed)"
            )
        named = address.username is not None or address.password is not None
        if named and credential_provider is not None:
            raise _wrong("it names user or password, and so does credential_provider; keep one")
        credentials: Callable[[], Any] | None = None
        if credential_provider is not None:
            credentials = asked(credential_provider)
        elif named:
            username, password = address.username, address.password or ""

            def credentials() -> Credentials:
                return username, password

        return cls(
            where=address.shown(),
            hosts=address.hosts,
            socket_path=address.socket_path,
            tls=Tls.of(address) if address.tls else None,
            credentials=credentials,
            db=address.db,
            client_name=address.client_name,
            connect_timeout=address.socket_connect_timeout,
        )

    async def reach(self, make: Callable[[], Connection], *, timeout: float) -> Connection:
        """A connection that is greeted and ready.

        Args:
            make: makes one that is not connected yet.
            timeout: seconds for all of it, unless the address names another.

        Raises:
            GridUnavailable: it cannot be reached now.
            Misset: it refused us, and will.
        """
        timeout = self.connect_timeout or timeout
        failed: GridUnavailable | None = None
        for place in self.hosts or (None,):
            connection = make()
            try:
                async with asyncio.timeout(timeout):
                    await self._connect(connection, place)
                    await self._greet(connection)
            except TimeoutError:
                # A server that waits for the rest of a line does not answer TLS's first words.
                hint = "; if it speaks no TLS, the scheme is redis://" if self.tls else ""
                failed = GridUnavailable(f"{self.where} did not answer within {timeout:g} s{hint}")
            except OSError as error:
                failed = unreachable(self.where, error)
            except ServerReply as error:
                failed = _unavailable(self.where, error)
            except ConnectionLost as error:
                hint = "; if it wants TLS, the scheme is rediss://" if self._may_want_tls() else ""
                failed = GridUnavailable(f"{error}{hint}")
            except GridUnavailable as error:
                failed = error
            except BaseException:
                connection.lose(GridUnavailable("given up"))
                raise
            else:
                return connection
            connection.lose(failed)
        assert failed is not None
        raise failed

    def _may_want_tls(self) -> bool:
        return self.tls is None and self.socket_path is None

    async def _connect(self, connection: asyncio.Protocol, place: tuple[str, int] | None) -> None:
        loop = asyncio.get_running_loop()
        if place is None:
            await loop.create_unix_connection(lambda: connection, self.socket_path)
            return
        host, port = place
        transport, _ = await loop.create_connection(
            lambda: connection,
            host,
            port,
            ssl=None if self.tls is None else self.tls.context(),
            server_hostname=None if self.tls is None else host,
        )
        _keep_alive(transport.get_extra_info("socket").fileno())

    async def _greet(self, connection: Asker) -> None:
        words: list[Word] = [b"HELLO", 3]
        if self.credentials is not None:
            given = self.credentials()
            user, password = await given if inspect.isawaitable(given) else given
            words += [b"AUTH", user or "default", password or ""]
        if self.client_name is not None:
            words += [b"SETNAME", self.client_name]
        try:
            server = await connection.ask(*words)
        except ServerReply as error:
            if str(error).startswith("ERR unknown command"):
                raise self._too_old("6 or older") from None
            raise
        version = server.get(b"version", b"").decode("ascii", "replace")
        numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
        if tuple(numbers) < OLDEST:
            raise self._too_old(version)
        if server.get(b"mode") == b"cluster":
            raise Misset(
                f"{self.where} is a node of a Cluster, for which this release of gridsession has "
                "no grid yet; name a single server"
            )
        if server.get(b"mode") == b"sentinel":
            raise Misset(f"{self.where} is a Sentinel, not a server that keeps data")
        if server.get(b"role") != b"master":
            raise GridUnavailable(f"{self.where} is a replica and takes no writes")
        if self.db:
            try:
                await connection.ask(b"SELECT", self.db)
            except ServerReply as error:
                if not str(error).startswith("NOPERM"):
                    raise
                raise Misset(
                    f"{self.where} does not permit its user: SELECT; without it db has to be 0"
                ) from None

    def _too_old(self, version: str) -> Misset:
        return Misset(f"{self.where} is Redis {version}; gridsession needs 7.0 or newer")


def asked(provider: CredentialProvider) -> Callable[[], Any]:
    """What a `Server` asks for credentials."""

    async def ask() -> Credentials:
        asynchronous = getattr(provider, "get_credentials_async", None)
        try:
            given = provider.get_credentials() if asynchronous is None else await asynchronous()
        except Exception as error:  # its text is another's, and may hold a password
            raise GridUnavailable(
                f"the credential provider failed: {type(error).__name__}"
            ) from None
        user, password = (None, *given) if len(given) == 1 else given
        return user, password

    return ask


def _keep_alive(descriptor: int) -> None:
    # By a descriptor of our own: uvloop hands out no socket that takes options.
    with socket.socket(fileno=os.dup(descriptor)) as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in _KEEPALIVE:
            if hasattr(socket, name):  # not on every system
                wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def _wrong(text: str) -> SettingsError:
    return SettingsError(f"connection_string: {text}", option="connection_string")


def _unavailable(where: str, reply: ServerReply) -> GridUnavailable:
    failed = failure(where, reply)
    return failed if isinstance(failed, GridUnavailable) else GridUnavailable(str(failed))


def unreachable(where: str, error: OSError) -> GridUnavailable:
    """Why a connection could not be made, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Misset(f"{where}: its certificate is not accepted: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "failed").replace("_", " ").lower()
        if "wrong version number" in reason or "record layer failure" in reason:
            return Misset(f"{where} does not speak TLS; without it the scheme is redis://")
        return Misset(f"{where}: TLS: {reason}")
    if isinstance(error, ConnectionRefusedError):
        return GridUnavailable(f"{where} refuses connections: no server listens there")
    if isinstance(error, socket.gaierror):
        return GridUnavailable(f"{where}: the name of the host cannot be resolved")
    if isinstance(error, FileNotFoundError):
        return GridUnavailable(f"{where}: there is no such socket")
    return GridUnavailable(f"{where} cannot be reached: {error.strerror or type(error).__name__}")
