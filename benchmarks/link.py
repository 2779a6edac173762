"""`link`: the CPU time that a client spends on a call of a script at the server.

All peers send the same words to the same server: the real scripts that take a lock and that
commit, in turns, with a payload of 1 KiB that comes with the one and goes with the other. Each
caller has a record of its own and asks again as soon as it is answered. The words are made ahead,
and are what the grid itself sends. CPU time is that of this process with all threads, which is
where valkey-glide works; the server is another process.

The bare loop is the least that asyncio and hiredis could do: an `asyncio.Protocol` that packs,
parses and wakes, with one write a turn of the event loop. It bounds no time, no queue, notices no
lost connection and forgives no cancelled caller.
"""

from __future__ import annotations

import asyncio
import gc
import os
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

from benchmarks.apps import DAY, NAMESPACE
from benchmarks.bare_loop import BareLoop
from benchmarks.redis_server import RedisServer
from benchmarks.report import Check, Options, Result, Table, median, spread
from gridsession.grids.contract import Change, Claim, Granted, NewRecord
from gridsession.grids.redis import RedisGrid
from gridsession.grids.redis.connections import Connections
from gridsession.grids.redis.link import Link
from gridsession.grids.redis.scripts import GRANTED, OK, Script
from gridsession.grids.redis.server import Server, Word
from gridsession.sources.connection_string import RedisAddress, parse

_CALLERS = (16, 128)
_HOLDER = "POST /cart · web-3 · pid 71"
_TIMEOUT = 10.0  # seconds for a call; nothing is late here

LINK, GRID, BARE = "gridsession's link", "gridsession, through its grid", "bare protocol and parser"
REDIS_PY, REDIS_PY_SCRIPT = "redis-py, evalsha", "redis-py, register_script"
GLIDE, GLIDE_SCRIPT = "valkey-glide, custom_command", "valkey-glide, invoke_script"

# A script, the record's name and the rest of its arguments.
Said = tuple[Script, bytes, tuple[bytes, ...]]


class _Recording(Connections):
    """The grid's real connections, which remember what is sent."""

    def __init__(self, server: Server, *, timeout: float) -> None:
        super().__init__(server, timeout=timeout)
        self.said: list[Said] = []

    def run(self, script: Script, name: bytes, *arguments: Word) -> asyncio.Future[Any]:
        words = [x if isinstance(x, bytes) else str(x).encode() for x in arguments]
        self.said.append((script, name, tuple(words)))
        return super().run(script, name, *arguments)


class Pair:
    """A lock taken and a commit that gives it back: as the grid is asked, and as it is sent."""

    __slots__ = ("acquire", "change", "claim", "commit", "key", "secret")

    def __init__(
        self, key: bytes, secret: bytes, change: Change, claim: Claim, sent: Sequence[Said]
    ) -> None:
        self.key, self.secret, self.claim, self.change = key, secret, claim, change
        self.acquire, self.commit = sent


class Record:
    """A caller's own record, and any number of different pairs of calls for it."""

    def __init__(self) -> None:
        self._key, self._secret = os.urandom(32), os.urandom(32)
        self._payload = os.urandom(1024)
        self._tokens = 0
        self._sent: list[Said] = []

    async def make(self, grid: RedisGrid, said: list[Said]) -> None:
        """Create it, and see what the grid sends for one pair."""
        new = NewRecord(1, self._secret, self._payload, DAY, None, "user-123456")
        await grid.create(self._key, new)
        self._claim, self._change = self._next()
        said.clear()
        outcome = await grid.acquire(self._key, self._secret, self._claim)
        assert type(outcome) is Granted
        await grid.commit(self._key, self._claim.token, self._change, release=True)
        self._sent = list(said)

    def _next(self) -> tuple[Claim, Change]:
        self._tokens += 1
        token = self._key[:8] + struct.pack(">Q", self._tokens)
        commit_token = int.from_bytes(os.urandom(8), "big")
        claim = Claim(token, _HOLDER, 15.0, 50)
        return claim, Change(commit_token, self._payload, DAY, "user-123456")

    def pairs(self, count: int) -> list[Pair]:
        made = []
        for _ in range(count):
            claim, change = self._next()
            other = {
                self._claim.token: claim.token,
                self._change.commit_token.to_bytes(8, "big"): change.commit_token.to_bytes(
                    8, "big"
                ),
            }
            sent = [
                (script, name, tuple(other.get(word, word) for word in words))
                for script, name, words in self._sent
            ]
            made.append(Pair(self._key, self._secret, change, claim, sent))
        return made


# -- the peers -------------------------------------------------------------------------------


class Peer(ABC):
    """A client, connected while it is entered."""

    def __init__(self, redis: RedisServer, scripts: Sequence[Script]) -> None:
        self.redis = redis
        self.scripts = scripts

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @abstractmethod
    async def open(self) -> None: ...

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    async def caller(self, pairs: Sequence[Pair]) -> None:
        """One caller, one call after the other."""


class _ByCalls(Peer):
    """With what has a `call` that takes a command's words."""

    _on: Link | BareLoop

    async def caller(self, pairs: Sequence[Pair]) -> None:
        call = self._on.call
        for pair in pairs:
            script, name, words = pair.acquire
            reply = await call(b"EVALSHA", script.sha, b"1", name, *words)
            assert reply[0] == GRANTED
            script, name, words = pair.commit
            reply = await call(b"EVALSHA", script.sha, b"1", name, *words)
            assert reply[0] == OK


class _OnLink(_ByCalls):
    async def open(self) -> None:
        self._on = self._link = Link(_server(self.redis), timeout=_TIMEOUT)
        await self._link.open()

    async def close(self) -> None:
        self._link.close()


class _OnGrid(Peer):
    async def open(self) -> None:
        self._grid = RedisGrid(_server(self.redis), namespace=NAMESPACE, timeout=_TIMEOUT)
        await self._grid.open()

    async def close(self) -> None:
        await self._grid.close()

    async def caller(self, pairs: Sequence[Pair]) -> None:
        grid = self._grid
        for pair in pairs:
            assert type(await grid.acquire(pair.key, pair.secret, pair.claim)) is Granted
            await grid.commit(pair.key, pair.claim.token, pair.change, release=True)


class _OnBareLoop(_ByCalls):
    async def open(self) -> None:
        self._on = self._bare = await BareLoop.to(self.redis.port)

    async def close(self) -> None:
        self._bare.close()


class _OnRedisPy(Peer):
    """With its pool, which gives each call under way a connection."""

    async def open(self) -> None:
        import redis.asyncio

        # Its own limit is 100, and the next caller would be refused.
        self._client: Any = redis.asyncio.Redis.from_url(self.redis.url, max_connections=1000)
        self._shas = {script: script.sha.decode() for script in self.scripts}

    async def close(self) -> None:
        await self._client.aclose()

    async def caller(self, pairs: Sequence[Pair]) -> None:
        call, shas = self._client.evalsha, self._shas
        for pair in pairs:
            script, name, words = pair.acquire
            reply = await call(shas[script], 1, name, *words)
            assert reply[0] == GRANTED
            script, name, words = pair.commit
            reply = await call(shas[script], 1, name, *words)
            assert reply[0] == OK


class _OnRedisPyScript(_OnRedisPy):
    """As its users write it."""

    async def caller(self, pairs: Sequence[Pair]) -> None:
        registered = {
            script: self._client.register_script(script.source) for script in self.scripts
        }
        for pair in pairs:
            script, name, words = pair.acquire
            reply = await registered[script](keys=[name], args=words)
            assert reply[0] == GRANTED
            script, name, words = pair.commit
            reply = await registered[script](keys=[name], args=words)
            assert reply[0] == OK


class _OnGlide(Peer):
    async def open(self) -> None:
        import glide

        make_script: Any = glide.Script
        where = [glide.NodeAddress("127.0.0.1", self.redis.port)]
        configuration = glide.GlideClientConfiguration(where, request_timeout=int(_TIMEOUT * 1000))
        self._client: Any = await glide.GlideClient.create(configuration)
        self._scripts: dict[Script, Any] = {x: make_script(x.source) for x in self.scripts}

    async def close(self) -> None:
        await self._client.close()

    async def caller(self, pairs: Sequence[Pair]) -> None:
        call = self._client.custom_command
        for pair in pairs:
            script, name, words = pair.acquire
            reply = await call([b"EVALSHA", script.sha, b"1", name, *words])
            assert reply[0] == GRANTED
            script, name, words = pair.commit
            reply = await call([b"EVALSHA", script.sha, b"1", name, *words])
            assert reply[0] == OK


class _OnGlideScript(_OnGlide):
    """As its users write it."""

    async def caller(self, pairs: Sequence[Pair]) -> None:
        call, scripts = self._client.invoke_script, self._scripts
        for pair in pairs:
            script, name, words = pair.acquire
            reply = await call(scripts[script], keys=[name], args=list(words))
            assert reply[0] == GRANTED
            script, name, words = pair.commit
            reply = await call(scripts[script], keys=[name], args=list(words))
            assert reply[0] == OK


_PEERS: dict[str, type[Peer]] = {
    LINK: _OnLink,
    BARE: _OnBareLoop,
    GRID: _OnGrid,
    REDIS_PY: _OnRedisPy,
    REDIS_PY_SCRIPT: _OnRedisPyScript,
    GLIDE: _OnGlide,
    GLIDE_SCRIPT: _OnGlideScript,
}


def _server(redis: RedisServer) -> Server:
    address = parse(redis.url)
    assert isinstance(address, RedisAddress)
    return Server.at(address)


# -- measuring -------------------------------------------------------------------------------


async def _round(peer: Peer, work: Sequence[Sequence[Pair]]) -> tuple[float, float]:
    """CPU microseconds and wall microseconds a call."""
    calls = 2 * sum(map(len, work))
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(peer.caller, work))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return cpu / calls * 1e6, wall / calls * 1e6


async def _measure(
    redis: RedisServer, callers: int, rounds: int, calls: int, tick: Callable[[], None]
) -> dict[str, list[tuple[float, float]]]:
    server = _server(redis)
    grid = RedisGrid(server, namespace=NAMESPACE, timeout=_TIMEOUT)
    grid.connections = recording = _Recording(server, timeout=_TIMEOUT)
    await grid.open()
    records = [Record() for _ in range(callers)]
    for record in records:
        await record.make(grid, recording.said)
    scripts = list({script: None for script, _, _ in recording.said})
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in _PEERS}
    async with AsyncExitStack() as stack:
        stack.push_async_callback(grid.close)
        peers = {
            name: await stack.enter_async_context(kind(redis, scripts))
            for name, kind in _PEERS.items()
        }
        for number in range(rounds + 1):
            for name, peer in list(peers.items())[:: (-1) ** number]:
                work = [record.pairs(calls // callers // 2) for record in records]
                figure = await _round(peer, work)
                if number:  # the first connects the pools
                    figures[name].append(figure)
                tick()
    return figures


def link(options: Options) -> Result:
    """Client CPU of a script call at Redis: ours, redis-py's, valkey-glide's and the least."""
    rounds, calls = options.pick(9, 3), options.pick(8192, 2048)
    result, done = Result(), 0

    def tick() -> None:
        nonlocal done
        done += 1
        options.progress.at(done / (len(_CALLERS) * len(_PEERS) * (rounds + 1)))

    with RedisServer(Path(options.folder)) as redis:
        version = redis.version
        for callers in _CALLERS:
            figures = asyncio.run(_measure(redis, callers, rounds, calls, tick))
            _tell(result, figures, callers, version)
    return result


def _tell(
    result: Result, figures: dict[str, list[tuple[float, float]]], callers: int, version: str
) -> None:
    cpu = {name: median([used for used, _ in rounds]) for name, rounds in figures.items()}
    rows = [
        [
            name,
            f"{cpu[name]:.1f}",
            f"± {spread([used for used, _ in rounds]):.1f}",
            f"{cpu[name] / cpu[LINK]:.2f}",
            f"{1e6 / median([wall for _, wall in rounds]):,.0f}",
        ]
        for name, rounds in figures.items()
    ]
    result.tables.append(
        Table(
            f"link: scripts with 1 KiB at {version}, {callers} callers; asyncio",
            ("", "CPU µs a call", "", "of the link's", "calls/s"),
            rows,
            ["bound are the faster of redis-py's two ways, and of valkey-glide's"],
        )
    )
    for whose, names, limit in (
        ("redis-py's", (REDIS_PY, REDIS_PY_SCRIPT), 0.25),
        ("valkey-glide's", (GLIDE, GLIDE_SCRIPT), 0.333),
        ("a bare loop's", (BARE,), 1.3),
    ):
        theirs = min(cpu[name] for name in names)
        result.checks.append(
            Check(
                f"client CPU of a script call, of {whose}: {callers} callers",
                cpu[LINK] / theirs,
                limit,
                " ×",
                f"{cpu[LINK] / theirs:.2f} × ({cpu[LINK]:.1f} / {theirs:.1f} µs)",
            )
        )
    result.figures[f"{callers} callers"] = figures
