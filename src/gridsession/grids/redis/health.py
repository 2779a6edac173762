"""What a server says of itself, and what of it endangers sessions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_FULL = 0.8  # of maxmemory
_CROWDED = 0.8  # of maxclients


@dataclass(frozen=True)
class Concern:
    """Something about a server that an operator should know.

    Attributes:
        what: what there is, and what it means for sessions.
        do: what to do.
        at_start: worth a line in the log of each worker that starts. What many choose with open
            eyes is not: `gridsession doctor` says it to whoever asks.
    """

    what: str
    do: str
    at_start: bool = True


def told(info: bytes | str) -> Mapping[str, str]:
    """The fields of an `INFO` reply."""
    text = info.decode("utf-8", "replace") if isinstance(info, bytes) else info
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: value.strip() for name, value in pairs}


def number(fields: Mapping[str, str], name: str) -> int | None:
    """A field that is a whole number; None where it is none, or not there."""
    text = fields.get(name, "")
    return int(text) if text.lstrip("-").isdecimal() else None


def concerns(info: bytes | str) -> list[str]:
    """What is logged when a worker starts, a sentence each.

    Args:
        info: a reply to `INFO` with memory, persistence and replication.
    """
    return [f"{one.what}; {one.do}" for one in examined(told(info)) if one.at_start]


def examined(fields: Mapping[str, str]) -> list[Concern]:
    """All that is to be said of a server.

    Args:
        fields: of `INFO`, and `save` of the configuration where that is known; what is not among
            them is not judged.
    """
    return [*_of_memory(fields), *_of_persistence(fields), *_of_connections(fields)]


def _of_memory(fields: Mapping[str, str]) -> list[Concern]:
    found = []
    policy = fields.get("maxmemory_policy", "noeviction")
    most, used = number(fields, "maxmemory"), number(fields, "used_memory")
    if policy != "noeviction":
        # Without a limit nothing is evicted, until somebody sets one.
        when = "when it is full" if most else "as soon as a maxmemory is set and reached"
        found.append(
            Concern(
                f"maxmemory-policy is {policy}: the server throws sessions away {when}, and "
                "says nothing",
                "set noeviction: a full server then refuses new data, and requests are answered "
                "503",
                at_start=bool(most),
            )
        )
    if most == 0:
        found.append(
            Concern(
                "maxmemory is not set: the server takes memory until the system ends it",
                "set it to what the machine can spare, with room for a snapshot's copies (half to "
                "three quarters of its memory)",
                at_start=False,
            )
        )
    if most and used is not None and used > _FULL * most:
        found.append(
            Concern(
                f"the server's memory is {used / most:.0%} full",
                "raise maxmemory, shorten timeout, or store less in each session",
            )
        )
    return found


def _of_persistence(fields: Mapping[str, str]) -> list[Concern]:
    found = []
    if fields.get("aof_enabled") == "0":
        replicas = number(fields, "connected_slaves")
        if _has_snapshots(fields):
            found.append(
                Concern(
                    "appendonly is off and snapshots are on: a crash of the server takes back "
                    "what came after the last one, logins, logouts and ends among it",
                    "set appendonly to yes, if that is too much",
                    at_start=False,
                )
            )
        else:
            found.append(
                Concern(
                    "appendonly is off, and the server has made no snapshot since it started: if "
                    "it restarts it may come back empty, and every user is logged out"
                    + ("; its replicas are then emptied, too" if replicas else ""),
                    "set appendonly to yes, unless that is meant",
                )
            )
    if fields.get("rdb_last_bgsave_status", "ok") != "ok":
        found.append(
            Concern(
                "the server's last snapshot failed: it refuses writes then, unless it is told "
                "not to (stop-writes-on-bgsave-error)",
                "look at its log; its disk may be full, or not its own to write",
            )
        )
    for name, what in (
        ("aof_last_write_status", "the server's last write to its append-only file failed"),
        ("aof_last_bgrewrite_status", "the server's last rewrite of its append-only file failed"),
    ):
        if fields.get(name, "ok") != "ok":
            found.append(Concern(what, "look at its log; its disk may be full"))
    return found


def _has_snapshots(fields: Mapping[str, str]) -> bool:
    """It is told to make some, or has made one since it started, or began with one."""
    made, loaded = number(fields, "rdb_saves"), number(fields, "rdb_last_load_keys_loaded")
    return bool(fields.get("save") or made or loaded)


def _of_connections(fields: Mapping[str, str]) -> list[Concern]:
    most, now = number(fields, "maxclients"), number(fields, "connected_clients")
    if not most or now is None or now <= _CROWDED * most:
        return []
    return [
        Concern(
            f"the server has {now} of the {most} connections that its maxclients allows",
            "raise maxclients; each worker has one connection, and a second one while somebody "
            "waits for a lock",
        )
    ]
