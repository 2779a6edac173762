"""A Redis, asked through the grid's own connection what it is and how it keeps what it is given."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gridsession.tools.report import Timing

if TYPE_CHECKING:  # at run time where there is such a grid: not everybody has installed one
    from gridsession.grids.redis import RedisGrid
    from gridsession.grids.redis.link import Link

_PINGS = 50
_LONGEST = 2.0  # seconds that they may take altogether
_KEPT = ("appendfsync", "save")  # of its configuration: what INFO does not say

# What a refusal's text says, and what to do about it.
_CURES = (
    (
        "refused user and password",
        "correct them in the connection string, percent-encoded; an administrator sees by "
        "ACL LIST whether the user is there and on",
    ),
    ("wants a password", "write it: redis://:password@host:6379, or user:password@"),
    ("has no password, and one was given", "take it out of the connection string"),
    (
        "certificate that is not accepted",
        "name the authority that signed it with ?ssl_ca_certs=/path/ca.pem, and the host as the "
        "certificate does; if it has expired, renew it at the server",
    ),
    ("does not speak TLS", "where it speaks no TLS at this port, write redis://"),
    ("if it wants TLS", "write rediss:// where the server wants TLS; else look at its log"),
    ("by TLS: ", "the server may want a certificate: ?ssl_certfile=…&ssl_keyfile=…"),
    (
        "does not permit its user",
        "give the user the ACL rule in docs/farm.md",
    ),
    ("in protected mode", "set a password at the server, or bind it to an address"),
    ("needs 7.0 or newer", "use a newer server"),
    ("has no database of that number", "correct the number after the host, or leave it out: /0"),
    (
        "is a replica",
        "name the primary; after a fail-over it is another one, and its address has to lead to it",
    ),
    ("no grid", "name a single server: redis://host:6379"),
    ("is a Sentinel", "name the server that keeps the data, usually at port 6379"),
    (
        "refuses connections",
        "start the server, or correct host and port; bound to 127.0.0.1 it answers only its own "
        "machine (bind)",
    ),
    ("cannot be resolved", "correct the name, or how this machine resolves names"),
    ("there is no such socket", "correct the path, or start the server"),
    (
        "did not answer",
        "look whether a firewall is in between, and whether the server is stopped or busy; what "
        "only is far away wants a longer grid_timeout",
    ),
    ("is loading", "wait"),
)


def cure(text: str) -> str:
    """What to do about an error of a Redis grid; empty where there is no advice."""
    do = next((do for part, do in _CURES if part in text), "")
    # A server that is asked for TLS at its other port waits for the end of a line.
    is_asked_for_tls = "rediss://" in text and "did not answer" in text
    return f"{do}; where it speaks no TLS at this port, write redis://" if is_asked_for_tls else do


@dataclass(frozen=True)
class ServerFacts:
    """What is known of a server.

    Attributes:
        name, version: as it greets.
        tls: connections are encrypted.
        role: `master`, since others are refused.
        info: the fields of `INFO`; none where its user may not ask.
        kept: of its configuration, how it keeps data on disk; none where its user may not ask.
        may_not_ask: which of the doctor's own questions its user may not ask. Sessions need none
            of them.
        ping: of a call that does nothing.
        clock_difference: seconds by which this machine's clock is ahead of the server's.
    """

    name: str
    version: str
    tls: bool
    role: str
    info: dict[str, str]
    kept: dict[str, str]
    may_not_ask: tuple[str, ...]
    ping: Timing
    clock_difference: float

    def shown(self) -> dict[str, Any]:
        """By the names of the report, in JSON's types; None is unknown."""
        from gridsession.grids.redis.health import number

        info = self.info
        on_disk = info.get("aof_enabled")
        return {
            "server": self.name,
            "version": self.version,
            "tls": self.tls,
            "role": "primary" if self.role == "master" else self.role,
            "replicas": number(info, "connected_slaves"),
            "used_memory_bytes": number(info, "used_memory"),
            "maxmemory_bytes": number(info, "maxmemory"),
            "maxmemory_policy": info.get("maxmemory_policy"),
            "appendonly": None if on_disk is None else on_disk == "1",
            "appendfsync": self.kept.get("appendfsync"),
            "save": self.kept.get("save"),
            "snapshots": number(info, "rdb_saves"),
            "connections": number(info, "connected_clients"),
            "maxclients": number(info, "maxclients"),
            "clock_difference_ms": round(self.clock_difference * 1000, 1),
            "may_not_ask": list(self.may_not_ask),
        }


async def ask(grid: RedisGrid) -> ServerFacts:
    """Ask the server that a grid leads to; nothing is changed there.

    Args:
        grid: opened.

    Raises:
        GridUnavailable: it stopped answering.
    """
    from gridsession.grids.redis.health import told

    link = grid.connections.ends().link
    greeting = await link.call(b"HELLO")
    may_not_ask = []
    info = await _if_permitted(link, b"INFO", b"memory", b"persistence", b"replication", b"clients")
    if info is None:
        may_not_ask.append("INFO")
    kept = await _if_permitted(link, b"CONFIG", b"GET", *_KEPT)
    if kept is None:
        may_not_ask.append("CONFIG GET")
    ping, difference = await _measure(link)
    return ServerFacts(
        name=greeting[b"server"].decode("ascii", "replace"),
        version=greeting[b"version"].decode("ascii", "replace"),
        tls=grid.connections.server.tls is not None,
        role=greeting[b"role"].decode("ascii", "replace"),
        info=dict(told(info or b"")),
        kept={name.decode(): value.decode() for name, value in (kept or {}).items()},
        may_not_ask=tuple(may_not_ask),
        ping=ping,
        clock_difference=difference,
    )


async def _if_permitted(link: Link, *words: bytes | str) -> Any:
    """The reply; None where the server refuses the command, or has renamed it."""
    from gridsession.grids.redis.replies import ServerReply

    try:
        return await link.call(*words)
    except ServerReply:
        return None


async def _measure(link: Link) -> tuple[Timing, float]:
    """How long a call takes, and how far this machine's clock is ahead, in seconds."""
    times: list[float] = []
    quickest, difference = float("inf"), 0.0
    end = time.perf_counter() + _LONGEST
    while len(times) < _PINGS and (not times or time.perf_counter() < end):
        began = time.perf_counter()
        await link.call(b"PING")
        times.append(time.perf_counter() - began)
        asked_at, began = time.time(), time.perf_counter()
        seconds, micros = await link.call(b"TIME")
        took = time.perf_counter() - began
        if took < quickest:  # the least in which something else can have got between
            quickest = took
            difference = asked_at + took / 2 - (int(seconds) + int(micros) / 1e6)
    return Timing.of(times), difference
