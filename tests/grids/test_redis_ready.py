"""Ways to a Redis that a user brings ready-made: credential providers and redis-py clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from ssl import TLSVersion
from typing import Any

import httpx2
import pytest
import redis
import redis.asyncio as aioredis
from redis.asyncio.sentinel import Sentinel
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from gridsession import SessionProvider, SessionSettings
from gridsession.errors import GridUnavailable, SettingsError
from gridsession.grids.redis import RedisGrid
from gridsession.web.starlette import SessionMiddleware
from tests.grids.certificates import (
    PASSWORD,
    Authority,
    Pair,
    TlsServer,
    encrypted,
    open_folder,
)
from tests.grids.redis_ways import (
    RULE,
    away,
    back,
    cut,
    grid_at,
    names,
    opened,
    outage,
    permit,
    refused,
    stored,
)
from tests.provider.harness import in_loop, run
from tests.redis_server import RedisServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("ready")) as made:
        yield made


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


# -- credential providers -----------------------------------------------------------------------


class Vault(CredentialProvider):
    """Asked without waiting; it counts. What it raises or does first, a test says."""

    def __init__(self, *answer: str) -> None:
        self.answer: Any = answer
        self.asked = 0
        self.first: Callable[[], object] = lambda: None

    def get_credentials(self) -> Any:
        self.asked += 1
        self.first()
        return self.answer


class AsyncVault(Vault):
    def get_credentials(self) -> Any:
        raise AssertionError("it can be awaited")

    async def get_credentials_async(self) -> Any:
        await asyncio.sleep(0)
        return super().get_credentials()


class PlainVault:
    """Of no class of redis-py's."""

    def __init__(self, *answer: str) -> None:
        self.inner = Vault(*answer)

    def get_credentials(self) -> Any:
        return self.inner.get_credentials()


VAULTS = pytest.mark.parametrize("vault", [Vault, AsyncVault, PlainVault])


@VAULTS
@in_loop
async def test_a_provider_is_asked_at_each_connection(
    server: RedisServer, vault: Any, caplog: pytest.LogCaptureFixture
) -> None:
    permit(server, RULE.format(namespace="shop"))
    made = vault("shop", "pw")
    counting = made.inner if vault is PlainVault else made
    url = f"redis://127.0.0.1:{server.port}/0"
    async with opened(grid_at(url, credential_provider=made)) as grid:
        await stored(grid)
        assert counting.asked == 1
        permit(server, RULE.format(namespace="shop"), password="rotated")
        counting.answer = ("shop", "rotated")
        cut(server)
        await back(grid)
        assert counting.asked >= 2
    assert "backward compatibility" not in caplog.text  # redis-py's word to who has only one way


@in_loop
async def test_redis_pys_own_provider(server: RedisServer, tmp_path: Path) -> None:
    permit(server, RULE.format(namespace="shop"))
    ready = UsernamePasswordCredentialProvider("shop", "pw")
    url = f"redis://127.0.0.1:{server.port}/0"
    async with opened(grid_at(url, credential_provider=ready)) as grid:
        await stored(grid)
    with RedisServer(tmp_path) as locked:
        locked.admin.config_set("requirepass", "pw")
        ready = UsernamePasswordCredentialProvider(password="pw")
        url = f"redis://127.0.0.1:{locked.port}/0"
        async with opened(grid_at(url, credential_provider=ready)) as grid:
            await stored(grid)
        ready = UsernamePasswordCredentialProvider(password="hunter2")
        text = await refused(grid_at(url, credential_provider=ready))
        assert "refused user and password" in text
        assert "hunter2" not in text


@VAULTS
@in_loop
async def test_a_provider_that_fails_is_an_outage_without_its_words(
    server: RedisServer, vault: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("hunter2 is no token")

    made = vault("shop", "pw")
    counting = made.inner if vault is PlainVault else made
    url = f"redis://127.0.0.1:{server.port}/0"
    counting.first = fail
    text = await away(grid_at(url, credential_provider=made))
    assert "the credential provider failed: RuntimeError" in text
    counting.first = lambda: None
    for answer in ((), ("a", "b", "hunter2"), None):
        counting.answer = answer
        text = await away(grid_at(url, credential_provider=made))
        assert "the credential provider failed: " in text
    assert "hunter2" not in caplog.text + text


@in_loop
async def test_a_provider_that_takes_long_holds_up_nobody(server: RedisServer) -> None:
    go_on = threading.Event()
    made = Vault("shop", "pw")
    made.first = lambda: go_on.wait(30.0)
    url = permit(server, RULE.format(namespace="shop")).replace("shop:pw@", "")
    grid = grid_at(url, credential_provider=made, timeout=0.3)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    try:
        for _ in range(3):
            with pytest.raises(GridUnavailable, match="did not answer within"):
                async with asyncio.timeout(5.0):
                    await grid.open()
            await asyncio.sleep(0.3)
        assert ticks >= 5  # the loop went on
        assert made.asked == 1  # and no thread is begun for each try
    finally:
        go_on.set()
        ticking.cancel()
    await back(grid)
    await grid.close()


def test_the_address_and_a_provider_do_not_both_name_a_user() -> None:
    for url in ("redis://:hunter2@h", "redis://h?username=ann&password=hunter2"):
        with pytest.raises(SettingsError, match="credential_provider; keep one") as caught:
            grid_at(url, credential_provider=Vault("a", "b"))
        assert "hunter2" not in str(caught.value)


# -- ready clients ------------------------------------------------------------------------------


async def use(client: Any) -> RedisGrid:
    """Use a grid made of a client, and prove that the client was left alone."""
    before = repr(client)
    grid = RedisGrid.from_client(client, namespace="shop", timeout=2.0)
    async with opened(grid):
        await stored(grid)
    pool = client.connection_pool
    assert repr(client) == before
    assert not pool._available_connections
    assert not pool._in_use_connections
    assert await client.ping()  # it is not closed either
    assert len(pool._available_connections) == 1
    async with opened(grid):
        await stored(grid)
    assert len(pool._available_connections) == 1
    await client.aclose()
    return grid


@in_loop
async def test_a_ready_client_is_taken_for_where_it_leads(server: RedisServer) -> None:
    permit(server, "+@all allkeys allchannels")
    port = server.port
    where = f"redis://127.0.0.1:{port}/0"
    assert (await use(aioredis.Redis(host="127.0.0.1", port=port))).where == where
    assert (await use(aioredis.from_url(where))).where == where
    hidden = where.replace("//", "//***@")
    for client in (
        aioredis.Redis(host="127.0.0.1", port=port, username="shop", password="pw"),
        aioredis.from_url(where.replace("//", "//shop:pw@")),
        aioredis.Redis(host="127.0.0.1", port=port, credential_provider=AsyncVault("shop", "pw")),
        aioredis.Redis(
            host="127.0.0.1",
            port=port,
            credential_provider=UsernamePasswordCredentialProvider("shop", "pw"),
        ),
    ):
        assert (await use(client)).where == hidden
    pool = aioredis.BlockingConnectionPool(host="127.0.0.1", port=port, db=3, client_name="of-pool")
    client = aioredis.Redis(connection_pool=pool)
    async with opened(RedisGrid.from_client(client)) as grid:
        await stored(grid)
        assert grid.where == f"redis://127.0.0.1:{port}/3"
        assert [c["db"] for c in server.admin.client_list() if c["name"] == "of-pool"] == ["3"]
    assert "refused user and password" in await refused(
        RedisGrid.from_client(aioredis.Redis(port=port, username="shop", password="hunter2"))
    )


def test_a_ready_client_of_a_socket() -> None:
    with open_folder() as folder:
        path = folder / "sock"
        with RedisServer(folder / "data", unixsocket=str(path)):
            grid = run(use(aioredis.Redis(unix_socket_path=str(path), db=1)))
            assert grid.where == f"redis+unix://{path}?db=1"
            grid = run(use(aioredis.from_url(f"unix://{path}?db=2")))
            assert grid.where == f"redis+unix://{path}?db=2"


@in_loop
async def test_a_ready_client_of_tls(authority: Authority, tmp_path: Path) -> None:
    shown, ours = authority.pair("server", "localhost"), authority.pair("client", "worker")
    with TlsServer(tmp_path, authority, shown, clients="yes") as server:

        def client(**options: Any) -> Any:
            given: dict[str, Any] = {
                "host": "localhost",
                "port": server.tls_port,
                "ssl": True,
                "ssl_ca_certs": str(authority.cert),
                "ssl_certfile": str(ours.cert),
                "ssl_keyfile": str(ours.key),
            }
            return aioredis.Redis(**(given | options))

        assert (await use(client())).where == f"rediss://localhost:{server.tls_port}/0"
        await use(client(ssl_ca_certs=None, ssl_ca_data=authority.cert.read_text()))
        locked = str(encrypted(ours.key))
        await use(client(ssl_keyfile=locked, ssl_password=PASSWORD))
        await use(client(ssl_min_version=TLSVersion.TLSv1_2, ssl_ciphers="DEFAULT"))
        text = await refused(RedisGrid.from_client(client(host="127.0.0.1")))
        assert "'127.0.0.1'" in text
        assert text.startswith("client: ")  # there is no connection string
        await use(client(host="127.0.0.1", ssl_check_hostname=False))
        await use(client(host="127.0.0.1", ssl_cert_reqs="none", ssl_ca_certs=None))
        assert "ssl_ca_certs" in await refused(RedisGrid.from_client(client(ssl_ca_certs=None)))
        others = Authority(tmp_path / "others")
        with pytest.MonkeyPatch.context() as environment:  # redis-py trusts the system's as well
            environment.setenv("SSL_CERT_FILE", str(authority.cert))
            await use(client(ssl_ca_certs=str(others.cert)))
        text = f"rediss://localhost:{server.tls_port}?ssl_ca_certs={authority.cert}"
        assert "ssl_certfile" in await refused(RedisGrid.from_client(aioredis.from_url(text)))
        for options, part in (
            ({"ssl_ca_certs": "/nowhere"}, "ssl_ca_certs"),
            ({"ssl_ca_certs": None, "ssl_ca_data": "hunter2"}, "ssl_ca_data"),
            ({"ssl_certfile": "/nowhere"}, "ssl_certfile"),
            ({"ssl_certfile": None}, "ssl_keyfile"),
            ({"ssl_keyfile": locked}, "ssl_keyfile"),
            ({"ssl_keyfile": locked, "ssl_password": "hunter3"}, "ssl_keyfile"),
            ({"ssl_ciphers": "hunter2"}, "ssl_ciphers"),
        ):
            with pytest.raises(SettingsError, match=f"client: {part} cannot be used") as caught:
                RedisGrid.from_client(client(**options))
            assert "hunter" not in str(caught.value)
        files = Pair(tmp_path / "tls.crt", tmp_path / "tls.key")
        files.replace_by(ours)
        renewed = client(ssl_certfile=str(files.cert), ssl_keyfile=str(files.key))
        async with opened(RedisGrid.from_client(renewed)) as grid:
            files.replace_by(others.pair("client", "worker"))
            server.cut()
            await outage(grid, "our certificate")
            files.replace_by(ours)
            await back(grid)


def of_sentinels(service: str, **options: Any) -> Any:
    sentinel: Any = Sentinel
    return sentinel([("h", 26379)]).master_for(service, **options)


class Odd(aioredis.Connection):
    """One that goes its own way."""


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "synchronous": (redis.Redis, "client=<Redis> cannot be used: it is a synchronous"),
    "Sentinel": (
        lambda: of_sentinels("m", password="hunter2"),
        "client=<Redis> cannot be used: it finds its server by Sentinels",
    ),
    "Cluster": (
        lambda: aioredis.RedisCluster(host="h", password="hunter2"),
        "client=<RedisCluster> cannot be used: it is for a Cluster",
    ),
    "connections of its own": (
        lambda: aioredis.Redis(connection_pool=aioredis.ConnectionPool(Odd, password="hunter2")),
        "of a class of their own, Odd",
    ),
    "a way of its own to greet": (
        lambda: aioredis.Redis(redis_connect_func=print, password="hunter2"),
        "client: redis_connect_func cannot be used",
    ),
    "two users": (
        lambda: aioredis.Redis(password="hunter2", credential_provider=Vault("a", "b")),
        "and so does credential_provider; keep one",
    ),
    "a name with spaces": (
        lambda: aioredis.Redis(client_name="my shop", password="hunter2"),
        "client: client_name may have",
    ),
    "a db of text": (lambda: aioredis.Redis(db="hunter2"), "client: db and port"),
    "a host of no name": (lambda: aioredis.Redis(host="hunter2..b"), "client: host"),
    "a pool": (
        lambda: aioredis.ConnectionPool(password="hunter2"),
        "client=<ConnectionPool> cannot be used: it must be a redis.asyncio.Redis",
    ),
    "a URL": (lambda: "redis://:hunter2@h", "client=<str> cannot be used"),
    "nothing": (lambda: None, "client=<NoneType> cannot be used"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
@in_loop
async def test_another_client_is_refused_in_words(make: Callable[[], Any], words: str) -> None:
    client = make()
    with pytest.raises(SettingsError) as caught:
        RedisGrid.from_client(client)
    assert words in str(caught.value)
    assert "hunter2" not in str(caught.value)


@in_loop
async def test_an_application_on_a_ready_client(server: RedisServer) -> None:
    """The grid is handed in by the provider, and is its caller's to close."""

    async def count(request: Request) -> PlainTextResponse:
        request.session["n"] = request.session.get("n", 0) + 1
        return PlainTextResponse(str(request.session["n"]))

    url = permit(server, RULE.format(namespace="shop")) + "?client_name=of-the-shop"
    client = aioredis.from_url(url)
    grid = RedisGrid.from_client(client, namespace="shop")
    provider = SessionProvider(SessionSettings(), grid=grid)
    app = Starlette(
        routes=[Route("/", count)], middleware=[Middleware(SessionMiddleware, provider=provider)]
    )
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="https://shop") as browser:
        assert [(await browser.get("/")).text for _ in range(3)] == ["1", "2", "3"]
    assert not client.connection_pool._available_connections
    assert not provider.owns_grid
    await provider.close()
    assert names(server).count("of-the-shop") == 1
    await stored(grid)
    await grid.close()
    async with asyncio.timeout(5.0):
        while True:
            if "of-the-shop" not in names(server):
                break
            await asyncio.sleep(0.01)
    await client.aclose()
