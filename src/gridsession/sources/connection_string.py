"""Connection strings: which grid, where it is, how to get in; and how to show one safely.

    memory:                                          one process
    embedded:[///path][?max_size=512MiB&durable=true]   one machine
    redis://…, rediss://…, redis+unix://…, redis+sentinel://…, redis+cluster://…,
    bootstrapGateways=…                              a farm; see `redis_forms`
    anything://…                                     a grid that an installed package brings

Everything is checked here, before anything is opened. A password that nobody encoded can come to
lie anywhere in such a string, so errors name the part that is wrong and never repeat it.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote

from gridsession.sources.address_parts import bool_of, wrong
from gridsession.sources.redis_address import RedisAddress
from gridsession.sources.redis_forms import GATEWAY_KEYS, SCHEMES, parse_gateways, parse_url

__all__ = [
    "Address",
    "EmbeddedAddress",
    "MemoryAddress",
    "OtherAddress",
    "RedisAddress",
    "parse",
    "redacted",
    "shown",
]

MIN_SIZE = 1 << 20  # bytes; below, the reserve for releases would be a page or two
MAX_SIZE = 1 << 46  # bytes; half of what a process can map
PAGE = 4096


@dataclass(frozen=True, repr=False)
class MemoryAddress:
    """Sessions of one process.

    Attributes:
        notes: what was accepted and has no effect; nothing.
    """

    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "MemoryAddress()"


@dataclass(frozen=True, repr=False)
class EmbeddedAddress:
    """Sessions of one machine.

    Attributes:
        path: the folder, absolute; None for the default one.
        max_size: bytes of the file, a whole number of pages; None for the default size.
        durable: every commit is on disk before it is answered.
        notes: what was accepted and has no effect; nothing.
    """

    path: str | None = None
    max_size: int | None = None
    durable: bool = False
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        size, durable = self.max_size, self.durable
        return f"EmbeddedAddress({shown(self)!r}, max_size={size}, durable={durable})"


@dataclass(frozen=True, repr=False)
class OtherAddress:
    """A grid that another package brings; it reads the connection string itself.

    Attributes:
        scheme: in lower case.
        notes: what was accepted and has no effect; nothing.
        is_url: two slashes follow the scheme. Without them, what was taken for a scheme may be a
            user's name before a password, and is not shown.
    """

    scheme: str
    notes: tuple[str, ...] = ()
    is_url: bool = False

    def __repr__(self) -> str:
        return f"OtherAddress({shown(self)!r})"


Address = MemoryAddress | EmbeddedAddress | RedisAddress | OtherAddress

_OURS = ("memory", "embedded", *SCHEMES)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{1,40}")
_KEYWORD = re.compile(r"\s*([A-Za-z_][A-Za-z_ ]{0,40})=")  # not a URL: `bootstrapGateways=…`
# What others write for ours, too far from it to be seen as a slip.
_NEAR = {
    "valkey": "redis",
    "valkeys": "rediss",
    "unix": "redis+unix",
    "redis+socket": "redis+unix",
    "redis-socket": "redis+unix",
    "redis+tls": "rediss",
    "redis+ssl": "rediss",
    "rediss+unix": "redis+unix",
    "sentinel": "redis+sentinel",
    "cluster": "redis+cluster",
    "embed": "embedded",
    "lmdb": "embedded",
    "mem": "memory",
}
_WRITE = "write embedded:///path, memory:// or redis://host:6379"


def parse(connection_string: str, *, offered: Callable[[], Collection[str]] = tuple) -> Address:
    """What a connection string says.

    Args:
        connection_string: as the module's docstring has it; the scheme in any case.
        offered: asked for the schemes that installed packages bring, in lower case, where it is
            none of ours; they are never taken for slips.

    Returns:
        The address of one of our grids, checked; or the scheme of another's, the rest unread.

    Raises:
        SettingsError: names the part that is wrong and what to write instead; `option` is
            `connection_string`. Shows neither user nor password, nor what may be one.
    """
    if not isinstance(connection_string, str):
        raise wrong(f"it must be a str, not {type(connection_string).__name__}")
    _check_characters(connection_string)
    if _KEYWORD.match(connection_string):
        return parse_gateways(connection_string)
    scheme, colon, rest = connection_string.partition(":")
    scheme = scheme.lower()
    if scheme in SCHEMES and colon:
        return parse_url(scheme, rest)
    if scheme == "embedded" and colon:
        return _parse_embedded(rest)
    if scheme == "memory" and colon:
        if rest not in ("", "//"):
            raise wrong("memory:// takes neither a path nor options")
        return MemoryAddress()
    return _other(scheme, colon, rest, offered)


def _check_characters(text: str) -> None:
    if not text.strip():
        raise wrong(f"it is empty; {_WRITE}")
    if text != text.strip():
        # Not stripped in silence: whoever else reads the same text would read another one.
        raise wrong(
            "it begins or ends with a space or a line break, as text copied from a file does; "
            "remove it"
        )
    if text[0] in "\"'`" or unicodedata.category(text[0]) in ("Pi", "Pf"):  # typographic ones
        raise wrong("it begins with a quotation mark, as in a .env file; remove the quotes")
    if any(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") for character in text):
        raise wrong(
            "it has a control or an invisible character; remove it, or percent-encode it (a line "
            "break is %0A)"
        )


def _other(
    scheme: str, colon: str, rest: str, offered: Callable[[], Collection[str]]
) -> OtherAddress:
    if not colon or not _SCHEME.fullmatch(scheme):
        raise wrong(f"it has no scheme; {_WRITE}")
    address = OtherAddress(scheme, is_url=rest.startswith("//"))
    if scheme in offered():
        return address
    if not address.is_url:
        # What was taken for a scheme is a host or a user.
        if "@" in rest:
            raise wrong("it has no scheme before user and password; write redis://user:password@…")
        if re.match(r"[0-9]{1,5}(?![^/,?;])", rest):
            raise wrong("it has no scheme before host and port; write redis://host:6379")
    # 0.8 finds one slip in five letters; "redislite" and "memcached" may be somebody else's.
    close = difflib.get_close_matches(scheme, _OURS, n=1, cutoff=0.8)
    near = _NEAR.get(scheme) or next(iter(close), None)
    if near is not None:
        # The scheme itself is not shown: it may be a user's name.
        example = near + (":" if near == "embedded" else "://")
        raise wrong(f"its scheme is unknown; did you mean {example}? There are: {', '.join(_OURS)}")
    return address


# -- embedded -----------------------------------------------------------------------------------

_SIZE = re.compile(r"([0-9]+)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)?", re.IGNORECASE)
_UNITS: dict[str, int] = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_EMBEDDED_OPTIONS = ("max_size", "durable")


def _parse_embedded(rest: str) -> EmbeddedAddress:
    place, _, query = rest.partition("?")
    place = place.removeprefix("//")
    if "#" in rest or (place and not place.startswith("/")):
        raise wrong(
            "an embedded grid lies under an absolute path, with three slashes: "
            "embedded:///var/lib/shop/sessions"
        )
    path = unquote(place, errors="surrogateescape")  # paths are bytes; os.fsdecode has them so
    if "\0" in path:
        raise wrong("a path cannot have a null character")
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _EMBEDDED_OPTIONS:
            known = ", ".join(_EMBEDDED_OPTIONS)
            if difflib.get_close_matches(name[:64].lower(), _EMBEDDED_OPTIONS):
                raise wrong(f"embedded: has no option {name[:64]!r}; there are: {known}")
            # A name that is like none of ours may be anything, a password too.
            raise wrong(f"embedded: has only two options. There are: {known}")
        if name in options:
            raise wrong(f"{name} is named twice; keep one")
        options[name] = value
    size = options.get("max_size")
    durable = options.get("durable", "false")
    always = bool_of(durable)
    if always is None:
        raise wrong(f"durable={durable!r}: write true or false")
    return EmbeddedAddress(
        path if place.strip("/") else None, None if size is None else _size(size), always
    )


def _size(text: str) -> int:
    """Bytes, rounded up to a whole number of pages."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise wrong(f"max_size={text!r} is no size; write 512MiB or 2GiB")
    digits = match[1].lstrip("0") or "0"
    if len(digits) > 20:  # int() itself raises for thousands of them
        raise wrong("max_size is too large for a file")
    size = int(digits) * _UNITS[(match[2] or "").upper()]
    if size < MIN_SIZE:
        raise wrong(f"max_size={text!r} is too small; use 1MiB or more")
    if size > MAX_SIZE:
        raise wrong(f"max_size={text!r} is too large for a file")
    return -(-size // PAGE) * PAGE


# -- shown --------------------------------------------------------------------------------------


def shown(address: Address) -> str:
    """An address for logs and people: `redis://***@cache-1:6379/0`, `embedded:///var/lib/shop`.

    Returns:
        Without credentials and options; `***` where there are credentials.
    """
    match address:
        case MemoryAddress():
            return "memory://"
        case EmbeddedAddress(path=path):
            return f"embedded://{quote(path, errors='surrogateescape')}" if path else "embedded:"
        case RedisAddress():
            return address.shown()
        case OtherAddress(scheme=scheme, is_url=is_url):
            return f"{scheme}://***" if is_url else "***"


_HOST = r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Za-z:.%_-]*\])(?::[0-9]{1,5})?"
_TAIL = re.compile(rf"((?:{_HOST}(?:,{_HOST})*)?)(/[^?#;]*)?([?#;].*)?", re.DOTALL)
_NUMBER = "(?:[0-9]{1,10})?"
_SAFE_PATHS = {  # what may follow the hosts and is no secret; elsewhere nothing
    "redis": f"/{_NUMBER}",
    "rediss": f"/{_NUMBER}",
    "redis+cluster": f"/{_NUMBER}",
    "rediss+cluster": f"/{_NUMBER}",
    "redis+sentinel": rf"/[A-Za-z0-9._-]*(?:/{_NUMBER})?",
    "rediss+sentinel": rf"/[A-Za-z0-9._-]*(?:/{_NUMBER})?",
    "redis+unix": "/.*",
    "embedded": "/.*",
}


def redacted(connection_string: str) -> str:
    """A connection string, right or wrong, without its credentials and options.

    Args:
        connection_string: any text, such as one that `parse` refuses.

    Returns:
        Scheme, hosts and the part behind them, each only where it looks like one; `***` stands
        for everything else, because a password that nobody encoded may hold any character.
    """
    keyword = _KEYWORD.match(connection_string)
    if keyword is not None:
        name = keyword[1].strip()
        known = name.lower() in (*GATEWAY_KEYS, "password", "username")
        return f"{name if known else '***'}=***" + (";***" if ";" in connection_string else "")
    scheme, colon, rest = connection_string.partition(":")
    known = scheme.lower() in _OURS
    if not colon:
        return scheme if known or not scheme else "***"
    slashes = "//" if rest.startswith("//") else ""
    if not known and not (slashes and _SCHEME.fullmatch(scheme.lower())):
        return "***"  # what stands before the colon may be a user
    scheme += colon + slashes
    rest = rest.removeprefix(slashes)
    credentials, at, tail = rest.rpartition("@")
    if scheme.lower().startswith("embedded:") and rest.startswith("/"):
        credentials, at, tail = "", "", rest  # no credentials in a path
    # With one of these before it, an @ may belong to a password among the options.
    found = None if re.search(r"[/?#;]", credentials) else _TAIL.fullmatch(tail)
    if found is None:
        return f"{scheme}***"
    hosts, path, options = found[1], found[2] or "", found[3] or ""
    if path and not re.fullmatch(_SAFE_PATHS.get(scheme.partition(":")[0].lower(), "/"), path):
        path = "/***"
    return scheme + ("***@" if at else "") + hosts + path + (f"{options[0]}***" if options else "")
