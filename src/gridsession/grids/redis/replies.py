"""What a server's error replies mean for us, in words.

A server repeats in some of its errors what it was asked, and what we ask holds secrets (promise
9): so nothing of a reply is shown but its code and, where that is the `ERR` of all the rest, the
plain words that follow it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gridsession.errors import GridFull, GridUnavailable


class ServerReply(Exception):
    """The server answered by an error; the text is the server's, and may hold secrets."""

    @property
    def code(self) -> str:
        """The first word, which says what kind of error it is."""
        return _code(str(self))


class ConnectionLost(GridUnavailable):
    """The connection ended before an answer came. Whoever asked may ask again at once."""


class Misset(GridUnavailable):
    """It will not heal by itself: address, password, permissions, certificate or version."""


class _Meaning(NamedTuple):
    """Of an error reply.

    Attributes:
        text: follows the server's name.
        kind: what is raised.
        ends: the connection is of no use any more; a new one may lead elsewhere, or bring new
            credentials.
    """

    text: str
    kind: type[GridUnavailable | GridFull] = GridUnavailable
    ends: bool = False


_CODES = {
    "LOADING": _Meaning("is loading its data from disk; it answers when that is done"),
    "READONLY": _Meaning(
        "is a replica and takes no writes; it heals with a fail-over, or name its primary",
        ends=True,
    ),
    "MASTERDOWN": _Meaning(
        "is a replica that has lost its primary; it heals with a fail-over, or name its primary",
        ends=True,
    ),
    "OOM": _Meaning(
        "has reached its maxmemory and takes no more session data; raise it, or shorten timeout",
        GridFull,
    ),
    "NOAUTH": _Meaning("wants a password; none was given, or it has one only now", Misset, True),
    "WRONGPASS": _Meaning(
        "refused user and password: they are wrong, or the user is switched off", Misset, True
    ),
    "NOPERM": _Meaning(
        "does not permit its user what sessions need; docs/farm.md has the ACL rule", Misset
    ),
    "NOPROTO": _Meaning("does not speak RESP3; gridsession needs Redis 7.0 or newer", Misset, True),
    "BUSY": _Meaning(
        "is busy with a script that does not end (none of ours takes a millisecond); "
        "SCRIPT KILL ends it"
    ),
    "MISCONF": _Meaning(
        "refuses writes since it could not save its data to disk; its log says why"
    ),
    "NOREPLICAS": _Meaning(
        "refuses writes: fewer replicas follow it than its configuration wants "
        "(min-replicas-to-write)"
    ),
    "UNBLOCKED": _Meaning("was made a replica meanwhile", ends=True),
    "DENIED": _Meaning(
        "is in protected mode and answers only its own machine: set a password or bind it", Misset
    ),
    "WRONGTYPE": _Meaning(
        "holds something else under a name of ours; nothing was changed. Set a namespace, or a db, "
        "that only sessions use"
    ),
    "GSLAYOUT": _Meaning("holds a record that a newer release of gridsession wrote"),
    "MOVED": _Meaning("belongs to a Cluster, and redis:// is for a single server", Misset),
    "CLUSTERDOWN": _Meaning("belongs to a Cluster that is down"),
    "NOSCRIPT": _Meaning("forgets scripts as soon as it has them"),
}
# Said before a script is begun: certainly nothing was carried out.
_BEFORE = {"LOADING", "READONLY", "MASTERDOWN", "NOAUTH", "BUSY", "MISCONF", "NOREPLICAS"}
_TEXTS = (
    (
        "ERR max number of clients",
        _Meaning("has as many connections as its maxclients allows; raise it"),
    ),
    ("ERR DB index", _Meaning("has no database of that number: correct db", Misset)),
    ("ERR unknown command", _Meaning("lacks a command; gridsession needs Redis 7.0", Misset)),
    (
        "ERR AUTH <password> called without",
        _Meaning("has no password, and one was given: remove it", Misset),
    ),
    ("ERR ACL failure in script", _CODES["NOPERM"]),
    ("ERR The user executing the script can't", _CODES["NOPERM"]),
)


def _code(reply: str) -> str:
    return reply.partition(" ")[0]


def meaning_of(reply: str) -> _Meaning:
    """What an error reply means; for one that nobody expects, its code."""
    code = _code(reply)
    for start, meaning in _TEXTS:
        if reply.startswith(start):
            return meaning
    if code in _CODES:
        return _CODES[code]
    if code == "ERR":  # up to where it may begin to repeat something
        words = re.split(r"[^A-Za-z ()-]|script:", reply, maxsplit=1)[0].strip()
        return _Meaning(f"answered: {words[:120]}")
    if re.fullmatch(r"[A-Z]{2,20}", code):
        return _Meaning(f"answered: {code}")
    return _Meaning("answered an error without a code")


def failure(name: str, reply: ServerReply) -> GridUnavailable | GridFull:
    """The exception that tells a caller of a server's error.

    Args:
        name: the server in words.
    """
    meaning = meaning_of(str(reply))
    error = meaning.kind(f"{name} {meaning.text}")
    if isinstance(error, GridUnavailable):
        error.never_asked = reply.code in _BEFORE
    return error
