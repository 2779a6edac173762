"""Where a Redis is, how to reach it and how to get in; the same for every connection to it."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import hiredis

from gridsession.errors import GridUnavailable, SettingsError
from gridsession.grids.redis.credentials import CredentialProvider, Credentials, asked
from gridsession.grids.redis.replies import ConnectionLost, Misset, ServerReply, failure
from gridsession.grids.redis.tls import Tls, meaning_of
from gridsession.sources.address_parts import wrong
from gridsession.sources.connection_string import RedisAddress

OLDEST = (7, 0)  # sharded notices, flags of scripts, what a script may ask of its own permissions
_ALERT_PAUSE = 0.05  # seconds in which a server that lets us connect by TLS may still refuse us
_KEEPALIVE = (  # so that a connection on which nobody asks is not forgotten on the way
    ("TCP_KEEPIDLE", 30),
    ("TCP_KEEPINTVL", 10),
    ("TCP_KEEPCNT", 3),
)

Word = bytes | str | int | float  # of a command
INCOMPLETE = object()  # hiredis's own sign of a reply that is not all here is RESP3's `false`, too
# Its own annotation says that a command has one word.
pack_command: Callable[[tuple[Word, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]


class Asker(asyncio.Protocol):
    """A connection that can be asked before it is handed on."""

    def ask(self, *words: Word) -> asyncio.Future[Any]:
        """A future of the reply to a command."""
        raise NotImplementedError

    def lose(self, error: GridUnavailable) -> None:
        """End it; whoever waits for a reply is told the error."""
        raise NotImplementedError

    @property
    def loss(self) -> GridUnavailable | None:
        """Why it has ended; None where it has not."""
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
        named_by: what names all this, for errors: `connection_string` or `client`.
    """

    where: str
    hosts: tuple[tuple[str, int], ...] = ()
    socket_path: str | None = None
    tls: Tls | None = None
    credentials: Callable[[], Credentials | Awaitable[Credentials]] | None = None
    db: int = 0
    client_name: str | None = None
    connect_timeout: float | None = None
    named_by: str = "connection_string"

    def wrong(self, text: str) -> SettingsError:
        """The error for what will not heal."""
        return wrong(text, self.named_by)

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
                raise wrong(
                    f"it is well-formed, but this release of gridsession has no grid for {what} "
                    "yet; name a single server: redis://host:6379"
                )
        if address.min_replicas:
            raise wrong(
                "min_replicas: this release does not ask replicas to confirm a commit; remove it "
                "(the server's own min-replicas-to-write is obeyed)"
            )
        named = address.username is not None or address.password is not None
        if named and credential_provider is not None:
            raise wrong("it names user or password, and so does credential_provider; keep one")
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
        # Whoever waits for a connection does so no longer for there being several hosts.
        # And a little less long, so that they are told why, and not only that it took too long.
        most = self.connect_timeout or timeout
        timeout = self.connect_timeout or 0.9 * timeout / max(1, len(self.hosts))
        failed: GridUnavailable | None = None
        for place in self.hosts or (None,):
            try:
                return await self._reach(make, place, timeout, most)
            except GridUnavailable as error:
                if not isinstance(failed, Misset):  # what will not heal comes before what may
                    failed = error
        assert failed is not None
        raise failed

    async def _reach(
        self,
        make: Callable[[], Connection],
        place: tuple[str, int] | None,
        timeout: float,
        most: float,
    ) -> Connection:
        try:
            return await self._try(make, place, timeout, most)
        except ConnectionLost as error:
            if self.tls is None:
                hint = "" if place is None else "; if it wants TLS, the scheme is rediss://"
                raise GridUnavailable(f"{error}{hint}") from None
        # A server that does not accept our certificate says so after the handshake, and goes; what
        # we write meanwhile can keep us from reading it. So once more, and nothing is written yet.
        try:
            return await self._try(make, place, timeout, most, pause=_ALERT_PAUSE)
        except ConnectionLost as error:
            raise GridUnavailable(str(error)) from None

    async def _try(
        self,
        make: Callable[[], Connection],
        place: tuple[str, int] | None,
        timeout: float,
        most: float,
        pause: float = 0.0,
    ) -> Connection:
        connection = make()
        # A server without TLS waits for the end of what it takes for a command.
        hint = "" if self.tls is None else "; if it does not speak TLS, the scheme is redis://"
        silent = f"{self.where} did not answer within {most:g} s{hint}"
        try:
            async with _within(timeout):
                await self._connect(connection, place)
                if pause:
                    await asyncio.sleep(min(pause, timeout / 2))
                silent = f"the credential provider did not answer within {most:g} s"
                credentials = await self._credentials()
                silent = f"{self.where} did not answer within {most:g} s"
                await self._greet(connection, credentials)
                if connection.loss is not None:  # what told of it came with the greeting's answer
                    raise connection.loss
        except TimeoutError:
            failed = GridUnavailable(silent)
        except UnicodeError:  # a label of a name may not be so long
            failed = GridUnavailable(f"{self.where}: the name of the host cannot be resolved")
        except OSError as error:
            failed = unreachable(self.where, error)
        except ServerReply as error:
            failed = unavailable(self.where, error)
        except GridUnavailable as error:
            failed = error
        except BaseException:
            connection.lose(GridUnavailable("given up"))
            raise
        else:
            return connection
        connection.lose(failed)
        raise failed

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

    async def _credentials(self) -> Credentials | None:
        if self.credentials is None:
            return None
        given = self.credentials()
        return await given if inspect.isawaitable(given) else given

    async def _greet(self, connection: Asker, credentials: Credentials | None) -> None:
        words: list[Word] = [b"HELLO", 3]
        if credentials is not None:
            user, password = credentials
            words += [b"AUTH", user or "default", password or ""]
        if self.client_name is not None:
            words += [b"SETNAME", self.client_name]
        try:
            server = await connection.ask(*words)
        except ServerReply as error:
            if str(error).startswith("ERR unknown command"):
                raise self._too_old("6 or older") from None
            raise
        if not isinstance(server, dict) or not isinstance(server.get(b"version"), bytes):
            raise GridUnavailable(f"{self.where} greets as no Redis does")
        version = server[b"version"].decode("ascii", "replace")
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
            raise failure(self.where, ServerReply("READONLY"))
        if self.db:
            try:
                await connection.ask(b"SELECT", self.db)
            except ServerReply as error:
                if error.code != "NOPERM":
                    raise
                raise Misset(
                    f"{self.where} does not permit its user: SELECT; without it db has to be 0"
                ) from None

    def _too_old(self, version: str) -> Misset:
        return Misset(f"{self.where} is Redis {version}; gridsession needs 7.0 or newer")


@asynccontextmanager
async def _within(seconds: float) -> AsyncGenerator[None]:
    """`asyncio.timeout`, but that time in which the event loop was held up does not count."""
    loop, step = asyncio.get_running_loop(), seconds / 8
    looking: asyncio.TimerHandle | None = None

    def look(due: float) -> None:
        nonlocal looking
        late = loop.time() - due
        if late > step and (end := bound.when()) is not None and not bound.expired():
            bound.reschedule(end + late)
        looking = loop.call_later(step, look, loop.time() + step)

    async with asyncio.timeout(seconds) as bound:
        look(loop.time())
        try:
            yield
        finally:
            if looking is not None:
                looking.cancel()


def _keep_alive(descriptor: int) -> None:
    # By a descriptor of our own: uvloop hands out no socket that takes options.
    with socket.socket(fileno=os.dup(descriptor)) as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in _KEEPALIVE:
            if hasattr(socket, name):  # not on every system
                wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def unavailable(where: str, reply: ServerReply) -> GridUnavailable:
    failed = failure(where, reply)
    return failed if isinstance(failed, GridUnavailable) else GridUnavailable(str(failed))


def unreachable(where: str, error: OSError) -> GridUnavailable:
    """Why a connection could not be made, in words."""
    if isinstance(error, ssl.SSLError):
        return Misset(f"{where} {meaning_of(error)}")
    if isinstance(error, ConnectionRefusedError):
        return GridUnavailable(f"{where} refuses connections: no server listens there")
    if isinstance(error, socket.gaierror):
        return GridUnavailable(f"{where}: the name of the host cannot be resolved")
    if isinstance(error, FileNotFoundError):
        return GridUnavailable(f"{where}: there is no such socket")
    return GridUnavailable(f"{where} cannot be reached: {error.strerror or type(error).__name__}")
