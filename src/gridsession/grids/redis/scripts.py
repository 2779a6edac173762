"""The scripts that run at the server, one for each operation, and the numbers they answer with."""

from __future__ import annotations

from hashlib import sha1
from importlib.resources import files
from typing import NamedTuple

OK, GRANTED, BUSY, QUEUE_FULL, GONE_OR_MISSING, REFUSED, LOCK_LOST, EXISTS, UNINDEXED = range(9)

_FOLDER = files(__package__) / "lua"
_RULES = (_FOLDER / "record.lua").read_text(encoding="utf-8")


class Script(NamedTuple):
    """A script, and the name under which a server that has seen it knows it."""

    source: bytes
    sha: bytes


def _load(name: str, rules: str = _RULES) -> Script:
    head, _, body = (_FOLDER / f"{name}.lua").read_text(encoding="utf-8").partition("\n")
    source = f"{head}\n{rules}\n{body}".encode()  # the first line has to stay the first
    return Script(source, sha1(source, usedforsecurity=False).hexdigest().encode("ascii"))


CREATE = _load("create")
ACQUIRE = _load("acquire")
READ = _load("read")
WATCH = _load("watch")
COMMIT = _load("commit")
RELEASE = _load("release")
RENEW = _load("renew")
TOUCH = _load("touch")
REMOVE = _load("remove")
SWEEP = _load("sweep")
INDEX = _load("index")
PERMITTED = _load("permitted", rules="")  # for a user who may perhaps not even ask the time
