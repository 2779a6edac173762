"""What the addresses of all grids are made of: errors, words for yes and no, hosts, encoded text.

A connection string holds a password, and a password that nobody encoded can come to lie anywhere
in it. So nothing here repeats a piece of the string: errors name the part and its place.
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from urllib.parse import unquote

from gridsession.errors import SettingsError

ENCODE = (
    "special characters in a password are percent-encoded (@ is %40, : is %3A, / is %2F, ? is %3F, "
    "# is %23)"
)
Hosts = tuple[tuple[str, int], ...]
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?\.?")
_ZONE = re.compile(r"[A-Za-z0-9._-]+")
_PORT = re.compile(r"[0-9]{1,5}")
_BRACKETED = re.compile(r"\[([^\[\]]*)\](?::(.*))?", re.DOTALL)


def wrong(text: str, named_by: str = "connection_string") -> SettingsError:
    """The error for an address.

    Args:
        text: names the part and what to write instead.
        named_by: what gave the address: `connection_string`, or `client` for a ready client.
    """
    option = named_by if named_by == "connection_string" else None
    return SettingsError(f"{named_by}: {text}", option=option)


def bool_of(text: str) -> bool | None:
    """What a word for yes or no says; None where it is none."""
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    return None


def number_of(text: str, low: int, high: int) -> int | None:
    """A whole number in a range, of ASCII digits only; None where it is none."""
    # A bound on the length: int() itself raises for thousands of digits.
    if not re.fullmatch(r"[0-9]{1,10}", text):
        return None
    return number if low <= (number := int(text)) <= high else None


def has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def decoded(part: str, text: str) -> str:
    """Percent-encoded text as what it stands for.

    Args:
        part: its name, for the error.
        text: as it was written. A % without two hexadecimal digits stands for itself, as in
            redis-py.

    Raises:
        SettingsError: the bytes are no UTF-8.
    """
    value = unquote(text, errors="surrogateescape")
    if has_surrogates(value):  # else the grid would send another password than the one meant
        raise wrong(f"{part} is not UTF-8 after decoding; encode each byte of its UTF-8 form")
    return value


def parse_hosts(text: str, default_port: int, *, cure: str = ENCODE) -> Hosts:
    """Hosts and ports, in the order given.

    Args:
        text: `h1:6379,h2,[::1]:6380`.
        default_port: of a host that names none.
        cure: ends an error behind which a password may be that nobody encoded.

    Raises:
        SettingsError: says which host is wrong, by its place.
    """
    pieces = text.split(",")
    hosts: list[tuple[str, int]] = []
    found: dict[tuple[str, int], str] = {}
    for position, piece in enumerate(pieces, 1):
        part = "host" if len(pieces) == 1 else f"host {position} of {len(pieces)}"
        host = _parse_host(piece, part, default_port, cure)
        name, port = host
        if (name.lower(), port) in found:
            raise wrong(f"{part} is the same as {found[name.lower(), port]}; name each once")
        found[name.lower(), port] = part
        hosts.append(host)
    return tuple(hosts)


def _parse_host(piece: str, part: str, default_port: int, cure: str) -> tuple[str, int]:
    bracketed = _BRACKETED.fullmatch(piece)
    if bracketed is not None:
        host, port = _ipv6(bracketed[1]), bracketed[2]
        if host is None:
            raise wrong(f"{part}: what stands in brackets is no IPv6 address; write [::1]:6379")
    else:
        name, colon, digits = piece.partition(":")
        if not name:
            raise wrong(f"{part} is missing; write its name before the port, host:6379; {cure}")
        if ":" in digits:
            raise wrong(
                f"{part} has more than one ':'; an IPv6 address stands in brackets, "
                f"[::1]:6379; {cure}"
            )
        host, port = _name(name), digits if colon else None
        if host is None:
            raise wrong(
                f"{part} is neither a name of letters, digits, '.', '-' and '_' nor an IP "
                f"address; {cure}"
            )
    if port is None:
        return host, default_port
    number = int(port) if _PORT.fullmatch(port) else 0
    if not 1 <= number <= 65535:
        raise wrong(f"the port of {part} must be a number from 1 to 65535; {cure}")
    return host, number


# These return None instead of raising from within `except`: the first error's text repeats what
# it could not read, and a traceback would show it.


def _name(text: str) -> str | None:
    if not _NAME.fullmatch(text) or ".." in text:
        return None
    if not re.fullmatch(r"[0-9.]+", text):
        return text
    try:
        return str(IPv4Address(text))
    except AddressValueError:
        return None


def _ipv6(text: str) -> str | None:
    address, percent, zone = text.partition("%25")  # as RFC 6874 writes a zone
    if percent and not _ZONE.fullmatch(zone):
        return None
    try:
        return str(IPv6Address(address)) + (f"%{zone}" if percent else "")
    except AddressValueError:
        return None


def shown_host(host: str, port: int) -> str:
    """A host and its port as they stand in a connection string."""
    return f"[{host.replace('%', '%25')}]:{port}" if ":" in host else f"{host}:{port}"
