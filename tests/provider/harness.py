"""What tests of sessions drive them with: loops, grids that can be watched, slowed and broken."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import uvloop

from gridsession import GridUnavailable, Session, SessionProvider, SessionSettings
from gridsession.changes import ABSENT
from gridsession.grids.contract import (
    Busy,
    Change,
    Claim,
    Clock,
    Committed,
    Conflict,
    Exists,
    Found,
    Gone,
    Granted,
    Grid,
    Locked,
    LockLost,
    Missing,
    NewRecord,
    QueueFull,
    Released,
    Removed,
    Replaced,
    Version,
)
from gridsession.grids.embedded import EmbeddedGrid
from gridsession.grids.embedded.place import Place
from gridsession.grids.memory import MemoryGrid
from gridsession.grids.redis import RedisGrid
from gridsession.identity import Identity, parse_id
from tests.clocked_redis import ClockedRedisGrid
from tests.redis_server import a_namespace, shared_server

P = ParamSpec("P")
T = TypeVar("T")
Hook = Callable[[str], Awaitable[None]]

NO_SWEEP = {"sweep_interval": 3600.0}  # seconds; a sweep would come at a moment of its own choice
BOUND = 20.0  # seconds after which a test that hangs fails
BESIDE = frozenset(("open", "close", "wait", "sweep", "renew"))  # not calls of a request


def run(main: Coroutine[Any, Any, T], *, loop: str = "asyncio") -> T:
    """Run a coroutine on a new event loop, bounded in time."""
    factory = uvloop.new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_bounded(main))


async def _bounded(main: Coroutine[Any, Any, T]) -> T:
    async with asyncio.timeout(BOUND):
        return await main


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make a test of a coroutine. Its parameter `loop`, if it has one, names the event loop."""

    @functools.wraps(test)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        run(test(*args, **kwargs), loop=str(kwargs.get("loop", "asyncio")))

    return call


def make_grid(kind: str, folder: Path, clock: Clock | None = None) -> Grid:
    """A grid by its name, on a clock that a test sets. `durable` is an embedded one."""
    if kind == "redis":
        url, namespace = shared_server().url, a_namespace()
        if clock is not None:
            return ClockedRedisGrid(url, clock, namespace=namespace)
        return RedisGrid.from_connection_string(url, namespace=namespace, timeout=2.0)
    if kind == "memory":
        return MemoryGrid(clock)
    return EmbeddedGrid(Place(folder / "grid", 4 << 20, kind == "durable"), clock=clock)


class Spy:
    """A grid that notes each call and lets a test step in before and after it.

    Attributes:
        calls: the names of all calls made, in order.
        outcomes: those calls' names with what the grid answered.
        before, after: awaited with the call's name; what they raise is the call's outcome.
    """

    def __init__(self, inner: Grid) -> None:
        self.inner = inner
        self.calls: list[str] = []
        self.outcomes: list[tuple[str, object]] = []
        self._under_way: list[str] = []
        self.before: Hook | None = None
        self.after: Hook | None = None

    @property
    def asked(self) -> list[str]:
        """The calls that were made for a request, without what runs beside it."""
        return [name for name in self.calls if name not in BESIDE]

    def step(self, hook: Hook | None) -> None:
        """Set the same hook before and after each call."""
        self.before = self.after = hook

    async def _call(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        self.calls.append(name)
        self._under_way.append(name)
        try:
            if self.before is not None:
                await self.before(name)
            outcome = await call()
            self.outcomes.append((name, outcome))
            if self.after is not None:
                await self.after(name)
        finally:
            self._under_way.remove(name)
        return outcome

    def in_line(self, number: int) -> bool:
        """Whether so many wait for a bell, and will hear it. At a Redis the first wait only begins
        to listen.
        """
        each = 2 if isinstance(self.inner, RedisGrid) else 1
        return self.calls.count("wait") >= number * each

    async def settle(self) -> None:
        """Let what runs beside the requests ask the grid, and be answered."""
        await steps(3)
        await until(lambda: all(name == "wait" for name in self._under_way))

    is_local = False  # so that what is tested behind it has a client cache

    @property
    def where(self) -> str:
        return self.inner.where

    async def open(self) -> None:
        await self._call("open", self.inner.open)

    async def close(self) -> None:
        await self._call("close", self.inner.close)

    async def create(
        self, key: bytes, new: NewRecord, claim: Claim | None = None
    ) -> Committed | Exists:
        return await self._call("create", lambda: self.inner.create(key, new, claim))

    async def acquire(
        self, key: bytes, secret: bytes, claim: Claim, known: Version | None = None
    ) -> Granted | Busy | QueueFull | Replaced | Missing:
        return await self._call("acquire", lambda: self.inner.acquire(key, secret, claim, known))

    async def read(
        self,
        key: bytes,
        secret: bytes,
        watch: Claim | None = None,
        seen: bytes | None = None,
        known: Version | None = None,
    ) -> Found | Busy | QueueFull | Replaced | Missing:
        return await self._call("read", lambda: self.inner.read(key, secret, watch, seen, known))

    async def wait(self, key: bytes, token: bytes, seconds: float) -> None:
        return await self._call("wait", lambda: self.inner.wait(key, token, seconds))

    async def commit(
        self, key: bytes, token: bytes, change: Change, *, release: bool
    ) -> Committed | LockLost | Gone:
        return await self._call(
            "commit", lambda: self.inner.commit(key, token, change, release=release)
        )

    async def commit_if(
        self, key: bytes, secret: bytes, base: Version, change: Change
    ) -> Committed | Conflict | Locked | Replaced | Gone:
        return await self._call(
            "commit_if", lambda: self.inner.commit_if(key, secret, base, change)
        )

    async def renew(self, leases: Sequence[tuple[bytes, bytes]], lease: float) -> list[bool]:
        return await self._call("renew", lambda: self.inner.renew(leases, lease))

    async def release(self, key: bytes, token: bytes) -> Released | LockLost | Gone:
        return await self._call("release", lambda: self.inner.release(key, token))

    async def touch(self, key: bytes) -> bool:
        return await self._call("touch", lambda: self.inner.touch(key))

    async def remove(self, key: bytes, token: bytes | None = None) -> Removed | LockLost | Gone:
        return await self._call("remove", lambda: self.inner.remove(key, token))

    async def sweep(self, limit: int) -> int:
        return await self._call("sweep", lambda: self.inner.sweep(limit))


class Outage:
    """A hook that fails the calls of some names, as a grid that is away does.

    Args:
        names: of the calls that fail; all but `open` and `close` when there are none.
        times: how many of them; None until it is `over`.
    """

    def __init__(self, *names: str, times: int | None = None) -> None:
        self._names = names
        self._left = times
        self.failed = 0

    def over(self) -> None:
        self._left = 0

    async def __call__(self, name: str) -> None:
        if name in (self._names or ALL_BUT_OPEN) and self._left != 0:
            self.failed += 1
            if self._left is not None:
                self._left -= 1
            raise GridUnavailable("the grid is away")


ALL_BUT_OPEN = (
    *("create", "acquire", "read", "commit", "commit_if", "renew"),
    *("release", "touch", "remove", "sweep"),
)


class OnTheWay:
    """A hook that keeps one call on its way until every other task has come as far as it can.

    Args:
        grid: whose call; the hook is set there.
        name: of the call; the first of that name.
        way: `there`, before the grid has carried it out, or `back`, with its answer.

    Attributes:
        reached: set when the call is on its way.
    """

    def __init__(self, grid: Spy, name: str, way: str = "there") -> None:
        self._name = name
        self.reached = asyncio.Event()
        if way == "there":
            grid.before = self
        else:
            grid.after = self

    async def __call__(self, name: str) -> None:
        if name == self._name and not self.reached.is_set():
            self.reached.set()
            await steps(50)


@contextlib.asynccontextmanager
async def provider_on(
    grid: Grid, *, on_conflict: Any = None, **options: Any
) -> AsyncIterator[SessionProvider]:
    """A provider on a grid that is there; what it left under way is done at the end."""
    settings = SessionSettings(**NO_SWEEP | options)
    async with SessionProvider(settings, grid=grid, on_conflict=on_conflict) as provider:
        yield provider


async def stored(provider: SessionProvider, /, user: str | None = None, **values: Any) -> str:
    """Store a session; its id."""
    async with provider.open(None) as session:
        session.update(values)
        session.user = user
        return session.id


async def data_of(provider: SessionProvider, session_id: str) -> dict[str, Any]:
    """What the grid has stored under an id, for whoever reads it next."""
    async with provider.open(session_id, access="read_only") as session:
        return dict(session)


async def change(provider: SessionProvider, session_id: str, **values: Any) -> None:
    """Another worker's commit, in between."""
    async with provider_on(provider.grid) as other, other.open(session_id) as session:
        for key, value in values.items():
            if value is ABSENT:
                del session[key]
            else:
                session[key] = value


def come_first(provider: SessionProvider, session_id: str, times: int = 99) -> Hook:
    """A hook that lets another worker commit ahead of each commit without a lock."""
    done = 0

    async def hook(name: str) -> None:
        nonlocal done
        if name == "commit_if" and done < times:
            done += 1
            await change(provider, session_id, n=done)

    return hook


async def count(session: Session) -> None:
    """Add one to `n`, slowly enough for others to come in between where they can."""
    async with session.exclusive() as s:
        n = s["n"]
        await steps(3)
        s["n"] = n + 1


def identity_of(session_id: str) -> Identity:
    identity = parse_id(session_id.encode())
    assert identity is not None
    return identity


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop go on until a condition holds; the test's own bound ends what never does."""
    while not condition():  # noqa: ASYNC110 - what is waited for is the state of the code tested
        await asyncio.sleep(0.001)


async def steps(number: int) -> None:
    """Let every task that can go on do so, a number of times."""
    for _ in range(number):
        await asyncio.sleep(0)


async def is_free(grid: Grid, session_id: str) -> bool:
    """Whether nobody holds the session's lock and nobody waits for it."""
    _, key, secret = identity_of(session_id)
    claim = Claim(b"is it free?" + bytes(5), "a look", 30.0, 50)
    outcome = await grid.acquire(key, secret, claim)
    await grid.release(key, claim.token)
    return isinstance(outcome, (Granted, Missing))
