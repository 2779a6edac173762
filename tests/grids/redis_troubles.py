"""What may be wrong with a real redis-server: brought about for as long as a test wants it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gridsession import GridFull, GridUnavailable, SettingsError
from tests.redis_server import RedisServer, free_port

USER, PASSWORD = "web", "password-never-shown"
WRITES = (
    "another",
    "acquire",
    "commit",
    "commit_if",
    "renew",
    "touch",
    "release",
)  # calls of a `Caller`
ALL = ("read", "known", *WRITES, "sweep")

On = Callable[[RedisServer], AbstractContextManager[None]]


@dataclass(frozen=True)
class Trouble:
    """Something that may be wrong with a server.

    Attributes:
        on: has it for as long as its block lasts.
        words: what is said of it in operation.
        at_start: what `open` raises; None where a worker can start.
        start_words: what is said then, where that is something else.
        kind: what calls raise in operation.
        fails: those that do.
        as_user: the grid comes as `USER`, who has all rights at first.
        options: of the server's configuration.
    """

    on: On
    words: str
    at_start: type[Exception] | None
    start_words: str = ""
    kind: type[Exception] = GridUnavailable
    fails: tuple[str, ...] = ALL
    as_user: bool = False
    options: Mapping[str, str] = field(default_factory=dict)


def client_of(server: RedisServer) -> Any:
    """Another's, who is told at once what is wrong: the server's `admin` tries for seconds."""
    return redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0), socket_timeout=15.0)


def until_refused(client: Any, kind: type[redis.RedisError]) -> None:
    """Ask until the server is in trouble."""
    while True:
        try:
            client.get("any")
        except kind:
            return


def cut_all(server: RedisServer) -> None:
    server.admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def configured(name: str, wrong: str, right: str, *, cuts: bool = False) -> On:
    """An option of the server's configuration is wrong."""

    @contextlib.contextmanager
    def on(server: RedisServer) -> Iterator[None]:
        server.admin.config_set(name, wrong)
        if cuts:
            cut_all(server)
        yield
        server.admin.config_set(name, right)

    return on


def permitted(wrong: str, right: str, *, cuts: bool = False) -> On:
    """The rules of the grid's user are wrong."""

    @contextlib.contextmanager
    def on(server: RedisServer) -> Iterator[None]:
        server.admin.execute_command("ACL", "SETUSER", USER, *wrong.split())
        if cuts:
            cut_all(server)
        yield
        server.admin.execute_command("ACL", "SETUSER", USER, *right.split())

    return on


@contextlib.contextmanager
def a_replica(server: RedisServer) -> Iterator[None]:
    """Of a server that is not there, so that what it has stays."""
    server.admin.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
    yield
    server.admin.execute_command("REPLICAOF", "NO", "ONE")


@contextlib.contextmanager
def loading(server: RedisServer) -> Iterator[None]:
    """Reads its data anew, as after a restart, slowly."""
    server.admin.mset({f"filling {n}": bytes(2000) for n in range(2000)})
    server.admin.config_set("key-load-delay", "2000")  # microseconds
    with client_of(server) as one, client_of(server) as other:
        reload = threading.Thread(target=one.execute_command, args=("DEBUG", "RELOAD"))
        reload.start()
        until_refused(other, redis.BusyLoadingError)
        try:
            yield
        finally:
            other.config_set("key-load-delay", "0")
            reload.join()


@contextlib.contextmanager
def busy(server: RedisServer) -> Iterator[None]:
    """With another's script that never ends."""
    with client_of(server) as one, client_of(server) as other:

        def run() -> None:
            with pytest.raises(redis.ResponseError, match="killed"):
                one.eval("while true do end", 0)

        looping = threading.Thread(target=run)
        looping.start()
        until_refused(other, redis.ResponseError)
        try:
            yield
        finally:
            other.script_kill()
            looping.join()


@contextlib.contextmanager
def cannot_save(server: RedisServer) -> Iterator[None]:
    """Its snapshot's name is taken by a directory: so it fails even where root saves."""
    in_the_way = server.folder / "dump.rdb"
    in_the_way.mkdir()
    server.admin.config_set("save", "3600 1000000")
    server.admin.bgsave()
    while server.admin.info("persistence")["rdb_last_bgsave_status"] == "ok":
        pass
    yield
    in_the_way.rmdir()
    server.admin.bgsave()
    while server.admin.info("persistence")["rdb_last_bgsave_status"] != "ok":
        pass


@contextlib.contextmanager
def frozen(server: RedisServer) -> Iterator[None]:
    with server.frozen():
        yield


@contextlib.contextmanager
def away(server: RedisServer) -> Iterator[None]:
    server.stop()
    yield
    server.start()


KEPT = {"appendonly": "yes"}
TROUBLES = {
    "LOADING": Trouble(
        loading,
        "is loading its data from disk; it answers when that is done",
        GridUnavailable,
        options={"loading_process_events_interval_bytes": "1024"},
    ),
    "READONLY": Trouble(
        a_replica,
        "is a replica and takes no writes",
        GridUnavailable,
        fails=(*WRITES, "sweep"),  # what it had stays readable until the first write
    ),
    "MASTERDOWN": Trouble(
        a_replica,
        "is a replica that has lost its primary; it heals with a fail-over, or name its primary",
        GridUnavailable,
        "is a replica and takes no writes",
        options={"replica_serve_stale_data": "no"},
    ),
    "OOM": Trouble(
        configured("maxmemory", "1", "0"),
        "has reached its maxmemory and takes no more session data; raise it, or shorten timeout",
        None,
        kind=GridFull,
        fails=("another", "acquire", "commit", "commit_if"),
    ),
    "NOAUTH": Trouble(
        configured("requirepass", PASSWORD, "", cuts=True),
        "wants a password; none was given, or it has one only now",
        SettingsError,
    ),
    "WRONGPASS": Trouble(
        permitted("resetpass >another", f"resetpass >{PASSWORD}", cuts=True),
        "refused user and password: they are wrong, or the user is switched off",
        SettingsError,
        as_user=True,
    ),
    "user switched off": Trouble(
        permitted("off", "on", cuts=True),
        "refused user and password: they are wrong, or the user is switched off",
        SettingsError,
        as_user=True,
    ),
    "NOPERM, of scripts": Trouble(
        permitted("-@scripting", "+@scripting"),
        "does not permit its user what sessions need; docs/farm.md has the ACL rule",
        SettingsError,
        "does not permit its user: EVAL, EVALSHA (on keys and channels that begin with gs:/:)",
        fails=(*WRITES, "read", "known"),
        as_user=True,
    ),
    "NOPERM, in a script": Trouble(
        permitted("-time", "+time"),
        "does not permit its user what sessions need; docs/farm.md has the ACL rule",
        SettingsError,
        "does not permit its user: TIME (on keys and channels that begin with gs:/:)",
        fails=(*WRITES, "read", "known", "sweep"),
        as_user=True,
    ),
    "NOPERM, of keys": Trouble(
        permitted("resetkeys ~others:*", "~*"),
        "does not permit its user what sessions need; docs/farm.md has the ACL rule",
        SettingsError,
        "does not permit its user: EVAL, EVALSHA, GET (on keys and channels that begin with",
        as_user=True,
    ),
    "NOPERM, of channels": Trouble(
        permitted("resetchannels", "allchannels"),
        "",
        SettingsError,
        "does not permit its user: SPUBLISH, SSUBSCRIBE (on keys and channels",
        fails=(),
        as_user=True,
    ),
    "BUSY": Trouble(
        busy,
        "is busy with a script that does not end (none of ours takes a millisecond); "
        "SCRIPT KILL ends it",
        GridUnavailable,
        options={"busy_reply_threshold": "1"},  # milliseconds
    ),
    "MISCONF": Trouble(
        cannot_save,
        "refuses writes since it could not save its data to disk; its log says why",
        GridUnavailable,
        fails=WRITES,
    ),
    "NOREPLICAS": Trouble(
        configured("min-replicas-to-write", "1", "0"),
        "refuses writes: fewer replicas follow it than its configuration wants "
        "(min-replicas-to-write)",
        None,
        fails=WRITES,
    ),
    "max clients": Trouble(
        configured("maxclients", "1", "10000", cuts=True),
        "has as many connections as its maxclients allows; raise it",
        GridUnavailable,
    ),
    "half-open": Trouble(frozen, "did not answer within 0.5 s", GridUnavailable),
    "refused": Trouble(
        away, "refuses connections: no server listens there", GridUnavailable, options=KEPT
    ),
}
