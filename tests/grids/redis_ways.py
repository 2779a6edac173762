"""What tests of ways to a Redis share: users, grids on an address, and whether they answer."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest

from gridsession.errors import GridUnavailable, SettingsError
from gridsession.grids.contract import Found, Grid
from gridsession.grids.redis import RedisGrid
from gridsession.testing.contract_hooks import a_new
from tests.redis_server import RedisServer

# What docs/farm.md has for the user of a namespace's workers. INFO may be added, so that a worker
# can warn of an eviction policy; SELECT must be, where db is not 0.
RULE = (
    "resetkeys ~gs:{namespace}:* resetchannels &gs:{namespace}:* -@all "
    "+eval +evalsha +get +getrange +pexpireat +ping +set +setrange +spublish "
    "+ssubscribe +sunsubscribe +time +unlink +zadd +zrange +zrem +zscore"
)


def permit(server: RedisServer, rule: str, *, user: str = "shop", password: str = "pw") -> str:
    """Make a user anew; the server's address for it."""
    words = ("reset", "on", f">{password}", *(word.replace("_", " ") for word in rule.split()))
    server.admin.execute_command("ACL", "SETUSER", user, *words)
    server.admin.acl_log_reset()
    return f"redis://{quote(user)}:{quote(password, safe='')}@127.0.0.1:{server.port}/0"


def denied(server: RedisServer) -> set[str]:
    """What was asked and not permitted, but for INFO."""
    return {entry["object"] for entry in server.admin.acl_log()} - {"info"}


@contextlib.asynccontextmanager
async def opened(grid: RedisGrid) -> AsyncIterator[RedisGrid]:
    try:
        await grid.open()
        yield grid
    finally:
        await grid.close()


def grid_at(url: str, namespace: str = "shop", **options: Any) -> RedisGrid:
    return RedisGrid.from_connection_string(
        url, namespace=namespace, **({"timeout": 2.0} | options)
    )


async def refused(grid: RedisGrid) -> str:
    """Why a worker does not start."""
    with pytest.raises(SettingsError) as caught:
        async with opened(grid):
            pass
    return str(caught.value)


async def away(grid: RedisGrid) -> str:
    """Why a worker starts without its grid."""
    with pytest.raises(GridUnavailable) as caught:
        async with opened(grid):
            pass
    return str(caught.value)


async def stored(grid: Grid) -> None:
    """A record comes back as it was written."""
    key, secret = secrets.token_bytes(32), secrets.token_bytes(32)
    await grid.create(key, a_new(secret, b"cart"))
    assert isinstance(await grid.read(key, secret), Found)


async def back(grid: Grid) -> None:
    async with asyncio.timeout(5.0):
        while True:
            with contextlib.suppress(GridUnavailable):
                return await stored(grid)
            await asyncio.sleep(0.01)


async def outage(grid: Grid, words: str) -> str:
    """What requests are told, once it has these words."""
    async with asyncio.timeout(5.0):
        while True:
            with pytest.raises(GridUnavailable) as caught:
                await grid.touch(bytes(32))
            assert not isinstance(caught.value, SettingsError)
            if words in str(caught.value):
                return str(caught.value)
            await asyncio.sleep(0.01)


def cut(server: RedisServer) -> None:
    server.admin.client_kill_filter(_type="normal", skipme=True)


def names(server: RedisServer) -> list[str]:
    return [client["name"] for client in server.admin.client_list()]
