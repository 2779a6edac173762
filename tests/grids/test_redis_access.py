"""Ways to a Redis: users and what they may do, sockets, gateways and hosts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from gridsession.grids.contract import (
    RELEASED,
    REMOVED,
    Busy,
    Change,
    Claim,
    Committed,
    Granted,
)
from gridsession.testing import GridContract
from gridsession.testing.contract_hooks import a_new
from tests.clocked_redis import OnASetClock
from tests.grids.certificates import (
    as_nobody,
    open_folder,
)
from tests.grids.redis_ways import (
    RULE,
    away,
    back,
    cut,
    denied,
    grid_at,
    names,
    opened,
    outage,
    permit,
    refused,
    stored,
)
from tests.provider.harness import in_loop, run
from tests.redis_server import RedisServer, a_namespace, free_port

COMMANDS = tuple(word[1:] for word in RULE.split() if word.startswith("+"))
STRANGE = "p@/:#?% +ü&;="  # all that means something in a connection string


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("access"), bind="127.0.0.1 -::1") as made:
        yield made


# -- what the user may do -----------------------------------------------------------------------


@in_loop
async def test_the_rule_permits_all_that_is_done(server: RedisServer) -> None:
    url = permit(server, RULE.format(namespace="shop"))
    async with opened(grid_at(url)) as grid, opened(grid_at(url)) as other:
        key, secret = secrets.token_bytes(32), secrets.token_bytes(32)
        mine, theirs = (Claim(secrets.token_bytes(16), "a test", 5.0, 50) for _ in range(2))
        assert isinstance(await grid.create(key, a_new(secret, b"1"), mine), Committed)
        assert isinstance(await other.acquire(key, secret, theirs), Busy)
        await other.wait(key, theirs.token, 1.0)  # begins to listen
        assert await grid.renew([(key, mine.token)], 5.0) == [True]
        change = Change(commit_token=7, payload=b"2", timeout=600.0, user="ann")
        rung = asyncio.create_task(other.wait(key, theirs.token, 10.0))
        await asyncio.sleep(0)
        begun = time.monotonic()
        assert isinstance(await grid.commit(key, mine.token, change, release=True), Committed)
        await rung
        assert time.monotonic() - begun < 5.0  # a notice, not the end of the wait
        assert isinstance(await other.acquire(key, secret, theirs), Granted)
        assert await grid.touch(key)
        assert await other.release(key, theirs.token) is RELEASED
        short = a_new(secret, b"3")
        short.timeout = 0.01
        await grid.create(secrets.token_bytes(32), short)
        await asyncio.sleep(0.02)
        assert await grid.sweep(100) == 1
        assert await grid.remove(key) is REMOVED
    assert denied(server) == set()


@pytest.mark.parametrize("command", COMMANDS)
@in_loop
async def test_a_command_that_is_not_permitted_is_named(server: RedisServer, command: str) -> None:
    rule = RULE.format(namespace="shop")
    url = permit(server, rule)
    for _ in range(2):  # without scripts at the server, and with those that the user may bring
        server.admin.script_flush()
        url = permit(server, f"{rule} -{command}")
        text = await refused(grid_at(url))
        assert command.upper() in text
        assert "docs/farm.md" in text
        permit(server, rule)
        async with opened(grid_at(url)):
            pass


@pytest.mark.parametrize(
    ("mine", "others", "named"),
    [("~gs:shop:*", "~gs:other:*", ""), ("&gs:shop:*", "&gs:other:*", "SPUBLISH, SSUBSCRIBE")],
    ids=["keys", "channels"],
)
@in_loop
async def test_another_namespace_than_the_permitted_one_stops_the_start(
    server: RedisServer, mine: str, others: str, named: str
) -> None:
    url = permit(server, RULE.format(namespace="shop").replace(mine, others))
    text = await refused(grid_at(url))
    assert "does not permit its user" in text
    assert named in text
    both = permit(server, RULE.format(namespace="other"))
    assert "does not permit its user" in await refused(grid_at(both))
    async with opened(grid_at(both, "other")):
        pass


@in_loop
async def test_info_need_not_be_permitted(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "gridsession")
    async with opened(grid_at(permit(server, RULE.format(namespace="shop")))) as grid:
        await stored(grid)
    assert caplog.messages == []
    async with opened(grid_at(permit(server, RULE.format(namespace="shop") + " +info"))):
        assert "appendonly is off" in caplog.text  # as it is at this server


@in_loop
async def test_another_database_needs_select(server: RedisServer) -> None:
    rule = RULE.format(namespace="shop")
    url = permit(server, rule)[:-1] + "3"
    assert "SELECT" in await refused(grid_at(url))
    permit(server, rule + " +select")
    async with opened(grid_at(url)) as grid:
        await stored(grid)
        assert "3" in {c["db"] for c in server.admin.client_list() if c["user"] == "shop"}


@in_loop
async def test_a_database_that_is_not_there_stops_the_start(server: RedisServer) -> None:
    assert "correct db" in await refused(grid_at(f"redis://127.0.0.1:{server.port}/4000"))


class TestRedisAsAUserWithTheRule(OnASetClock, GridContract):
    """By a clock that a test sets, for which alone the user may also write one key."""

    @pytest.fixture(autouse=True)
    def make_user(self, server: RedisServer) -> Iterator[None]:
        self.namespace = a_namespace()
        rule = RULE.format(namespace=self.namespace)
        self.url = permit(server, f"{rule} (+set_~gs:{self.namespace}:clock)")
        yield
        assert denied(server) == set()


# -- who the user is ----------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["ann", "a:n/n@1%"])
@in_loop
async def test_user_and_password_are_decoded(server: RedisServer, user: str) -> None:
    server.admin.execute_command("ACL", "SETUSER", user, "reset", "on", f">{STRANGE}", "+@all",
                                 "allkeys", "allchannels")  # fmt: skip
    place = f"127.0.0.1:{server.port}/0"
    name, secret = quote(user, safe=""), quote(STRANGE, safe="")
    for url in (
        f"redis://{name}:{secret}@{place}",
        f"redis://{place}?username={name}&password={secret}",
        f"bootstrapGateways=127.0.0.1:{server.port};username={name};password={secret}",
    ):
        async with opened(grid_at(url)) as grid:
            await stored(grid)
            assert "***" in grid.where
            assert user not in grid.where
            assert user in {client["user"] for client in server.admin.client_list()}


@in_loop
async def test_a_password_alone_is_the_default_users(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        server.admin.config_set("requirepass", "hunter2")
        place = f"127.0.0.1:{server.port}"
        async with opened(grid_at(f"redis://:hunter2@{place}")) as grid:
            await stored(grid)
        assert "wants a password" in await refused(grid_at(f"redis://{place}"))
        for wrong in (":hunter3@", "default:hunter3@", "nobody:hunter2@"):
            text = await refused(grid_at(f"redis://{wrong}{place}"))
            assert "refused user and password" in text
            assert "hunter" not in text
            assert "nobody" not in text


@in_loop
async def test_a_user_who_is_switched_off_or_takes_another_password_later_is_an_outage(
    server: RedisServer,
) -> None:
    url = permit(server, RULE.format(namespace="shop"))
    async with opened(grid_at(url)) as grid:
        for change in (("off",), ("on", "resetpass", ">other")):
            server.admin.execute_command("ACL", "SETUSER", "shop", *change)
            cut(server)
            assert "pw" not in await outage(grid, "refused user and password")
        permit(server, RULE.format(namespace="shop"))
        await back(grid)


# -- where it is --------------------------------------------------------------------------------


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", *(["[::1]"] if _has_ipv6() else [])])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@in_loop
async def test_hosts(server: RedisServer, host: str, loop: str) -> None:
    async with opened(grid_at(f"redis://{host}:{server.port}/0?client_name=shop-web")) as grid:
        await stored(grid)
        assert grid.where == f"redis://{host}:{server.port}/0"
        assert "shop-web" in names(server)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_sockets(loop: str) -> None:
    with open_folder() as folder:
        path = folder / "a redis.sock"
        url = f"redis+unix://{quote(str(path))}?db=2&client_name=by-socket"

        async def use(server: RedisServer) -> None:
            async with opened(grid_at(url)) as grid:
                await stored(grid)
                assert grid.where == f"redis+unix://{quote(str(path))}?db=2"
                assert "by-socket" in names(server)

        with RedisServer(folder / "data", unixsocket=f'"{path}"', unixsocketperm="700") as made:
            run(use(made), loop=loop)
            with as_nobody():
                assert "Permission denied" in run(away(grid_at(url)), loop=loop)
        assert "there is no such socket" in run(away(grid_at(url)), loop=loop)
        path.write_bytes(b"")
        assert "refuses connections" in run(away(grid_at(url)), loop=loop)


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """A port where connections are taken, and nothing is answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        yield listening.getsockname()[1]


@in_loop
async def test_a_try_to_connect_ends_when_the_address_says() -> None:
    with silent() as port:
        begun = time.monotonic()
        url = f"redis://127.0.0.1:{port}?socket_connect_timeout=0.2"
        assert "within 0.2 s" in await away(grid_at(url, timeout=20.0))
        assert time.monotonic() - begun < 10.0
        begun = time.monotonic()
        url = f"redis://127.0.0.1:{port}?socket_connect_timeout=60"
        assert "within 0.5 s" in await away(grid_at(url, timeout=0.5))  # as any call
        assert time.monotonic() - begun < 10.0


@in_loop
async def test_the_first_gateway_that_answers_is_used(server: RedisServer, tmp_path: Path) -> None:
    live, dead = f"127.0.0.1:{server.port}", f"127.0.0.1:{free_port()}"
    with RedisServer(tmp_path) as other, silent() as one, silent() as two:
        second = f"127.0.0.1:{other.port}"
        for gateways, used, unused in (
            (f"{live},{second}", server, other),
            (f"{second},{live}", other, server),
            (f"{dead},{second},{live}", other, server),
            (f"127.0.0.1:{one},127.0.0.1:{two},{second}", other, server),
        ):
            url = f"bootstrapGateways={gateways};client_name=by-gateway"
            async with opened(grid_at(url)) as grid:
                await stored(grid)
                assert "by-gateway" in names(used)
                assert "by-gateway" not in names(unused)
    text = await away(grid_at(f"bootstrapGateways={dead},{second}"))
    assert dead in text
    assert second in text


@in_loop
async def test_a_worker_goes_to_the_next_gateway_when_the_first_ends(
    server: RedisServer, tmp_path: Path
) -> None:
    with RedisServer(tmp_path) as first:
        url = f"bootstrapGateways=127.0.0.1:{first.port},127.0.0.1:{server.port}"
        async with opened(grid_at(url)) as grid:
            await stored(grid)
            first.kill()
            await back(grid)
