"""Certificates as PEM files, who may read them, and a redis-server that speaks TLS by them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from tests.redis_server import RedisServer, free_port

PASSWORD = "hunter2"


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    cert: Path
    key: Path

    def replace_by(self, other: Pair) -> None:
        """As an operator renews: the names stay, and each file is new at once."""
        for mine, theirs in ((self.cert, other.cert), (self.key, other.key)):
            fresh = mine.with_suffix(".new")
            fresh.write_bytes(theirs.read_bytes())
            fresh.replace(mine)


class Authority:
    """Signs certificates.

    Args:
        folder: where it puts its files; its own is `ca.pem` there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ca = trustme.CA()
        self.cert = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.cert)

    def pair(
        self,
        name: str,
        *identities: str,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> Pair:
        """A certificate for some hosts, as `name.crt` and `name.key`."""
        made = self._ca.issue_cert(*identities, not_before=not_before, not_after=not_after)
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        pair.cert.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
        made.private_key_pem.write_to_path(pair.key)
        return pair


def encrypted(key: Path) -> Path:
    """The same key, locked by `PASSWORD`."""
    locked = key.with_suffix(".locked")
    locked.write_bytes(
        load_pem_private_key(key.read_bytes(), None).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSWORD.encode())
        )
    )
    return locked


@contextmanager
def open_folder() -> Iterator[Path]:
    """One that every user may enter, unlike those that pytest makes; with a short path."""
    with tempfile.TemporaryDirectory(prefix="gridsession-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without a superuser's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


class TlsServer(RedisServer):
    """A server that speaks TLS at a port of its own, beside the plain one of its `admin`.

    Args:
        authority: whose clients' certificates it takes.
        pair: its own certificate.
        clients: whether clients have to show one: `yes`, `no` or `optional`.
    """

    def __init__(
        self, folder: Path, authority: Authority, pair: Pair, *, clients: str = "no"
    ) -> None:
        super().__init__(
            folder,
            tls_cert_file=str(pair.cert),
            tls_key_file=str(pair.key),
            tls_ca_cert_file=str(authority.cert),
            tls_auth_clients=clients,
        )
        while (port := free_port()) == self.port:
            pass
        self.tls_port = port
        self.options["tls-port"] = str(port)

    def at(self, host: str = "localhost", **options: Any) -> str:
        """Its connection string."""
        text = "&".join(f"{name}={quote(str(value))}" for name, value in options.items())
        return f"rediss://{host}:{self.tls_port}/0?{text}"

    def show(self, pair: Pair) -> None:
        """Another certificate from the next connection on, and no connection stays."""
        self.admin.config_set("tls-cert-file", str(pair.cert), "tls-key-file", str(pair.key))
        self.cut()

    def cut(self) -> None:
        """End every connection but the one that asks."""
        self.admin.client_kill_filter(_type="normal", skipme=True)
