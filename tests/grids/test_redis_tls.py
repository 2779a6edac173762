"""Redis over TLS: what is trusted, what is shown, and what is said when either fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from gridsession.errors import GridUnavailable, SettingsError
from gridsession.grids.contract import Found, Grid
from gridsession.grids.redis import RedisGrid
from gridsession.grids.redis.tls import Tls
from gridsession.sources.connection_string import RedisAddress, parse
from gridsession.testing import GridContract
from gridsession.testing.contract_hooks import a_new
from tests.clocked_redis import OnASetClock
from tests.grids.certificates import (
    PASSWORD,
    Authority,
    Pair,
    TlsServer,
    as_nobody,
    encrypted,
    open_folder,
)
from tests.provider.harness import in_loop
from tests.redis_server import a_namespace

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
DAY = timedelta(days=1)


class Pki:
    """The certificates of this module's tests."""

    def __init__(self, folder: Path) -> None:
        now = datetime.now(UTC)
        self.folder = folder
        self.ours, self.others = Authority(folder / "ours"), Authority(folder / "others")
        old, new = (now - 9 * DAY, now - DAY), (now + DAY, now + 9 * DAY)
        hosts = ("localhost", "127.0.0.1")
        self.pairs = {
            "server": self.ours.pair("server", *hosts),
            "expired": self.ours.pair("expired", *hosts, not_before=old[0], not_after=old[1]),
            "not yet valid": self.ours.pair("early", *hosts, not_before=new[0], not_after=new[1]),
            "of another host": self.ours.pair("elsewhere", "elsewhere.example"),
            "of another authority": self.others.pair("server", *hosts),
            "client": self.ours.pair("client", "worker"),
            "old client": self.ours.pair("old", "worker", not_before=old[0], not_after=old[1]),
            "stranger": self.others.pair("client", "worker"),
        }

    def __getitem__(self, name: str) -> Pair:
        return self.pairs[name]

    def copies(self, folder: Path, name: str) -> Pair:
        """Files of their own, to be replaced."""
        pair = Pair(folder / "tls.crt", folder / "tls.key")
        pair.replace_by(self[name])
        return pair


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def server(pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    """Asks its clients for nothing. Its certificate is right again after each test."""
    with TlsServer(tmp_path_factory.mktemp("tls"), pki.ours, pki["server"]) as made:
        yield made


@pytest.fixture(scope="module")
def strict(pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    """Wants a certificate of its clients."""
    folder = tmp_path_factory.mktemp("strict")
    with TlsServer(folder, pki.ours, pki["server"], clients="yes") as made:
        yield made


def shown_by(pair: Pair) -> dict[str, Any]:
    return {"ssl_certfile": pair.cert, "ssl_keyfile": pair.key}


@contextlib.contextmanager
def showing(server: TlsServer, pki: Pki, name: str) -> Iterator[None]:
    server.show(pki[name])
    try:
        yield
    finally:
        server.show(pki["server"])


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisGrid]:
    grid = RedisGrid.from_connection_string(url, namespace=a_namespace(), timeout=2.0)
    try:
        await grid.open()
        yield grid
    finally:
        await grid.close()


async def refused(url: str) -> str:
    """Why a worker does not start."""
    with pytest.raises(SettingsError) as caught:
        async with opened(url):
            pass
    assert caught.value.option == "connection_string"
    return str(caught.value)


async def stored(grid: Grid, payload: bytes = b"cart") -> None:
    """A record comes back as it was written."""
    key, secret = secrets.token_bytes(32), secrets.token_bytes(32)
    await grid.create(key, a_new(secret, payload))
    found = await grid.read(key, secret)
    assert isinstance(found, Found)
    assert found.snapshot.payload == payload


async def outage(grid: Grid) -> str:
    """What requests are told until a connection can be made; without end they would wait."""
    texts = set()
    async with asyncio.timeout(5.0):
        while True:
            try:
                await grid.touch(bytes(32))
            except SettingsError as error:
                raise AssertionError("in operation it is an outage") from error
            except GridUnavailable as error:
                texts.add(str(error))
                if "certificate" in str(error):
                    return str(error)
            await asyncio.sleep(0.01)


async def back(grid: Grid) -> None:
    async with asyncio.timeout(5.0):
        while True:
            with contextlib.suppress(GridUnavailable):
                return await stored(grid)
            await asyncio.sleep(0.01)


# -- what is spoken -----------------------------------------------------------------------------


@LOOPS
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
@in_loop
async def test_what_is_written_comes_back(
    pki: Pki, server: TlsServer, host: str, loop: str
) -> None:
    async with opened(server.at(host, ssl_ca_certs=pki.ours.cert)) as grid:
        assert grid.where == f"rediss://{host}:{server.tls_port}/0"
        await stored(grid, secrets.token_bytes(1 << 20))  # more than one TLS record, or buffer
        await asyncio.gather(*(stored(grid) for _ in range(200)))


@LOOPS
@pytest.mark.parametrize(("clients", "shown"), [("yes", True), ("optional", True),
                                                ("optional", False), ("no", True)])  # fmt: skip
@in_loop
async def test_a_certificate_is_shown_to_whoever_asks(
    pki: Pki, tmp_path: Path, clients: str, shown: bool, loop: str
) -> None:
    client = pki["client"]
    ours = shown_by(client) if shown else {}
    with TlsServer(tmp_path, pki.ours, pki["server"], clients=clients) as server:
        async with opened(server.at(ssl_ca_certs=pki.ours.cert, **ours)) as grid:
            await stored(grid)


@in_loop
async def test_one_file_may_hold_certificate_and_key(
    pki: Pki, strict: TlsServer, tmp_path: Path
) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(pki["client"].cert.read_bytes() + pki["client"].key.read_bytes())
    async with opened(strict.at(ssl_ca_certs=pki.ours.cert, ssl_certfile=both)) as grid:
        await stored(grid)


# -- what is refused at the start ---------------------------------------------------------------


@LOOPS
@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ("expired", ["certificate has expired"]),
        ("not yet valid", ["certificate is not yet valid"]),
        ("of another host", ["not valid for 'localhost'"]),
        ("of another authority", ["certificate", "ssl_ca_certs"]),
    ],
)
@in_loop
async def test_a_servers_certificate_that_is_wrong_stops_the_start(
    pki: Pki, server: TlsServer, shown: str, words: list[str], loop: str
) -> None:
    with showing(server, pki, shown):
        text = await refused(server.at(ssl_ca_certs=pki.ours.cert))
    for word in words:
        assert word in text
    assert str(pki.folder) not in text


@LOOPS
@in_loop
async def test_without_an_authority_the_systems_count(
    pki: Pki, server: TlsServer, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    text = await refused(server.at())
    assert "self-signed certificate in certificate chain" in text
    assert "ssl_ca_certs" in text
    monkeypatch.setenv("SSL_CERT_FILE", str(pki.ours.cert))
    async with opened(server.at()) as grid:
        await stored(grid)
    # Who names an authority trusts no other.
    assert "ssl_ca_certs" in await refused(server.at(ssl_ca_certs=pki.others.cert))


@in_loop
async def test_the_host_is_not_checked_where_nobody_wants_it_and_the_chain_is(
    pki: Pki, server: TlsServer
) -> None:
    unnamed = {"ssl_check_hostname": "false"}
    with showing(server, pki, "of another host"):
        async with opened(server.at(ssl_ca_certs=pki.ours.cert, **unnamed)) as grid:
            await stored(grid)
        assert "ssl_ca_certs" in await refused(server.at(ssl_ca_certs=pki.others.cert, **unnamed))
    with showing(server, pki, "expired"):
        text = await refused(server.at(ssl_ca_certs=pki.ours.cert, **unnamed))
        assert "certificate has expired" in text


@LOOPS
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, "ssl_certfile"),
        ("stranger", "does not accept our certificate (ssl_certfile)"),
        ("old client", "does not accept our certificate (ssl_certfile): certificate expired"),
    ],
)
@in_loop
async def test_a_certificate_of_ours_that_is_wrong_stops_the_start(
    pki: Pki, strict: TlsServer, name: str | None, words: str, loop: str
) -> None:
    ours = {} if name is None else shown_by(pki[name])
    for version in ("TLSv1.2", "TLSv1.3"):  # it is told within the handshake, or after
        strict.admin.config_set("tls-protocols", version)
        for _ in range(20):  # what the server says last may cross with what we write
            assert words in await refused(strict.at(ssl_ca_certs=pki.ours.cert, **ours))


@LOOPS
@in_loop
async def test_each_scheme_at_the_others_port_names_the_other(
    pki: Pki, server: TlsServer, loop: str
) -> None:
    for url, hint in (
        (f"redis://localhost:{server.tls_port}", "the scheme is rediss://"),
        (f"rediss://localhost:{server.port}?ssl_ca_certs={pki.ours.cert}", "is redis://"),
    ):
        grid = RedisGrid.from_connection_string(url, timeout=0.5)
        with pytest.raises((GridUnavailable, SettingsError), match=hint):
            await grid.open()
        await grid.close()


# -- files that cannot be used ------------------------------------------------------------------

Files = Callable[[Pki, Path], dict[str, Path]]


def ca(name: str) -> Files:
    return lambda pki, folder: {"ssl_ca_certs": folder / name}


def own(cert: str, key: str | None) -> Files:
    def files(pki: Pki, folder: Path) -> dict[str, Path]:
        known = {
            "cert": pki["client"].cert,
            "key": pki["client"].key,
            "stranger's key": pki["stranger"].key,
        }
        named = {"ssl_certfile": cert} | ({} if key is None else {"ssl_keyfile": key})
        return {option: known.get(name, folder / name) for option, name in named.items()}

    return files


PEM = "it holds no certificate in PEM form"
KEY = "it holds no private key in PEM form"
MISSING = "No such file or directory"
LOCKED = "it is encrypted; it has to be readable without a password"
FILES: dict[str, tuple[Files, str, str]] = {
    "authority missing": (ca("nothing"), "ssl_ca_certs", MISSING),
    "authority a folder": (ca("."), "ssl_ca_certs", "Is a directory"),
    "authority empty": (ca("empty"), "ssl_ca_certs", PEM),
    "authority of text": (ca("text"), "ssl_ca_certs", PEM),
    "authority cut off": (ca("cut"), "ssl_ca_certs", PEM),
    "certificate missing": (own("nothing", "key"), "ssl_certfile", MISSING),
    "certificate of text": (own("text", "key"), "ssl_certfile", PEM),
    "certificate a key": (own("key", "key"), "ssl_certfile", PEM),
    "certificate without key": (own("cert", None), "ssl_certfile", KEY),
    "certificate with a locked key": (own("cert and locked", None), "ssl_certfile", LOCKED),
    "key missing": (own("cert", "nothing"), "ssl_keyfile", MISSING),
    "key of text": (own("cert", "text"), "ssl_keyfile", KEY),
    "key a certificate": (own("cert", "cert"), "ssl_keyfile", KEY),
    "key locked": (own("cert", "locked"), "ssl_keyfile", LOCKED),
    "key another's": (
        *(own("cert", "stranger's key"), "ssl_keyfile"),
        "it is not the key of the certificate",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_used_is_named_by_its_part(
    pki: Pki, tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    client, (files, part, why) = pki["client"], FILES[case]
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text(PASSWORD)
    (tmp_path / "cut").write_bytes(pki.ours.cert.read_bytes()[:200])
    locked = encrypted(client.key)
    (tmp_path / "locked").write_bytes(locked.read_bytes())
    (tmp_path / "cert and locked").write_bytes(client.cert.read_bytes() + locked.read_bytes())
    options = {"ssl_ca_certs": pki.ours.cert} | files(pki, tmp_path)
    query = "&".join(f"{name}={str(path).replace(' ', '%20')}" for name, path in options.items())
    with pytest.raises(SettingsError) as caught:
        RedisGrid.from_connection_string(f"rediss://localhost?{query}")
    assert str(caught.value) == f"connection_string: {part} cannot be used: {why}"
    assert caught.value.option == "connection_string"
    assert caught.value.__cause__ is None
    assert capfd.readouterr() == ("", "")  # nobody is asked for a password


@pytest.mark.parametrize("part", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_a_file_that_may_not_be_read_is_named_by_its_part(pki: Pki, part: str) -> None:
    client = pki["client"]
    files = {"ssl_ca_certs": pki.ours.cert, "ssl_certfile": client.cert, "ssl_keyfile": client.key}
    query = []
    with open_folder() as folder:
        for name, file in files.items():
            copy = folder / name
            copy.write_bytes(file.read_bytes())
            copy.chmod(0o000 if name == part else 0o644)
            query.append(f"{name}={copy}")
        with as_nobody(), pytest.raises(SettingsError) as caught:
            RedisGrid.from_connection_string(f"rediss://localhost?{'&'.join(query)}")
    assert str(caught.value) == f"connection_string: {part} cannot be used: Permission denied"


# -- while a worker runs ------------------------------------------------------------------------


@LOOPS
@pytest.mark.parametrize(
    ("shown", "words"),
    [("expired", "has expired"), ("of another host", "'localhost'"),
     ("of another authority", "ssl_ca_certs")],
)  # fmt: skip
@in_loop
async def test_a_certificate_that_goes_bad_is_an_outage(
    pki: Pki, server: TlsServer, shown: str, words: str, loop: str
) -> None:
    async with opened(server.at(ssl_ca_certs=pki.ours.cert)) as grid:
        await stored(grid)
        with showing(server, pki, shown):
            assert words in await outage(grid)
        await back(grid)


@LOOPS
@in_loop
async def test_an_authority_that_is_replaced_counts_from_the_next_connection_on(
    pki: Pki, server: TlsServer, tmp_path: Path, loop: str
) -> None:
    trusted = tmp_path / "ca.pem"
    trusted.write_bytes(pki.ours.cert.read_bytes())
    async with opened(server.at(ssl_ca_certs=trusted)) as grid:
        await stored(grid)
        with showing(server, pki, "of another authority"):
            await outage(grid)
            trusted.write_bytes(pki.others.cert.read_bytes())  # in place: the same file
            await back(grid)


@in_loop
async def test_a_certificate_of_ours_that_is_replaced_counts_from_the_next_connection_on(
    pki: Pki, strict: TlsServer, tmp_path: Path
) -> None:
    ours = pki.copies(tmp_path, "client")
    url = strict.at(ssl_ca_certs=pki.ours.cert, ssl_certfile=ours.cert, ssl_keyfile=ours.key)
    async with opened(url) as grid:
        await stored(grid)
        ours.replace_by(pki["stranger"])
        await stored(grid)  # the connection that there is stays
        strict.cut()
        await outage(grid)
        ours.replace_by(pki["client"])
        await back(grid)


@in_loop
async def test_files_that_cannot_be_used_any_more_leave_what_was_read_before(
    pki: Pki, strict: TlsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "gridsession")
    ours = pki.copies(tmp_path, "client")
    url = strict.at(ssl_ca_certs=pki.ours.cert, ssl_certfile=ours.cert, ssl_keyfile=ours.key)

    def told() -> list[str]:
        return [text for text in caplog.messages if "cannot be used" in text]

    async with opened(url) as grid:
        ours.key.write_bytes(pki["stranger"].key.read_bytes())  # half of a renewal
        for _ in range(3):
            strict.cut()
            await back(grid)
        assert told() == [
            "connection_string: ssl_keyfile cannot be used: it is not the key of the certificate; "
            "what was read before stays in use until it can be"
        ]
        ours.cert.unlink()
        strict.cut()
        await back(grid)
        assert len(told()) == 2
        assert MISSING in told()[1]
        ours.replace_by(pki["stranger"])  # whole again, and so in use
        strict.cut()
        await outage(grid)


def test_files_are_read_again_only_when_they_were_replaced(pki: Pki, tmp_path: Path) -> None:
    ours = pki.copies(tmp_path, "client")
    address = parse(f"rediss://h?ssl_certfile={ours.cert}&ssl_keyfile={ours.key}")
    assert isinstance(address, RedisAddress)
    tls = Tls.of(address)
    first = tls.context()
    assert tls.context() is first
    ours.replace_by(pki["stranger"])
    second = tls.context()
    assert second is not first
    assert tls.context() is second


# -- the contract -------------------------------------------------------------------------------


class TestRedisOverTls(OnASetClock, GridContract):
    """With a certificate of its own, by a clock that a test sets."""

    @pytest.fixture(autouse=True)
    def use_server(self, pki: Pki, strict: TlsServer) -> None:
        client = pki["client"]
        strict.admin.config_set("tls-protocols", "TLSv1.3")
        self.url = strict.at(
            ssl_ca_certs=pki.ours.cert, ssl_certfile=client.cert, ssl_keyfile=client.key
        )
