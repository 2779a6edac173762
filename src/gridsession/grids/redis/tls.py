"""How connections are encrypted."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable

from gridsession.errors import SettingsError
from gridsession.sources.connection_string import RedisAddress

_Stamp = tuple[tuple[int, int] | None, ...]


class Tls:
    """Makes the context of each connection, and a new one when a file of it was replaced.

    Certificates that are renewed while a worker runs are so in use from the next connection on.

    Args:
        make: makes a context.
        files: what it is made of.

    Raises:
        SettingsError: a file cannot be read, or is no certificate or key.
    """

    def __init__(self, make: Callable[[], ssl.SSLContext], files: tuple[str, ...] = ()) -> None:
        self._make = make
        self._files = files
        self._stamp = self._look()
        self._context = make()

    @classmethod
    def of(cls, address: RedisAddress) -> Tls:
        """What a connection string asks for."""

        def make() -> ssl.SSLContext:
            with _Part("ssl_ca_certs"):
                context = ssl.create_default_context(cafile=address.ssl_ca_certs)
            context.check_hostname = address.ssl_check_hostname
            if address.ssl_certfile is not None:
                with _Part("ssl_certfile and ssl_keyfile"):
                    context.load_cert_chain(
                        address.ssl_certfile, address.ssl_keyfile, password=_no_password
                    )
            return context

        files = (address.ssl_ca_certs, address.ssl_certfile, address.ssl_keyfile)
        return cls(make, tuple(file for file in files if file is not None))

    def context(self) -> ssl.SSLContext:
        """For the next connection. What cannot be made anew, half written, stays as it was."""
        stamp = self._look()
        if stamp != self._stamp:
            try:
                self._context = self._make()
            except SettingsError:
                return self._context  # looked at again at the next connection
            self._stamp = stamp
        return self._context

    def _look(self) -> _Stamp:
        found: list[tuple[int, int] | None] = []
        for file in self._files:
            try:
                status = os.stat(file)
            except OSError:
                found.append(None)
            else:
                found.append((status.st_mtime_ns, status.st_ino))
        return tuple(found)


def _no_password() -> str:
    raise SettingsError(
        "connection_string: ssl_keyfile is encrypted; it has to be readable without a password",
        option="connection_string",
    )


class _Part:
    """Names the part of a connection string that names a file which cannot be used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):  # ssl.SSLError is one
            what = (
                (error.reason or "no PEM").replace("_", " ").lower()
                if isinstance(error, ssl.SSLError)
                else error.strerror
            )
            raise SettingsError(
                f"connection_string: {self._name} cannot be used: {what}",
                option="connection_string",
            ) from None
