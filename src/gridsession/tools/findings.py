"""What settings, a grid's folder or server and measured times mean, and what to do. Pure."""

from __future__ import annotations

from gridsession.settings import SessionSettings, seconds
from gridsession.sources.connection_string import EmbeddedAddress, MemoryAddress
from gridsession.sources.keys import PLAIN
from gridsession.tools.place import Facts
from gridsession.tools.redis_server import ServerFacts
from gridsession.tools.report import Finding, Timing, in_words

_PROXY_SECONDS = 60.0  # nginx's proxy_read_timeout, AWS's load balancers
_LITTLE_DISK = 256 << 20  # bytes
_FULL = 0.8  # of the bytes that sessions may take
_SLOW_ROUND_TRIP = 0.050  # seconds; a disk that is waited for twice takes 5 to 20 ms
_SLOW_PING = 0.010  # seconds; within one region 0.1 to 2 ms
_CLOCKS_APART = 1.0  # seconds
_SLOW_HAND_OFF = 0.2  # seconds; above, waiters find out by asking, each second
_IN_MEMORY = ("tmpfs", "ramfs")
_CLIENT_CACHE = (
    "client_cache_type",
    "client_cache_capacity",
    "client_cache_coherency_interval",
)


def of_settings(settings: SessionSettings) -> list[Finding]:
    """What an operator should know of settings that are valid."""
    findings = []
    is_near = isinstance(settings.address(), (MemoryAddress, EmbeddedAddress))
    cache = [name for name in _CLIENT_CACHE if settings.origin(name) != "default"]
    for note in settings.notes:
        if not (is_near and note.startswith((*_CLIENT_CACHE, "if_grid_unavailable"))):
            what, _, do = note.partition("; ")
            findings.append(
                Finding("warning", what, do or "remove it, or accept that it has no effect")
            )
    if is_near:
        findings += [
            Finding(
                "warning",
                f"{name} is set, and not needed: on this grid a read is cheaper than a look-up in "
                "a client cache",
                "leave it out",
            )
            for name in cache
        ]
        if settings.if_grid_unavailable == "read_cached":
            findings.append(
                Finding(
                    "warning",
                    "if_grid_unavailable=read_cached has no effect on this grid: it needs no "
                    "client cache, and nothing is kept in the worker",
                    "leave it out",
                )
            )
    if PLAIN in settings.encryption_keys:
        is_written = settings.encryption_keys[0] == PLAIN
        findings.append(
            Finding(
                "warning",
                "encryption_keys begins with plain: sessions are not encrypted yet"
                if is_written
                else "encryption_keys has plain: sessions that are not encrypted are read, "
                "whoever wrote them",
                "put the key first as soon as all workers have it"
                if is_written
                else "take plain out when all sessions from before encryption are gone",
            )
        )
    if not settings.https_only:
        findings.append(
            Finding(
                "warning",
                "https_only is off: browsers send the session cookie over plain HTTP, too",
                "set https_only=true in production; leave it off for development without TLS",
            )
        )
    if (wait := seconds(settings.lock_wait_timeout)) > _PROXY_SECONDS:
        findings.append(
            Finding(
                "warning",
                f"lock_wait_timeout={wait:g} is longer than most proxies wait for an answer "
                f"({_PROXY_SECONDS:g} s): clients get the proxy's 504 while their request still "
                "waits in line",
                f"set it below your proxy's time-out, such as {_PROXY_SECONDS / 2:g}",
            )
        )
    lease, execution = seconds(settings.lock_lease), seconds(settings.execution_timeout)
    if execution < lease:
        findings.append(
            Finding(
                "warning",
                f"execution_timeout={execution:g} is shorter than lock_lease={lease:g}: a hung "
                "handler's lock lives on until its lease ends",
                f"set lock_lease below {execution:g}, or execution_timeout above {lease:g}",
            )
        )
    return findings


def of_place(facts: Facts) -> list[Finding]:
    """What is to be said of an embedded grid's folder before it is opened."""
    findings = facts.reasons_to_stay_out()
    if facts.is_default:
        findings.append(
            Finding(
                "warning",
                "the connection string names no folder, so it depends on the working directory "
                f"({facts.working_directory}) and on the user ({facts.user}): an application "
                "started elsewhere, or by somebody else, has another store",
                "name one: embedded:///var/lib/shop/sessions; until then, run the doctor in the "
                "application's working directory and as its user",
            )
        )
    if facts.mode is not None and facts.mode & 0o077:
        findings.append(
            Finding(
                "warning",
                f"the folder's permissions are {facts.mode:04o}: other users of this machine can "
                "look into it, or change what is in it",
                "chmod 700 it",
            )
        )
    if facts.owner is not None and facts.owner != facts.user and not facts.is_foreign:
        findings.append(
            Finding(
                "warning",
                f"the folder belongs to {facts.owner}, who can remove what {facts.user} stores",
                f"chown it to {facts.user}",
            )
        )
    if facts.file_system in _IN_MEMORY and facts.durable_asked:
        findings.append(
            Finding(
                "warning",
                f"durable=true on {facts.file_system}: what is flushed there is in memory only, "
                "and gone after a restart of the machine",
                "name a folder on a disk, or leave durable out",
            )
        )
    return findings + _of_room(facts)


def _of_room(facts: Facts) -> list[Finding]:
    findings = []
    if facts.disk_free < _LITTLE_DISK:
        findings.append(
            Finding(
                "warning",
                f"the disk has {facts.disk_free >> 20} MiB left"
                + (
                    "; the store's blocks are reserved, but logs and others need room"
                    if facts.is_reserved
                    else ""
                ),
                "make room on it, or move the store to another disk",
            )
        )
    if facts.size and facts.is_reserved is False and facts.disk_free < facts.size:
        findings.append(
            Finding(
                "warning",
                f"blocks cannot be reserved on {facts.file_system or 'this file system'}, and what "
                "is free on it is less than the store's size: a full disk would stop all writing",
                "make room, set a smaller max_size for a new store, or use ext4 or xfs",
            )
        )
    if facts.size and facts.used is not None and facts.used > _FULL * facts.size:
        findings.append(
            Finding(
                "warning",
                f"the store is {facts.used / facts.size:.0%} full; at 95 % new data is refused "
                "with 503",
                "raise max_size and restart all workers, shorten timeout, or store less in each "
                "session",
            )
        )
    return findings


def of_server(facts: ServerFacts) -> list[Finding]:
    """What is to be said of a Redis."""
    from gridsession.grids.redis.health import examined

    findings = [Finding("warning", one.what, one.do) for one in examined(facts.info | facts.kept)]
    if "INFO" in facts.may_not_ask:
        findings.append(
            Finding(
                "warning",
                "its user may not ask the server for INFO: memory, eviction, persistence and "
                "replicas were not looked at, and are not at the application's start",
                "give the user +info, or run the doctor once with an administrator's connection "
                "string",
            )
        )
    if abs(ahead := facts.clock_difference) > _CLOCKS_APART:
        side = "ahead of" if ahead > 0 else "behind"
        findings.append(
            Finding(
                "warning",
                f"this machine's clock is {abs(ahead):.1f} s {side} the server's, by which "
                "sessions expire: times in logs do not fit together, and expired sessions are "
                "swept at other times",
                "let all machines keep the time (NTP)",
            )
        )
    text = f"{facts.name} {facts.version} answers a PING after {in_words(facts.ping.median)}"
    findings.append(
        Finding(
            "warning",
            f"{text}: each request that uses its session waits for two such ways",
            "bring server and workers nearer to each other, or look at the server's load",
        )
        if facts.ping.median > _SLOW_PING
        else Finding("ok", text)
    )
    return findings


def of_times(
    round_trip: Timing | None, hand_off: Timing | None, *, is_farm: bool = False
) -> list[Finding]:
    """What measured times mean.

    Args:
        is_farm: the grid is a server's, and not a file on this machine.
    """
    findings = []
    if round_trip is not None:
        text = (
            f"reading, locking and committing a session takes {in_words(round_trip.median)} "
            f"(99 of 100: within {in_words(round_trip.p99)})"
        )
        findings.append(
            Finding(
                "warning",
                f"{text}: each request that uses its session takes that much longer",
                "look at the way to the server, and at its load"
                if is_farm
                else "look at the disk (durable=true waits for it) or at the machine's load",
            )
            if round_trip.median > _SLOW_ROUND_TRIP
            else Finding("ok", text)
        )
    if hand_off is not None:
        text = f"a released lock is granted in another process after {in_words(hand_off.median)}"
        findings.append(
            Finding(
                "warning",
                f"{text}: its notice does not arrive, and those who wait find out by asking",
                "look at the server's load, and whether what is in between keeps a second "
                "connection open that is silent"
                if is_farm
                else "look at the machine's load, and whether the processes may write to each "
                "other's sockets (one user, one network namespace, one view of the folder)",
            )
            if hand_off.median > _SLOW_HAND_OFF
            else Finding("ok", text)
        )
    return findings
