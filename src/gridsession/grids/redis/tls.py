"""How connections are encrypted."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gridsession.errors import SettingsError
from gridsession.sources.address_parts import wrong
from gridsession.sources.connection_string import RedisAddress

_NO_CERTIFICATE = "it holds no certificate in PEM form"
_NO_KEY = "it holds no private key in PEM form"
_REASONS = {  # OpenSSL's, where it has any
    "KEY_VALUES_MISMATCH": "it is not the key of the certificate",
    "CA_MD_TOO_WEAK": "it is signed by too weak an algorithm",
    "CA_KEY_TOO_SMALL": "the key of its authority is too small",
    "EE_KEY_TOO_SMALL": "its key is too small",
}
_Stamp = tuple[tuple[int, ...] | None, ...]

log = logging.getLogger("gridsession")


@dataclass(frozen=True, kw_only=True, repr=False)
class TlsOptions:
    """What is trusted, and what is shown; the names are those of redis-py.

    Attributes:
        named_by: what the options are parts of, for errors: `connection_string` or `client`.
        ssl_ca_certs, ssl_ca_path, ssl_ca_data: authorities, as a PEM file, a folder of them, or
            the certificates themselves; with none of these, the system's.
        trusts_system: the system's authorities count beside those named.
        ssl_certfile, ssl_keyfile: PEM files of our own certificate and its key; one file may hold
            both.
        ssl_password: of the key.
        ssl_check_hostname: the certificate must name the host.
        ssl_cert_reqs: whether the server's certificate is checked at all.
        ssl_include_verify_flags, ssl_exclude_verify_flags: set and cleared beside the usual ones.
        ssl_min_version: the oldest TLS spoken; None for Python's choice.
        ssl_ciphers: in OpenSSL's notation; None for Python's choice.
    """

    named_by: str
    ssl_ca_certs: str | None = None
    ssl_ca_path: str | None = None
    ssl_ca_data: str | bytes | None = None
    trusts_system: bool = False
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_password: str | bytes | None = None
    ssl_check_hostname: bool = True
    ssl_cert_reqs: ssl.VerifyMode = ssl.CERT_REQUIRED
    ssl_include_verify_flags: tuple[ssl.VerifyFlags, ...] = ()
    ssl_exclude_verify_flags: tuple[ssl.VerifyFlags, ...] = ()
    ssl_min_version: ssl.TLSVersion | None = None
    ssl_ciphers: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Which are read."""
        every = (self.ssl_ca_certs, self.ssl_certfile, self.ssl_keyfile)
        return tuple(file for file in every if file)

    def make(self) -> ssl.SSLContext:
        """A context by these options.

        Raises:
            SettingsError: names the one that cannot be used.
        """
        context = self._trusting()
        context.check_hostname = self.ssl_check_hostname and self.ssl_cert_reqs is not ssl.CERT_NONE
        context.verify_mode = self.ssl_cert_reqs
        for flag in self.ssl_include_verify_flags:
            context.verify_flags |= flag
        for flag in self.ssl_exclude_verify_flags:
            context.verify_flags &= ~flag
        if self.ssl_min_version is not None:
            with self._part("ssl_min_version", "there is no such version"):
                context.minimum_version = self.ssl_min_version
        if self.ssl_ciphers is not None:
            with self._part("ssl_ciphers", "none of them is known"):
                context.set_ciphers(self.ssl_ciphers)
        if self.ssl_keyfile and not self.ssl_certfile:
            raise self._wrong("ssl_keyfile", "it needs ssl_certfile")
        if self.ssl_certfile:
            self._show(context, self.ssl_certfile)
        return context

    def _trusting(self) -> ssl.SSLContext:
        cafile, capath = self.ssl_ca_certs or None, self.ssl_ca_path or None
        cadata = self.ssl_ca_data or None
        # One by one at first, so that an error can name the one.
        if cafile is not None:
            with self._part("ssl_ca_certs", _NO_CERTIFICATE):
                _bare().load_verify_locations(cafile=cafile)
        if cadata is not None:
            with self._part("ssl_ca_data", _NO_CERTIFICATE):
                _bare().load_verify_locations(cadata=cadata)
        with self._part("ssl_ca_certs" if capath is None else "ssl_ca_path", _NO_CERTIFICATE):
            context = ssl.create_default_context(cafile=cafile, capath=capath, cadata=cadata)
        if self.trusts_system:
            context.load_default_certs()
        return context

    def _show(self, context: ssl.SSLContext, certfile: str) -> None:
        keyfile = self.ssl_keyfile or None
        key_in = "ssl_certfile" if keyfile is None else "ssl_keyfile"
        # One by one, for OpenSSL does not say which of the two it could not use.
        with self._part("ssl_certfile", _NO_CERTIFICATE):
            _bare().load_verify_locations(cafile=certfile)
        if keyfile is not None:
            with self._part("ssl_keyfile", _NO_KEY), open(keyfile, "rb") as opened:
                opened.read(1)
        no_key = _NO_KEY if self.ssl_password is None else f"{_NO_KEY}, or ssl_password is wrong"
        with self._part(key_in, no_key):
            context.load_cert_chain(certfile, keyfile, password=self._password(key_in))

    def _password(self, key_in: str) -> str | bytes | Callable[[], str]:
        if self.ssl_password is not None:
            return self.ssl_password

        def none() -> str:  # else OpenSSL would ask whoever sits at the terminal
            raise self._wrong(key_in, "it is encrypted; it has to be readable without a password")

        return none

    @contextmanager
    def _part(self, name: str, otherwise: str) -> Iterator[None]:
        """Names the option whose value cannot be used, and shows nothing of it.

        Args:
            name: the option's.
            otherwise: what is wrong where OpenSSL does not say.
        """
        try:
            yield
        except ssl.SSLError as error:
            raise self._wrong(name, _REASONS.get(_reason(error), otherwise)) from None
        except OSError as error:
            raise self._wrong(name, error.strerror or type(error).__name__) from None
        except (TypeError, ValueError) as error:
            if isinstance(error, SettingsError):
                raise
            raise self._wrong(name, otherwise) from None

    def _wrong(self, name: str, why: str) -> SettingsError:
        return wrong(f"{name} cannot be used: {why}", self.named_by)


class Tls:
    """Has the context of each connection, and makes a new one when a file of it was replaced.

    Certificates that are renewed while a worker runs are so in use from the next connection on.

    Args:
        options: what it is made by.

    Raises:
        SettingsError: a file cannot be read, or is no certificate or key.
    """

    def __init__(self, options: TlsOptions) -> None:
        self._options = options
        self._stamp = self._look()  # of what is in use
        self._refused: _Stamp | None = None  # of what could not be used, and is told
        self._context = options.make()

    @classmethod
    def of(cls, address: RedisAddress) -> Tls:
        """What a connection string asks for."""
        return cls(
            TlsOptions(
                named_by="connection_string",
                ssl_ca_certs=address.ssl_ca_certs,
                ssl_certfile=address.ssl_certfile,
                ssl_keyfile=address.ssl_keyfile,
                ssl_check_hostname=address.ssl_check_hostname,
            )
        )

    def context(self) -> ssl.SSLContext:
        """For the next connection. What cannot be made anew, half written, stays as it was."""
        stamp = self._look()  # ahead of reading: what is replaced meanwhile is seen next time
        if stamp != self._stamp:
            try:
                self._context = self._options.make()
            except SettingsError as error:
                if stamp != self._refused:
                    self._refused = stamp
                    log.warning("%s; what was read before stays in use until it can be", error)
            else:
                self._stamp = stamp
        return self._context

    def _look(self) -> _Stamp:
        found: list[tuple[int, ...] | None] = []
        for file in self._options.files:
            try:
                status = os.stat(file)
            except OSError:
                found.append(None)
            else:
                # The second time changes also where a copy keeps the first of its original.
                times = (status.st_mtime_ns, status.st_ctime_ns)
                found.append((*times, status.st_ino, status.st_size))
        return tuple(found)


_UNSIGNED = (18, 19, 20, 21)  # OpenSSL's codes for a chain that ends at nobody who is trusted
_ALERTS = {  # of a server; what follows its name
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": (
        "wants a certificate of its clients: name ssl_certfile and ssl_keyfile"
    ),
    "SSLV3_ALERT_HANDSHAKE_FAILURE": (
        "broke off the TLS handshake: it may want a certificate of its clients (ssl_certfile and "
        "ssl_keyfile), or have no cipher in common with us"
    ),
    "TLSV1_ALERT_UNKNOWN_CA": (
        "does not accept our certificate (ssl_certfile): it does not trust who signed it"
    ),
}


def meaning_of(error: ssl.SSLError) -> str:
    """Why a connection could not be encrypted, in words that follow the server's name."""
    if isinstance(error, ssl.SSLCertVerificationError):
        signed = "; ssl_ca_certs names who may have signed it"
        hint = signed if error.verify_code in _UNSIGNED else ""
        return f"has a certificate that is not accepted: {error.verify_message}{hint}"
    reason = _reason(error)
    if reason in _ALERTS:
        return _ALERTS[reason]
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return "does not speak TLS; without it the scheme is redis://"
    words = reason.replace("_", " ").lower()
    what = words.partition(" alert ")[2]
    if "certificate" in what:
        return f"does not accept our certificate (ssl_certfile): {what}"
    return f"cannot be spoken to by TLS: {words}"


def _reason(error: ssl.SSLError) -> str:
    return getattr(error, "reason", None) or "FAILED"  # Python's own have none


def _bare() -> ssl.SSLContext:
    """A context to try things with."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
