"""The scripts that run at the server, one for each operation, and the numbers they answer with."""

from __future__ import annotations

import re
from hashlib import sha1
from importlib.resources import files
from typing import NamedTuple

OK, GRANTED, BUSY, QUEUE_FULL, GONE_OR_MISSING, REFUSED, LOCK_LOST, EXISTS, UNINDEXED = range(9)
CONFLICT, LOCKED = 9, 10

_FOLDER = files(__package__) / "lua"
_RULES = (_FOLDER / "record.lua").read_text(encoding="utf-8")
_COMMENT = re.compile(r"--.*")  # no string of ours has two dashes
_CONSTANTS = re.compile(r"^local ([A-Z_, ]+) =\s+([\d., ]+)$", re.MULTILINE)
_DEFINED = re.compile(r"^local (?:function )?([a-z_]+(?:, [a-z_]+)*)", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z_]+")


class Script(NamedTuple):
    """A script.

    Attributes:
        sha: the name under which a server that has seen it knows it.
        repeats: it is sent once more where the connection is lost; its tokens say that it is the
            same call.
    """

    source: bytes
    sha: bytes
    repeats: bool


def _load(name: str, rules: str = _RULES, *, repeats: bool = True) -> Script:
    head, _, body = (_FOLDER / f"{name}.lua").read_text(encoding="utf-8").partition("\n")
    source = f"{head}\n{_needed(rules, body)}\n".encode()  # the first line has to stay the first
    sha = sha1(source, usedforsecurity=False).hexdigest().encode("ascii")
    return Script(source, sha, repeats)


def _needed(rules: str, body: str) -> str:
    """A script's body, ahead of it only what it uses of the rules; numbers in place of their names.

    A server runs the whole text at each call: to make all functions anew, with all the names that
    they refer to, took a third of its time.
    """
    rules, body = _COMMENT.sub("", rules), _COMMENT.sub("", body)
    numbers = {
        name.strip(): number.strip()
        for names, values in _CONSTANTS.findall(rules)
        for name, number in zip(names.split(","), values.split(","), strict=True)
    }
    parts = [body]
    wanted = set(_WORD.findall(body))
    # From the last to the first: a function refers only to those above it.
    for part in reversed(re.split(r"\n\s*\n", _CONSTANTS.sub("", rules))):
        defined = {name for names in _DEFINED.findall(part) for name in names.split(", ")}
        if defined & wanted:
            parts.insert(0, part)
            wanted |= set(_WORD.findall(part))
    text = _WORD.sub(lambda word: numbers.get(word[0], word[0]), "\n".join(parts))
    return re.sub(r"\n\s*\n", "\n", text).strip()


# Not repeated: its first try may arrive late, by way of a proxy, when the session that the second
# made is removed already, and would bring it back.
CREATE = _load("create", repeats=False)
ACQUIRE = _load("acquire")
READ = _load("read")
WATCH = _load("watch")
COMMIT = _load("commit")
# Not repeated either: where more than eight others have committed meanwhile, it would be told that
# it conflicts with itself. The caller can tell, for it knows what its commit was based on.
COMMIT_IF = _load("commit_if", repeats=False)
RELEASE = _load("release")
RENEW = _load("renew")
TOUCH = _load("touch")
REMOVE = _load("remove")
SWEEP = _load("sweep")
INDEX = _load("index")
PERMITTED = _load("permitted", rules="")  # for a user who may perhaps not even ask the time
