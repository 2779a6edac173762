"""What servers say of themselves, set up well and badly, and what of it is logged at the start."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gridsession.grids.redis import RedisGrid
from gridsession.grids.redis.health import concerns, examined, number, told
from tests.provider.harness import run
from tests.redis_server import RedisServer

PATIENCE = 10.0  # seconds that a server may take for what it does beside
GOOD = {"appendonly": "yes", "maxmemory": "200mb", "maxmemory_policy": "noeviction"}


def info_of(server: RedisServer) -> str:
    """What the server says, as it says it."""
    server.admin.set_response_callback("INFO", bytes.decode)
    text: str = server.admin.execute_command("INFO")
    return text


def at_start(server: RedisServer) -> list[str]:
    return concerns(info_of(server))


def asked_for(server: RedisServer) -> list[str]:
    """What is said to whoever asks, besides."""
    return [one.what for one in examined(told(info_of(server))) if not one.at_start]


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_good_server_needs_no_word(tmp_path: Path) -> None:
    with RedisServer(tmp_path, **GOOD) as server:
        assert (at_start(server), asked_for(server)) == ([], [])


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "volatile-lru"])
def test_a_server_that_throws_sessions_away(policy: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path, **GOOD | {"maxmemory_policy": policy}) as server:
        (said,) = at_start(server)
        assert said.startswith(f"maxmemory-policy is {policy}: the server throws sessions away")
        assert "set noeviction" in said
        assert asked_for(server) == []


def test_a_policy_that_does_not_act_is_for_those_who_ask(tmp_path: Path) -> None:
    options = GOOD | {"maxmemory_policy": "allkeys-lru", "maxmemory": "0"}
    with RedisServer(tmp_path, **options) as server:
        assert at_start(server) == []
        policy, limit = asked_for(server)
        assert "as soon as a maxmemory is set" in policy
        assert "maxmemory is not set" in limit


def test_a_server_that_is_nearly_full(tmp_path: Path) -> None:
    with RedisServer(tmp_path, **GOOD | {"maxmemory": "20mb"}) as server:
        for part in range(7):
            server.admin.set(f"x{part}", bytes(1 << 20))
        assert at_start(server) == []
        for part in range(7, 14):
            server.admin.set(f"x{part}", bytes(1 << 20))
        (said,) = at_start(server)
        assert said.startswith("the server's memory is ")
        assert "% full; raise maxmemory" in said


def test_a_server_that_keeps_nothing_on_disk(tmp_path: Path) -> None:
    with RedisServer(tmp_path, **GOOD | {"appendonly": "no"}) as server:
        (said,) = at_start(server)
        assert said.startswith("appendonly is off, and the server has made no snapshot")
        assert "replicas" not in said


def test_snapshots_are_many_peoples_choice(tmp_path: Path) -> None:
    with RedisServer(tmp_path, **GOOD | {"appendonly": "no"}) as server:
        server.admin.set("x", 1)
        server.admin.bgsave()
        until(lambda: number(told(info_of(server)), "rdb_saves") == 1)
        assert at_start(server) == []
        (said,) = asked_for(server)
        assert "takes back what came after the last one" in said
        server.stop()
        server.start()  # with what it had, and none made since
        assert number(told(info_of(server)), "rdb_saves") == 0
        assert at_start(server) == []
        # Told to make them, and none was due yet: only who may ask for its configuration knows.
        fields = dict(told(info_of(server))) | {"rdb_last_load_keys_loaded": "0"}
        (first, *_) = examined(fields)
        assert first.at_start
        (first, *_) = examined(fields | {"save": "3600 1"})
        assert not first.at_start


def test_replicas_of_a_server_that_may_come_back_empty(tmp_path: Path) -> None:
    options = GOOD | {"appendonly": "no"}
    with RedisServer(tmp_path / "primary", **options, repl_diskless_sync_delay="0") as primary:
        replica_of = f"127.0.0.1 {primary.port}"
        with RedisServer(tmp_path / "replica", **options, replicaof=replica_of):
            until(lambda: number(told(info_of(primary)), "connected_slaves") == 1)
            assert "its replicas are then emptied, too" in "".join(at_start(primary))


def test_a_snapshot_that_failed(tmp_path: Path) -> None:
    with RedisServer(tmp_path, **GOOD) as server:
        (tmp_path / "dump.rdb").mkdir()  # where a file shall be put
        server.admin.bgsave()
        until(lambda: told(info_of(server))["rdb_last_bgsave_status"] == "err")
        (said,) = at_start(server)
        assert "the server's last snapshot failed" in said


def test_a_server_with_many_connections(tmp_path: Path) -> None:
    with RedisServer(tmp_path, **GOOD, maxclients="10") as server:
        clients = [server._admin() for _ in range(8)]
        for client in clients:
            client.ping()
        (said,) = at_start(server)
        assert "9 of the 10 connections that its maxclients allows" in said
        for client in clients:
            client.close()


@pytest.mark.parametrize("field", ["aof_last_write_status", "aof_last_bgrewrite_status"])
def test_an_append_only_file_that_cannot_be_written(field: str) -> None:
    (said,) = concerns(f"# Persistence\r\naof_enabled:1\r\n{field}:err\r\n".encode())
    assert "append-only file failed" in said


@pytest.mark.parametrize("info", ["", "# Memory\r\n", "maxmemory:much\r\nused_memory:\r\n"])
def test_what_is_not_said_is_not_judged(info: str) -> None:
    assert examined(told(info)) == []


def test_it_is_logged_once_by_each_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "gridsession")
    options = GOOD | {"maxmemory_policy": "allkeys-lfu"}
    with RedisServer(tmp_path, **options, requirepass="hunter2") as server:
        grid = RedisGrid.from_connection_string(f"redis://:hunter2@127.0.0.1:{server.port}")

        async def open_and_close() -> None:
            await grid.open()
            await grid.close()

        run(open_and_close())
        run(open_and_close())  # on another event loop, as test clients have them
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"redis://***@127.0.0.1:{server.port}/0: maxmemory-policy is allkeys")
    assert "hunter2" not in line
